"""Folded and cut rows against sums over dictionaries; whole rows against listed ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mopd.align.fold import column_map, fold_rows, keep_columns
from mopd.align.paths import PathOptions
from mopd.align.payload import PayloadOptions, column_peaks, shared_columns
from mopd.types import TeacherRows, TeacherScores
from tests.helpers.payloads import MAX_LENGTH, Problem, dense, random_problem

SIZE = 40
VOCABULARIES = [
    (["13", "12", "123"], ["3x", "13x"], "123x"),
    (["vi", "vibi", " vibi", " x"], [" vi", "bi"], "vibx "),
    (["ab", "abc"], ["bc", "abc"], "abc"),
]


def random_rows(
    rows: int, width: int, *, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """ids with padding, log-probabilities, tails, and a fold with null and resting columns."""
    generator = np.random.default_rng(seed)
    fold = np.where(generator.random(SIZE) < 0.6, np.arange(SIZE), generator.integers(0, 41, SIZE))
    ids = np.stack([generator.permutation(SIZE)[:width] for _ in range(rows)]).astype(np.int32)
    logs = np.log(np.stack([generator.dirichlet(np.full(width + 1, 0.3)) for _ in range(rows)]))
    pad = generator.random((rows, width)) < 0.1
    ids[pad], logs[:, :width][pad] = -1, -np.inf
    return ids, logs[:, :width].astype(np.float32), logs[:, width].astype(np.float32), fold


def folded_by_hand(
    ids: np.ndarray, logs: np.ndarray, tail: float, fold: np.ndarray
) -> tuple[dict[int, float], float]:
    found: dict[int, float] = {}
    rest = float(np.exp(np.float64(tail)))
    for token, log in zip(ids.tolist(), logs.tolist(), strict=True):
        if token < 0:
            continue
        if fold[token] == SIZE:
            rest += np.exp(log)
        else:
            found[int(fold[token])] = found.get(int(fold[token]), 0.0) + np.exp(log)
    return found, rest


@pytest.mark.parametrize("width", [1, 2, 12, 33])
def test_folding_is_a_sum_over_what_meets(width: int) -> None:
    ids, logs, tail, fold = random_rows(60, width, seed=width)
    out_ids, out, out_tail = fold_rows(ids, logs, tail, fold)
    for r in range(len(ids)):
        expected, rest = folded_by_hand(ids[r], logs[r], tail[r], fold)
        listed = out_ids[r] >= 0
        assert len(set(out_ids[r][listed])) == listed.sum()
        found = dict(zip(out_ids[r][listed].tolist(), np.exp(out[r][listed]), strict=True))
        assert found == pytest.approx(expected, rel=1e-6)
        assert np.isneginf(out[r][~listed]).all()
        assert np.exp(out_tail[r]) == pytest.approx(rest, rel=1e-6)


def test_rows_without_anything_to_fold_are_left_as_they_are() -> None:
    fold = np.arange(SIZE)
    fold[7] = 3
    ids = np.array([[5, 4, 9], [3, 7, 1], [8, -1, 2], [1, 2, 3]], dtype=np.int32)
    logs = np.log(np.full((4, 3), 0.25, dtype=np.float32))
    logs[2, 1] = -np.inf
    out_ids, out, tail = fold_rows(ids, logs, np.log(np.full(4, 0.25, np.float32)), fold)
    others = [0, 2, 3]
    assert (out_ids[others] == ids[others]).all() and (out[others] == logs[others]).all()
    assert sorted(out_ids[1].tolist()) == [-1, 1, 3]
    assert ids[1].tolist() == [3, 7, 1]  # the input is not written to
    assert np.exp(tail) == pytest.approx(0.25)


def test_what_does_not_meet_keeps_its_bits() -> None:
    fold = np.arange(SIZE)
    fold[0] = 1
    logs = np.random.default_rng(0).normal(size=(1, 10)).astype(np.float32) - 90.0
    ids = np.array([[0, *range(2, 11)]], dtype=np.int32)
    out_ids, out, _ = fold_rows(ids, logs, np.zeros(1, np.float32), fold)
    assert (out[0][np.argsort(out_ids[0])] == logs[0]).all()


def test_columns_that_are_not_kept_join_the_tail() -> None:
    ids, logs, tail, _ = random_rows(20, 12, seed=0)
    columns = np.array([0, 3, 4, 11, 30], dtype=np.int32)
    out_ids, out, out_tail = keep_columns(ids, logs, tail, columns)
    lost = np.where(np.isin(ids, columns), 0.0, np.exp(logs.astype(float))).sum(1)
    assert np.exp(out_tail) == pytest.approx(np.exp(tail) + lost, rel=1e-5)
    assert (out_ids == np.where(np.isin(ids, columns), ids, -1)).all()
    assert (out[out_ids >= 0] == logs[out_ids >= 0]).all()


@pytest.mark.parametrize("columns", [None, np.array([0, 1, 5, 20, 39], dtype=np.int32)])
@pytest.mark.parametrize("folds", [True, False])
def test_whole_rows_go_where_listed_rows_go(columns: np.ndarray | None, folds: bool) -> None:
    generator = np.random.default_rng(3)
    *_, fold = random_rows(1, 1, seed=3)
    fold = fold if folds else np.arange(SIZE)
    logs = np.log(generator.dirichlet(np.full(SIZE, 0.3), size=15)).astype(np.float32)
    ids = np.tile(np.arange(SIZE, dtype=np.int32), (15, 1))
    tail = np.full(15, -np.inf, dtype=np.float32)
    expected = (ids, logs, tail)
    if columns is not None:
        expected = keep_columns(*expected, columns)
    expected = fold_rows(*expected, fold)
    found = column_map(SIZE, fold=fold, columns=columns)
    out, out_tail = found.apply(logs)
    assert (np.diff(found.ids) > 0).all()
    for r in range(15):
        listed = expected[0][r] >= 0
        by_id = dict(zip(expected[0][r][listed].tolist(), expected[1][r][listed], strict=True))
        assert dict(zip(found.ids.tolist(), out[r], strict=True)) == pytest.approx(by_id, abs=1e-6)
    assert np.exp(out_tail) == pytest.approx(np.exp(expected[2]), abs=1e-6)


def path_options(problem: Problem) -> PathOptions:
    projection = problem.projection
    return PathOptions(trie=projection.trie, fold=projection.fold, max_length=MAX_LENGTH)


def same_paths(found: TeacherRows, expected: TeacherRows) -> None:
    assert len(expected.path_position) > 5
    for name in ("path_position", "path_offsets", "path_entry_slot", "path_entry"):
        assert (getattr(found, name) == getattr(expected, name)).all(), name
    for name in ("path_weight", "path_target"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=1e-6), name


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("number", range(len(VOCABULARIES)))
def test_whole_rows_are_a_list_of_everything_44(number: int, temperature: float) -> None:
    problem = random_problem(*VOCABULARIES[number], seed=number)
    size = problem.teacher.size
    scores = problem.scores
    lse = np.log(np.exp(scores.topk_logprobs.astype(float) / temperature).sum(1))
    complete = replace(problem.listed(size), lse=np.stack([np.zeros_like(lse), lse], axis=1))
    # a constant per row does not matter
    shifted = replace(scores, topk_logprobs=scores.topk_logprobs + 3.0 * scores.byte_ends[:, None])
    options = PayloadOptions(
        temperature=temperature, fold=problem.projection.fold, path=path_options(problem)
    )
    expected = problem.rows(complete, options)
    for each in (scores, shifted):
        found = problem.rows(each, options)
        assert found.topk_ids is not None and found.topk_ids.ndim == 1
        assert dense(found, size) == pytest.approx(dense(expected, size), abs=2e-6)
        same_paths(found, expected)


def test_whole_rows_stay_whole_where_nothing_folds() -> None:
    problem = random_problem(*VOCABULARIES[0], seed=0)
    fold = np.arange(problem.teacher.size)
    rows = problem.rows(problem.scores, PayloadOptions(temperature=3.0, fold=fold))
    assert rows.topk_ids is None and np.isneginf(rows.log_tail).all()
    starts = problem.alignment.teacher_starts[:-1]
    assert (rows.topk_logprobs == problem.scores.topk_logprobs[starts]).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_shared_columns_of_whole_rows_are_tempered_over_the_whole_row(temperature: float) -> None:
    problem = random_problem(*VOCABULARIES[0], seed=1)
    columns = shared_columns(column_peaks([problem.scores], problem.teacher.size), 6)
    rows = problem.rows(problem.scores, PayloadOptions(temperature=temperature, columns=columns))
    assert (rows.topk_ids == columns).all()
    scaled = problem.scores.topk_logprobs.astype(float) / temperature
    probs = np.exp(scaled - np.logaddexp.reduce(scaled, axis=1)[:, None])
    expected = probs[problem.alignment.teacher_starts[:-1]]
    assert np.exp(rows.topk_logprobs) == pytest.approx(expected[:, columns], abs=1e-6)
    assert np.exp(rows.log_tail) == pytest.approx(1 - expected[:, columns].sum(1), abs=1e-6)


def scores_of(logs: list[list[float]], ids: list[list[int]] | None) -> TeacherScores:
    size = len(logs)
    return TeacherScores(
        teacher="t",
        model_fingerprint="f",
        token_ids=np.zeros(size, dtype=np.int32),
        byte_ends=np.arange(size),
        logprobs=np.zeros(size, dtype=np.float32),
        topk_ids=None if ids is None else np.array(ids, dtype=np.int32),
        topk_logprobs=np.array(logs, dtype=np.float32),
        log_tail=np.full(size, -np.inf, dtype=np.float32),
        lse=None,
        valid=np.ones(size, dtype=bool),
    )


def columns_of(scores: list[TeacherScores], k: int, size: int = 4) -> np.ndarray:
    return shared_columns(column_peaks(scores, size), k)


def test_shared_columns_are_those_with_the_highest_maximum() -> None:
    with np.errstate(divide="ignore"):
        first = scores_of(np.log([[0.7, 0.1, 0.1, 0.1], [0.1, 0.1, 0.2, 0.6]]).tolist(), None)
        other = scores_of(np.log([[0.0, 0.5, 0.5, 0.0]]).tolist(), None)
    assert columns_of([first], 2).tolist() == [0, 3]
    assert columns_of([first, other], 3).tolist() == [0, 1, 3]  # 1 and 2 tie
    moved = replace(first, topk_logprobs=first.topk_logprobs - np.array([[50.0], [0.0]]))
    assert columns_of([moved], 2).tolist() == [0, 3]  # rows compare
    listed = scores_of(np.log([[0.6, 0.3], [0.5, 0.4]]).tolist(), [[9, 2], [2, -1]])
    assert columns_of([listed], 5, size=10).tolist() == [2, 9]
    failed = replace(first, valid=np.array([False, True]))
    assert columns_of([failed], 1).tolist() == [3]
