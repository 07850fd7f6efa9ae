"""What the aligner adds to alignment: selection, the canonical prefix, shared columns, counts."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from mopd.align.payload import PayloadOptions
from mopd.runtime.aligner import Aligner, AlignOptions, Tally
from mopd.runtime.collate import Objective
from mopd.runtime.weights import Normalizer
from mopd.types import Prompt, Rollout, TeacherScores
from tests.unit.tokens.trained import vocabulary

TEXT = "the fox jumps over the lazy dog"
NAMES = ("a", "b")


def tokenizer(kind: str) -> SimpleNamespace:
    found = vocabulary(kind)
    return SimpleNamespace(vocabulary=found, eos_id=found.eos_id)


STUDENT, TEACHER = tokenizer("byte_level"), tokenizer("sentencepiece")


def rollout(ids: list[int] | None = None) -> Rollout:
    ids = STUDENT.vocabulary.encode(TEXT.encode()) if ids is None else ids
    array = np.asarray([*ids, STUDENT.eos_id], dtype=np.int32)
    return Rollout(
        prompt=Prompt(id="p", messages=(), domain="d"),
        sample_index=0,
        prompt_ids=np.array([1], dtype=np.int32),
        token_ids=array,
        loss_mask=np.ones(len(array), dtype=bool),
        logprobs=np.zeros(len(array), dtype=np.float32),
        byte_ends=STUDENT.vocabulary.byte_ends(array),
        response=STUDENT.vocabulary.decode(array),
        policy_version=0,
        finish_reason="stop",
    )


def scores(name: str, logprob: float, *, dense: bool = False) -> TeacherScores:
    """Every token of the text with the same log-probability; the listed ones are ids 0 to 3."""
    ids = np.asarray([*TEACHER.vocabulary.encode(TEXT.encode()), TEACHER.eos_id], dtype=np.int32)
    count, size = len(ids), TEACHER.vocabulary.size
    width = size if dense else 4
    logs = np.full((count, width), np.log(1.0 / size), dtype=np.float32)
    logs[:, 3] += 1.0
    logs -= np.log(np.exp(logs).sum(1, keepdims=True) + (size - width) / size).astype(np.float32)
    return TeacherScores(
        teacher=name,
        model_fingerprint="f",
        token_ids=ids,
        byte_ends=TEACHER.vocabulary.byte_ends(ids),
        logprobs=np.full(count, logprob, dtype=np.float32),
        topk_ids=None if dense else np.tile(np.arange(4, dtype=np.int32), (count, 1)),
        topk_logprobs=logs,
        log_tail=np.full(count, -np.inf if dense else -1.0, dtype=np.float32),
        lse=None,
        valid=np.ones(count, dtype=bool),
    )


def aligner(options: AlignOptions, *, selection=None, sharpness: float = 1.0) -> Aligner:
    return Aligner(
        student=STUDENT,
        teachers=dict.fromkeys(NAMES, TEACHER),
        payload=dict.fromkeys(NAMES, PayloadOptions(temperature=1.0)),
        objective=Objective(
            weights=dict.fromkeys(NAMES, 0.5),
            normalizer=Normalizer(
                teachers=NAMES, domains=("d",), normalization="chunk", by_domain=True
            ),
            selection=selection,
            sharpness=sharpness,
        ),
        options=options,
    )


def rows_of(found: Aligner, answer: Rollout, said: dict[str, TeacherScores]):
    tally = Tally()
    (sample,) = found.samples([answer], [said], tally)
    return sample.rows, tally


def test_the_surer_teacher_takes_every_chunk():
    said = {"a": scores("a", -2.0), "b": scores("b", -1.0)}
    rows, _ = rows_of(aligner(AlignOptions(), selection="best"), rollout(), said)
    assert not rows["a"].row_weight.any()
    assert (rows["b"].row_weight == 1.0).all()
    both, _ = rows_of(aligner(AlignOptions(), selection="weighted"), rollout(), said)
    together = both["a"].row_weight + both["b"].row_weight
    assert together == pytest.approx(np.ones(len(together)))
    assert (both["b"].row_weight > both["a"].row_weight).all()
    plain, _ = rows_of(aligner(AlignOptions()), rollout(), said)
    assert (plain["a"].row_weight == 1.0).all()


def test_nothing_is_trained_behind_the_canonical_prefix():
    own = STUDENT.vocabulary.encode(TEXT.encode())
    cut = next(i for i in range(3, len(own)) if len(STUDENT.vocabulary.token_bytes[own[i]]) > 1)
    data = STUDENT.vocabulary.token_bytes[own[cut]]
    pieces = [STUDENT.vocabulary.by_bytes[data[:1]], STUDENT.vocabulary.by_bytes[data[1:2]]]
    rest = STUDENT.vocabulary.encode(data[2:]) if len(data) > 2 else []
    answer = rollout([*own[:cut], *pieces, *rest, *own[cut + 1 :]])
    said = {"a": scores("a", -1.0)}
    rows, tally = rows_of(aligner(AlignOptions(canonical_prefix=True)), answer, said)
    assert len(rows["a"].position) > 0
    assert (rows["a"].position < cut).all()
    size = len(answer.token_ids)
    assert tally.metrics()["untrained"] == (size - cut, size)
    last = int(rows["a"].token_position[-1]) + 1
    assert tally.metrics()["masked"][0] == cut - last  # of a chunk that goes on behind the prefix
    every, _ = rows_of(aligner(AlignOptions()), answer, said)
    assert every["a"].position[-1] == size - 1


@pytest.mark.parametrize("selection", [None, "best"])
def test_a_frame_that_the_student_writes_masks_itself_alone(selection) -> None:
    pad = STUDENT.vocabulary.roles["pad"]
    answer = rollout([pad, *STUDENT.vocabulary.encode(TEXT.encode())])
    reading = TEACHER.vocabulary.read(answer.response)
    ids = np.asarray([*reading.ids, TEACHER.eos_id], dtype=np.int32)
    plain = scores("a", -1.0)
    extra = len(ids) - len(plain.token_ids)

    def longer(values: np.ndarray) -> np.ndarray:
        return np.concatenate([np.repeat(values[:1], extra, axis=0), values])

    said = replace(
        plain,
        token_ids=ids,
        byte_ends=TEACHER.vocabulary.byte_ends(ids),
        **{
            name: longer(getattr(plain, name))
            for name in ("logprobs", "topk_ids", "topk_logprobs", "log_tail", "valid")
        },
    )
    found = aligner(AlignOptions(), selection=selection)
    rows, tally = rows_of(found, answer, {"a": said, "b": replace(said, teacher="b")})
    assert tally.metrics()["alignment_mismatch/a"] == (0.0, 1.0)
    assert rows["a"].position[0] == 1  # behind the frame
    assert tally.metrics()["masked"][0] == 1.0


def test_shared_columns_are_the_same_on_every_replica() -> None:
    def other(peaks: np.ndarray) -> np.ndarray:
        raised = peaks.copy()
        raised[7] = 0.0  # likely in another replica's answers
        return raised

    said = {"a": scores("a", -1.0, dense=True)}
    found = aligner(AlignOptions(shared_columns=2, max_over_replicas=other))
    rows, _ = rows_of(found, rollout(), said)
    assert rows["a"].topk_ids.tolist() == [3, 7]


def test_shared_columns_are_the_likeliest_of_the_step():
    said = {"a": scores("a", -1.0, dense=True)}
    rows, _ = rows_of(aligner(AlignOptions(shared_columns=2)), rollout(), said)
    ids = rows["a"].topk_ids
    assert ids is not None and ids.tolist() == [0, 3]  # the likeliest, then the smallest id
    mass = np.exp(rows["a"].topk_logprobs).sum(1) + np.exp(rows["a"].log_tail)
    assert mass == pytest.approx(np.ones(len(mass)), rel=1e-5)


def test_pairing_by_position_looks_at_no_text():
    said = {"a": scores("a", -1.0)}
    rows, _ = rows_of(aligner(AlignOptions(by_position=True)), rollout(), said)
    assert rows["a"].chunk_size.tolist() == [[1, 1]] * len(rows["a"].position)
