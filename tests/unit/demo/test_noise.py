"""Random segmentations and the mass on right continuations, on the tiny world's tokenizers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from mopd.demo import WorldSpec
from mopd.demo.decode import Example, encode_tasks
from mopd.demo.noise import PrefixNoise, Segmenter
from mopd.demo.robust import fitting_ids, fitting_mass
from mopd.demo.tasks import make_splits
from mopd.demo.tokenizers import KINDS, make_tokenizer, token_bytes
from mopd.demo.train import make_model


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(WorldSpec.tiny(), name="upper")


@pytest.fixture(scope="module")
def table(tokenizer: PreTrainedTokenizerFast) -> list[bytes]:
    return token_bytes(tokenizer, metaspace=KINDS["upper"].metaspace)


@pytest.fixture(scope="module")
def examples(tokenizer: PreTrainedTokenizerFast) -> list[Example]:
    tasks = [task for task in make_splits(WorldSpec.tiny())["train"] if task.domain == "upper"]
    return encode_tasks(tokenizer, tasks=tasks)


def _spell(ids: list[int], table: list[bytes]) -> str:
    return b"".join(table[token] for token in ids).decode()


def test_random_segmentations_have_all_depths(
    tokenizer: PreTrainedTokenizerFast, table: list[bytes], examples: list[Example]
) -> None:
    segmenter, rng = Segmenter(tokenizer), np.random.default_rng(0)
    text = examples[0].task.answer
    found = {tuple(segmenter.random(text, rng=rng)) for _ in range(1000)}
    assert {_spell(list(ids), table) for ids in found} == {text}
    assert tuple(examples[0].answer_ids[:-1]) in found
    assert max(len(ids) for ids in found) == len(text)
    space = tokenizer.convert_tokens_to_ids("\u2581")
    assert any(space in ids for ids in found)
    assert segmenter.random("7", rng=rng) == segmenter.encode("7")


def test_half_of_the_inputs_stay_canonical_and_all_targets_are(
    tokenizer: PreTrainedTokenizerFast, table: list[bytes], examples: list[Example]
) -> None:
    spec = dataclasses.replace(WorldSpec.tiny(), replace_rate=0.0)
    noise = PrefixNoise(spec, tokenizer=tokenizer, examples=examples, table=table)
    segmenter, rng, canonical = Segmenter(tokenizer), np.random.default_rng(0), 0
    for example in examples * 4:
        row, row_targets = noise.row(example, rng=rng)
        start, text = len(example.prompt_ids), example.task.answer
        assert row[:start] == example.prompt_ids
        inputs, targets = row[start:], row_targets[start - 1 :]
        assert _spell(inputs, table) == text
        rests = [text[len(_spell(inputs[:at], table)) :] for at in range(len(inputs))]
        assert targets == [*(segmenter.encode(rest)[0] for rest in rests), tokenizer.eos_token_id]
        canonical += inputs == example.answer_ids[:-1]
    assert canonical / (4 * len(examples)) == pytest.approx(0.55, abs=0.1)


@pytest.mark.parametrize("resplit_share", [0.0, 1.0])
def test_replaced_inputs_keep_their_targets(
    tokenizer: PreTrainedTokenizerFast,
    table: list[bytes],
    examples: list[Example],
    resplit_share: float,
) -> None:
    spec = dataclasses.replace(WorldSpec.tiny(), resplit_share=resplit_share)
    noise = PrefixNoise(spec, tokenizer=tokenizer, examples=examples, table=table)
    rng, replaced = np.random.default_rng(0), 0
    for example in examples:
        inputs, targets = noise.row(example, rng=rng)
        start, text = len(example.prompt_ids), example.task.answer
        shown = _spell(inputs[start:], table)
        replaced += shown != text
        if resplit_share == 0.0:
            assert targets[start - 1 :] == example.answer_ids
        else:
            assert len(shown) == len(text)
    assert 0.1 < replaced / len(examples) < 0.5


def test_fitting_ids_are_the_pieces_that_continue_the_answer() -> None:
    table = [b"", b"A", b"B", b"AB", b"BA", b"C", b"A"]
    by_bytes = {b"": [0], b"A": [1, 6], b"B": [2], b"AB": [3], b"BA": [4], b"C": [5]}
    found = fitting_ids([1, 2, 5], table=table, by_bytes=by_bytes, end_id=0)
    assert found == [[1, 6, 3], [2], [5], [0]]


def test_mass_of_an_oracle_is_one(
    tokenizer: PreTrainedTokenizerFast,
    table: list[bytes],
    examples: list[Example],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With one task, a model that spells the rest letter by letter fits everywhere."""
    example = examples[0]
    model = make_model(WorldSpec.tiny(), name="upper", tokenizer=tokenizer)
    segmenter = Segmenter(tokenizer)

    def spell_the_rest(*, input_ids: torch.Tensor, use_cache: bool) -> object:
        ids = input_ids[0].tolist()
        logits = torch.full((1, len(ids), len(tokenizer)), -1e9)
        for index in range(len(example.prompt_ids) - 1, len(ids)):
            done = _spell(ids[len(example.prompt_ids) : index + 1], table)
            rest = example.task.answer[len(done) :]
            right = segmenter.encode(rest[0])[0] if rest else tokenizer.eos_token_id
            logits[0, index, right] = 0.0
        return type("Output", (), {"logits": logits})

    kwargs = {"examples": [example], "table": table, "seed": 0}
    assert fitting_mass(model, tokenizer, **kwargs)["resplit"] < 0.5
    monkeypatch.setattr(model, "forward", spell_the_rest)
    assert fitting_mass(model, tokenizer, **kwargs) == {"canonical": 1.0, "resplit": 1.0}
