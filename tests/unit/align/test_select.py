"""Several teachers on one text: scores on the student's axis, and who gets which token."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mopd.align.boundaries import align_bytes
from mopd.align.select import byte_scores, select
from mopd.types import Alignment, TeacherRows, TeacherScores
from tests.helpers.losses import make_rows


def scores_of(
    ends: list[int], logprobs: list[float], *, probs: list[list[float]] | None = None
) -> TeacherScores:
    """``probs``: what each row lists; the rest of 1 is the tail."""
    table = np.tile([0.5, 0.25], (len(ends), 1)) if probs is None else np.array(probs)
    with np.errstate(divide="ignore"):
        logs = np.log(table).astype(np.float32)
        tail = np.log(np.maximum(1.0 - table.sum(1), 0.0)).astype(np.float32)
    return TeacherScores(
        teacher="t",
        model_fingerprint="f",
        token_ids=np.zeros(len(ends), dtype=np.int32),
        byte_ends=np.array(ends, dtype=np.int64),
        logprobs=np.array(logprobs, dtype=np.float32),
        topk_ids=np.tile(np.arange(table.shape[1], dtype=np.int32), (len(ends), 1)),
        topk_logprobs=logs,
        log_tail=tail,
        lse=None,
        valid=np.ones(len(ends), dtype=bool),
    )


STUDENT = [2, 3, 6]  # |ab|c|def|


def alignment_of(scores: TeacherScores, *, ends_turn: bool = False) -> Alignment:
    theirs = scores.byte_ends[:-1] if ends_turn else scores.byte_ends
    return align_bytes(np.array(STUDENT), theirs, both_end_turn=ends_turn)


def test_the_log_probability_of_a_chunk_is_per_byte() -> None:
    scores = scores_of([1, 2, 6], [-1.0, -3.0, -6.0])  # |a|b|cdef|
    found = byte_scores(scores, alignment_of(scores), "nll")
    assert found == pytest.approx([-2.0, -1.5, -1.5])


def test_the_end_of_the_turn_counts_as_one_byte() -> None:
    scores = scores_of([2, 3, 6, 6], [-2.0, -1.0, -6.0, -0.5])
    found = byte_scores(scores, alignment_of(scores, ends_turn=True), "nll")
    assert found == pytest.approx([-1.0, -1.0, -2.0, -0.5])


def test_splitting_every_teacher_token_changes_no_score_51() -> None:
    whole = scores_of([2, 6], [-2.0, -6.0])
    split = scores_of([1, 2, 5, 6], [-0.5, -1.5, -5.0, -1.0])
    expected = byte_scores(whole, alignment_of(whole), "nll")
    assert byte_scores(split, alignment_of(split), "nll") == pytest.approx(expected)


def entropy(probs: list[float]) -> float:
    return float(-sum(p * np.log(p) for p in probs if p > 0))


def test_entropy_and_confidence_are_means_over_the_rows_of_a_chunk() -> None:
    probs = [[0.7, 0.2], [0.5, 0.5], [0.9, 0.0]]
    scores = scores_of([1, 2, 6], [-1.0] * 3, probs=probs)
    here = alignment_of(scores)
    rows = [[0.7, 0.2, 0.1], [0.5, 0.5], [0.9, 0.1]]
    first = -(entropy(rows[0]) + entropy(rows[1])) / 2
    found = byte_scores(scores, here, "entropy")
    assert found == pytest.approx([first, -entropy(rows[2]), -entropy(rows[2])], abs=1e-6)
    assert byte_scores(scores, here, "confidence") == pytest.approx([0.6, 0.9, 0.9], abs=1e-6)


def test_whole_rows_are_normalised_first() -> None:
    scores = scores_of([2, 3, 6], [-1.0] * 3, probs=[[0.75, 0.25]] * 3)
    whole = replace(scores, topk_ids=None, topk_logprobs=scores.topk_logprobs + 2.0)
    for kind in ("entropy", "confidence"):
        expected = byte_scores(scores, alignment_of(scores), kind)
        assert byte_scores(whole, alignment_of(whole), kind) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", ["nll", "entropy", "confidence"])
def test_a_missing_row_marks_its_chunk(kind: str) -> None:
    scores = scores_of([1, 2, 6], [-1.0, -3.0, -6.0])
    scores = replace(scores, valid=np.array([True, False, True]))
    found = byte_scores(scores, alignment_of(scores), kind)  # pyright: ignore[reportArgumentType]
    assert np.isnan(found).tolist() == [True, False, False]


def test_nothing_to_score() -> None:
    scores = scores_of([], [])
    assert len(byte_scores(scores, alignment_of(scores), "nll")) == 0


def rows_of(chunks: list[list[int]]) -> TeacherRows:
    """``chunks``: the student tokens of each; a path and a native row wherever one can be."""
    boundary = [chunk[0] for chunk in chunks]
    rows = make_rows(
        boundary,
        np.zeros((len(chunks), 1)),
        np.full((len(chunks), 1), 0.5),
        tokens=[(p, 50 + p, c) for c, chunk in enumerate(chunks) for p in chunk],
        paths=[(p, [0], [1.0], 0.5) for p in boundary],
    )
    inside = np.array([p for chunk in chunks for p in chunk[1:]], dtype=np.int64)
    return replace(
        rows,
        position=np.array(boundary, dtype=np.int64),
        native_position=inside,
        native_weight=np.ones(len(inside)),
        native_ids=np.zeros((len(inside), 1), dtype=np.int32),
        native_logprobs=np.zeros((len(inside), 1)),
        native_log_tail=np.full(len(inside), -np.inf),
    )


ROWS = {"a": rows_of([[0], [1], [2, 3]]), "b": rows_of([[0, 1], [2]])}


def test_the_best_teacher_takes_a_token() -> None:
    scores = {"a": np.array([-1.0, -3.0, -2.0, -2.0]), "b": np.array([-2.0, -2.0, -2.0])}
    found = select(ROWS, scores, mode="best")
    # token 1 goes to b, who has no boundary there: its weight is nobody's
    assert found["a"].row_weight.tolist() == [1, 0, 1]  # the first of equal ones at token 2
    assert found["b"].row_weight.tolist() == [0, 0]
    assert found["a"].chunk_weight.tolist() == [1, 0, 1]
    assert found["a"].path_weight.tolist() == [0.5, 0, 0.5]
    assert found["b"].native_weight.tolist() == [1]  # inside b's chunk, at token 1
    assert found["a"].native_weight.tolist() == [1]  # token 3: only a covers it
    assert ROWS["a"].row_weight.tolist() == [1, 1, 1]


def test_weighted_shares_are_a_softmax_over_the_teachers_that_cover_a_token() -> None:
    scores = {"a": np.array([-1.0, -3.0, -2.0, -2.0]), "b": np.array([-2.0, -2.0, -2.0])}
    found = select(ROWS, scores, mode="weighted", sharpness=2.0)
    first = np.exp(-2.0) / (np.exp(-2.0) + np.exp(-4.0))
    second = np.exp(-6.0) / (np.exp(-6.0) + np.exp(-4.0))
    assert found["a"].row_weight == pytest.approx([first, second, 0.5])
    assert found["b"].row_weight == pytest.approx([1 - first, 0.5])
    assert found["b"].native_weight == pytest.approx([1 - second])
    assert found["a"].native_weight == pytest.approx([1.0])
    assert found["a"].path_weight == pytest.approx([first / 2, second / 2, 0.25])


@pytest.mark.parametrize("mode", ["best", "weighted"])
def test_one_teacher_alone_keeps_its_weights_50(mode: str) -> None:
    for low in (-1.0, -np.inf):  # also where it holds the text for impossible
        found = select({"a": ROWS["a"]}, {"a": np.full(4, low)}, mode=mode)  # pyright: ignore[reportArgumentType]
        assert found["a"].row_weight.tolist() == [1, 1, 1]
        assert found["a"].path_weight.tolist() == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("mode", ["best", "weighted"])
def test_a_failed_teacher_leaves_its_tokens_to_the_others_51(mode: str) -> None:
    failed = {"a": ROWS["a"], "b": rows_of([[2]])}  # b's first chunk is missing
    scores = {"a": np.full(4, -5.0), "b": np.array([np.nan, np.nan, -9.0])}
    found = select(failed, scores, mode=mode)  # pyright: ignore[reportArgumentType]
    assert found["a"].row_weight[:2].tolist() == [1, 1]
    none = {"a": rows_of([]), "b": rows_of([])}
    for rows in select(none, {"a": np.zeros(0), "b": np.zeros(0)}, mode="best").values():
        assert len(rows.row_weight) == 0
