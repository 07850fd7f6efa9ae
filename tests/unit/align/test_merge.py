"""Merged teacher rows of a chunk: published numbers, and dense formulas row by row."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from mopd.align.boundaries import align_bytes
from mopd.align.merge import Merge, merged_rows
from mopd.align.payload import PayloadOptions, teacher_rows
from mopd.align.temper import temper
from mopd.types import TeacherScores
from tests.helpers.payloads import Problem, dense, random_problem

MERGES: tuple[Merge, ...] = ("boundary", "mean_prob", "nemo", "observed", "bayesian")


def scores_of(probs: Any, actual: list[int], *, ids: Any = None) -> TeacherScores:
    """Rows [T, V] of probabilities; with ``ids`` [T, K], lists of them and a tail."""
    table = np.array(probs, dtype=np.float64)
    with np.errstate(divide="ignore"):
        logs = np.log(table)
        tail = np.log(np.maximum(1.0 - table.sum(1), 0.0)) if ids is not None else -np.inf
    return TeacherScores(
        teacher="t",
        model_fingerprint="f",
        token_ids=np.array(actual, dtype=np.int32),
        byte_ends=np.arange(1, len(table) + 1),
        logprobs=np.full(len(table), -1.0, dtype=np.float32)
        if ids is not None
        else logs[np.arange(len(table)), actual].astype(np.float32),
        topk_ids=None if ids is None else np.array(ids, dtype=np.int32),
        topk_logprobs=logs.astype(np.float32),
        log_tail=np.full(len(table), tail, dtype=np.float32),
        lse=None,
        valid=np.ones(len(table), dtype=bool),
    )


def merged(scores: TeacherScores, merge: Merge, *, rows: int) -> np.ndarray:
    """Probabilities of one chunk of the first ``rows`` teacher rows."""
    found = merged_rows(
        scores, temper(scores, 1.0), row=np.array([0]), count=np.array([rows]), merge=merge
    )
    return np.exp(found.logprobs[0].astype(float))


PAIR = [[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    ("merge", "expected"),
    [
        ("boundary", [0.6, 0.3, 0.1]),
        ("mean_prob", [0.4, 0.4, 0.2]),
        ("nemo", [0.346410, 0.387298, 0.173205]),
        ("observed", [0.30, 0.15, 0.05]),
        ("bayesian", [0.12, 0.30, 0.18]),
    ],
)
def test_two_rows_37_46(merge: Merge, expected: list[float], whole: bool) -> None:
    scores = scores_of(PAIR, [0, 1])
    found = merged(scores, merge, rows=2)
    if not whole:
        lists = replace(scores, topk_ids=np.array([[0, 1, 2], [0, 1, 2]], dtype=np.int32))
        out = merged_rows(
            lists, temper(lists, 1.0), row=np.array([0]), count=np.array([2]), merge=merge
        )
        assert out.ids is not None
        found = np.exp(out.logprobs[0][np.argsort(out.ids[0])].astype(float))
        assert np.isneginf(out.log_tail).all()
    assert found == pytest.approx(expected, abs=1e-6)


def test_the_geometric_mean_of_three_rows_can_be_negative_37() -> None:
    rows = [[0.6, 0.2, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1]]
    mean = merged(scores_of(rows, [0, 1, 2]), "nemo", rows=3)
    student = np.array([0.5504505, 0.2450450, 0.1045045, 0.1])
    assert (mean * np.log(mean / student)).sum() == pytest.approx(-0.0897400, abs=1e-6)


def problem_of(seed: int) -> Problem:
    return random_problem(["123", "12", "231", "31"], ["23"], "123", seed=seed, size=60)


def by_formula(problem: Problem, merge: Merge) -> np.ndarray:
    """[C, V] from whole rows, chunk by chunk."""
    probs = np.exp(problem.scores.topk_logprobs.astype(float))
    actual = np.exp(problem.scores.logprobs.astype(float))
    starts = problem.alignment.teacher_starts
    found = []
    for begin, end in pairwise(starts):
        rows, here = probs[begin:end], actual[begin:end]
        found.append(
            {
                "boundary": rows[0],
                "mean_prob": rows.mean(0),
                "nemo": np.exp(np.log(rows).mean(0)),
                "observed": rows[0] * here[1:].prod(),
                "bayesian": rows[-1] * here[:-1].prod(),
            }[merge]
        )
    return np.array(found)


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("seed", range(3))
def test_random_chunks_whole_and_completely_listed(merge: Merge, seed: int) -> None:
    problem = problem_of(seed)
    size = problem.teacher.size
    assert (np.diff(problem.alignment.teacher_starts) > 1).sum() > 3
    expected = by_formula(problem, merge)
    options = PayloadOptions(temperature=1.0, merge=merge)
    for scores in (problem.scores, problem.listed(size)):
        rows = problem.rows(scores, options)
        assert dense(rows, size)[:, :-1] == pytest.approx(expected, abs=1e-6)
    # rows that do not sum to 1 are no softmax of anything
    whole = problem.rows(problem.scores, options)
    assert (whole.topk_ids is None) == (merge == "boundary")


@pytest.mark.parametrize("merge", MERGES)
def test_short_lists_keep_the_mass(merge: Merge) -> None:
    problem = problem_of(5)
    size, width = problem.teacher.size, 4
    scores = problem.listed(width)
    rows = problem.rows(scores, PayloadOptions(temperature=1.0, merge=merge))
    found = dense(rows, size)
    assert rows.topk_ids is not None and rows.topk_ids.shape[1] == width
    several = rows.chunk_size[:, 1] > 1
    plain = dense(problem.rows(scores, PayloadOptions(temperature=1.0)), size)
    assert found[~several] == pytest.approx(plain[~several], abs=1e-7)
    exact = by_formula(problem, merge)
    if merge == "mean_prob":
        assert found.sum(1) == pytest.approx(1.0, abs=1e-6)
        assert (found[:, :-1] <= exact + 1e-7).all()
    elif merge == "nemo":
        assert (found.sum(1) <= 1.0 + 1e-6).all()
    else:
        assert found.sum(1) == pytest.approx(exact.sum(1), rel=1e-5)
        listed = found[:, :-1] > 0
        assert found[:, :-1][listed] == pytest.approx(exact[listed], rel=1e-5)


LISTS = scores_of([[0.5, 0.3], [0.6, 0.2]], [0, 1], ids=[[0, 1], [2, 1]])


def merged_lists(merge: Merge) -> tuple[dict[int, float], float]:
    found = merged_rows(
        LISTS, temper(LISTS, 1.0), row=np.array([0]), count=np.array([2]), merge=merge
    )
    assert found.ids is not None
    probs = np.exp(found.logprobs[0].astype(float))
    entries = {int(i): float(p) for i, p in zip(found.ids[0], probs, strict=True) if i >= 0}
    return entries, float(np.exp(found.log_tail[0]))


def test_the_union_of_the_lists_is_cut_back_and_the_rest_is_tail() -> None:
    # tokens 0, 1, 2 have .25, .25, .3: of the equal ones the smaller stays
    entries, tail = merged_lists("mean_prob")
    assert entries == pytest.approx({2: 0.3, 0: 0.25})
    assert tail == pytest.approx(0.2 + 0.25)


def test_a_token_that_one_row_does_not_list_has_no_geometric_mean_37() -> None:
    entries, tail = merged_lists("nemo")
    assert entries == pytest.approx({1: np.sqrt(0.3 * 0.2)})
    assert tail == pytest.approx(np.sqrt(0.2 * 0.2))


def test_merging_comes_before_folding() -> None:
    fold = np.array([0, 0, 3])  # 1 joins 0, 2 is null
    rows = teacher_rows(
        LISTS,
        align_bytes(np.array([2]), np.array([1, 2]), both_end_turn=False),
        student_ids=np.array([5]),
        trainable=np.ones(1, dtype=bool),
        options=PayloadOptions(temperature=1.0, merge="mean_prob", fold=fold),
    )
    found = dense(rows, 3)[0]
    assert found == pytest.approx([0.25, 0, 0, 0.45 + 0.3])
