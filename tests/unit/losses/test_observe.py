"""What a step's line says of two distributions, against the definitions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mopd.losses import observe
from mopd.losses.observe import Carry, text_of
from mopd.losses.vocab import VocabShard
from mopd.types import MicroBatch
from tests.helpers.losses import step_of
from tests.helpers.observed import TEMPERATURE, case_of, expected, observed
from tests.helpers.random_losses import V_S, problem

WHOLE = VocabShard(start=0, size=V_S, vocab_size=V_S)
CASES = [("own", False), ("own", True), ("common", False), ("columns", False), ("none", False)]


@pytest.mark.parametrize(("carry", "whole"), CASES)
def test_the_means_are_those_of_the_definitions(carry: Carry, whole: bool) -> None:
    case = case_of(carry, whole=whole)
    wanted = expected(case, carry)
    assert observed(case, carry, WHOLE, case.logits) == pytest.approx(wanted, abs=1e-6)
    assert ("topk_overlap" in wanted) is (carry != "none")


@pytest.mark.parametrize("carry", ["common", "columns", "none"])
def test_blocks_of_one_row_add_up_to_the_same(
    carry: Carry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observe, "BLOCK_ELEMENTS", 1)
    case = case_of(carry)
    assert observed(case, carry, WHOLE, case.logits) == pytest.approx(expected(case, carry))


def test_no_more_of_the_teachers_tokens_than_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The likeliest ones are kept."""
    case = case_of("own", whole=True)
    monkeypatch.setattr(observe, "MAX_SUPPORT", 1)
    found = observed(case, "own", WHOLE, case.logits)
    assert found["topk_overlap"] == found["top1_projected"]
    theirs = torch.tensor(case.rows.topk_logprobs) / TEMPERATURE
    best = torch.softmax(theirs, dim=-1).amax(dim=-1).mean()
    assert found["teacher_topk_mass"] == pytest.approx(float(best))


def test_a_payload_without_lists_is_not_compared() -> None:
    case = problem(5)
    none = np.zeros((len(case.rows.position), 0))
    rows = replace(case.rows, topk_ids=none.astype(np.int32), topk_logprobs=none)
    found = observed(replace(case, rows=rows), "columns", WHOLE, case.logits)
    assert set(found) == {"entropy", "top1"}


def test_some_rows_of_a_large_vocabulary_and_the_same_ones_however_texts_are_dealt() -> None:
    """Padded and packed, alone and together."""
    texts = [np.arange(3, 43), np.arange(50, 75)]
    rows = problem(5).rows
    found = []
    for text in texts:
        micro, _ = step_of(rows, len(text))
        micro = replace(micro, tokens=text[None, :], lengths=np.array([len(text)]))
        payload = replace(rows, position=np.arange(len(text) - 1))
        chosen = observe._chosen(payload, micro, 5 * observe.COLUMNS_PER_ROW)
        assert len(text) // 5 - 1 <= len(chosen) <= len(text) // 5 + 1
        found.append(payload.position[chosen])
    packed = MicroBatch(
        tokens=np.concatenate(texts)[None, :],
        lengths=np.array([40, 25]),
        response_mask=np.ones((1, 65), dtype=bool),
        offsets=np.array([0, 40, 65]),
    )
    padded = MicroBatch(
        tokens=np.stack([texts[0], np.pad(texts[1], (0, 15), constant_values=9)]),
        lengths=np.array([40, 25]),
        response_mask=np.ones((2, 40), dtype=bool),
    )
    both = np.concatenate([np.arange(39), 40 + np.arange(24)])
    for micro in (packed, padded):
        payload = replace(rows, position=both)
        chosen = observe._chosen(payload, micro, 5 * observe.COLUMNS_PER_ROW)
        text, place = text_of(micro, both[chosen])
        assert place[text == 0].tolist() == found[0].tolist()
        assert place[text == 1].tolist() == found[1].tolist()
