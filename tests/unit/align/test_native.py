"""Rows over the student's own tokens: inside chunks, and carried over from the teacher's rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mopd.align.boundaries import align_bytes
from mopd.align.interior import Interior
from mopd.align.payload import PayloadOptions, teacher_rows
from mopd.align.pull import Pieces
from mopd.projection import ProjectionOptions
from mopd.projection.build import teacher_pieces
from mopd.types import TeacherRows, TeacherScores
from tests.helpers.payloads import Problem, native_dense, random_problem

VOCABULARIES = [
    ([], ["ab", "abc", "bca", "abab"], "abc"),
    (["ab", "ca"], ["abc", "bca", "abcab", "ca"], "abc"),
    (["ab"], [], "abc"),
]


def interior_of(problem: Problem, asked: list[bytes] | None = None) -> Interior:
    def first(data: bytes) -> int:
        if asked is not None:
            asked.append(data)
        ids = problem.student.encode(data)
        return ids[0] if ids else -1

    return Interior(
        student_bytes=problem.student.token_bytes,
        teacher_bytes=problem.teacher.token_bytes,
        first_token=first,
    )


def by_hand(
    problem: Problem, scores: TeacherScores, ids: np.ndarray
) -> dict[int, tuple[dict[int, float], float, float]]:
    """Position inside a chunk -> (next student token -> mass, its sum, all that fits)."""
    a, b = problem.alignment.student_starts, problem.alignment.teacher_starts
    found = {}
    for chunk in range(problem.alignment.num_chunks):
        for position in range(a[chunk] + 1, a[chunk + 1]):
            u = b"".join(
                problem.student.token_bytes[t] for t in problem.student_ids[a[chunk] : position]
            )
            mass: dict[int, float] = {}
            fits = 0.0
            logs = scores.topk_logprobs[b[chunk]]
            for token, log in zip(ids[b[chunk]].tolist(), logs.tolist(), strict=True):
                data = problem.teacher.token_bytes[token]
                if data.startswith(u) and len(data) > len(u):
                    first = problem.student.encode(data[len(u) :])[0]
                    mass[first] = mass.get(first, 0.0) + np.exp(log)
                    fits += np.exp(log)
                elif data and u.startswith(data):
                    fits += np.exp(log)
            found[position] = (mass, sum(mass.values()), fits)
    return found


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("number", range(len(VOCABULARIES)))
def test_interior_rows_are_what_the_boundary_row_says_of_the_rest(number: int, whole: bool) -> None:
    problem = random_problem(*VOCABULARIES[number], seed=number)
    scores = problem.scores if whole else problem.listed(8)
    ids = scores.topk_ids
    if ids is None:
        ids = np.tile(np.arange(problem.teacher.size), (len(scores.token_ids), 1))
    asked: list[bytes] = []
    interior = interior_of(problem, asked)
    options = PayloadOptions(temperature=1.0, fold=problem.projection.fold, interior=interior)
    rows = problem.rows(scores, options)
    expected = by_hand(problem, scores, ids)
    kept = {p: e for p, e in expected.items() if e[1] >= 1e-3}
    assert rows.native_position.tolist() == sorted(kept)
    found = native_dense(rows, problem.student.size)
    for row, position in zip(found, rows.native_position.tolist(), strict=True):
        mass, total, _ = kept[position]
        listed = {int(t): float(row[t]) for t in np.flatnonzero(row)}
        assert listed == pytest.approx({t: m / total for t, m in mass.items()}, rel=1e-5)
    num_asked = len(asked)
    report: dict[str, tuple[float, float]] = {}
    teacher_rows(
        scores,
        problem.alignment,
        student_ids=problem.student_ids,
        trainable=np.ones(len(problem.student_ids), dtype=bool),
        options=options,
        report=report,
    )
    covered, count = report["interior_coverage"]
    shares = [z / fits if fits else 0.0 for _, z, fits in expected.values()]
    assert (covered, count) == (pytest.approx(sum(shares), abs=1e-5), len(shares))
    assert len(asked) == num_asked  # every place inside a teacher token is asked for once
    assert number == 2 or 0 < covered < count


def test_interior_rows_leave_out_what_is_not_trained_and_what_is_too_small() -> None:
    problem = random_problem(*VOCABULARIES[0], seed=0)
    options = PayloadOptions(temperature=1.0, interior=interior_of(problem))
    every = problem.rows(problem.scores, options)
    mask = np.ones(len(problem.student_ids), dtype=bool)
    mask[every.native_position[1]] = False
    some = teacher_rows(
        problem.scores,
        problem.alignment,
        student_ids=problem.student_ids,
        trainable=mask,
        options=options,
    )
    assert set(every.native_position) - set(some.native_position) == {every.native_position[1]}
    assert options.interior is not None
    strict = replace(options, interior=replace(options.interior, min_mass=0.5))
    fewer = problem.rows(problem.scores, strict)
    assert 0 < len(fewer.native_position) < len(every.native_position)


def test_interior_rows_use_the_list_before_it_is_folded() -> None:
    problem = random_problem(*VOCABULARIES[0], seed=2)
    plain = PayloadOptions(temperature=1.0, interior=interior_of(problem))
    folded = replace(plain, fold=problem.projection.fold)
    assert (problem.projection.fold != np.arange(problem.teacher.size)).any()
    scores = problem.listed(8)
    found, expected = problem.rows(scores, folded), problem.rows(scores, plain)
    assert (found.native_ids == expected.native_ids).all()
    assert (found.native_logprobs == expected.native_logprobs).all()


def pieces_of(problem: Problem, *, decay: float, top_k: int) -> Pieces:
    spelled, _ = teacher_pieces(
        problem.student, problem.teacher, ProjectionOptions(max_length=4, gamma=0.0)
    )
    return Pieces(
        piece_ptr=np.concatenate([[0], np.cumsum([len(ids) for ids in spelled])]),
        piece=np.array([piece for ids in spelled for piece in ids], dtype=np.int32),
        decay=decay,
        top_k=top_k,
    )


def pull_by_hand(problem: Problem, pieces: Pieces, *, decayed: bool) -> np.ndarray:
    """[C, V_S], normalised, from whole rows."""
    probs = np.exp(problem.scores.topk_logprobs.astype(float))
    found = np.zeros((problem.alignment.num_chunks, problem.student.size))
    for c, begin in enumerate(problem.alignment.teacher_starts[:-1]):
        for s in range(problem.student.size):
            for j, piece in enumerate(
                pieces.piece[pieces.piece_ptr[s] : pieces.piece_ptr[s + 1]].tolist()
            ):
                row = begin + j if decayed else begin
                if row < len(probs):
                    found[c, s] += pieces.decay**j * probs[row, piece]
    return found / found.sum(1, keepdims=True)


def pulled(
    problem: Problem, scores: TeacherScores, pieces: Pieces, *, decayed: bool
) -> TeacherRows:
    if decayed:
        options = PayloadOptions(temperature=1.0, merge="decayed", pieces=pieces)
    else:
        options = PayloadOptions(temperature=1.0, direction="pull", pieces=pieces)
    return problem.rows(scores, options)


PULLED = (["abc", "ab", "cab"], ["ab"], "abc")


@pytest.mark.parametrize("decayed", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1, 0.7])
def test_pulling_by_the_formula(decay: float, decayed: bool) -> None:
    problem = random_problem(*PULLED, seed=1)
    pieces = pieces_of(problem, decay=decay, top_k=problem.student.size)
    expected = pull_by_hand(problem, pieces, decayed=decayed)
    for scores in (problem.scores, problem.listed(problem.teacher.size)):
        rows = pulled(problem, scores, pieces, decayed=decayed)
        assert (rows.native_position == rows.position).all()
        assert native_dense(rows, problem.student.size)[:, :-1] == pytest.approx(expected, abs=1e-6)
        assert rows.topk_ids is not None and rows.topk_ids.shape == (len(rows.position), 0)
        assert len(rows.chunk_logprob) == len(rows.position)


@pytest.mark.parametrize("decayed", [False, True])
def test_pulled_rows_are_cut_and_the_rest_is_tail(decayed: bool) -> None:
    problem = random_problem(*PULLED, seed=2)
    expected = pull_by_hand(problem, pieces_of(problem, decay=0.3, top_k=1), decayed=decayed)
    pieces = pieces_of(problem, decay=0.3, top_k=5)
    largest = np.sort(expected, axis=1)[:, ::-1][:, :5]
    for scores in (problem.scores, problem.listed(problem.teacher.size)):
        rows = pulled(problem, scores, pieces, decayed=decayed)
        probs = np.sort(np.exp(rows.native_logprobs), axis=1)[:, ::-1]
        assert probs == pytest.approx(largest, abs=1e-6)
        assert np.exp(rows.native_log_tail) == pytest.approx(1 - largest.sum(1), abs=1e-5)
    short = pulled(problem, problem.listed(6), pieces, decayed=decayed)
    assert native_dense(short, problem.student.size).sum(1) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("decayed", [False, True])
def test_equal_tokenizers_pull_the_teachers_own_row_39(decayed: bool) -> None:
    problem = random_problem(["ab"], ["ab"], "abc", seed=0)
    pieces = pieces_of(problem, decay=0.1, top_k=10)
    scores = problem.listed(6)
    rows = pulled(problem, scores, pieces, decayed=decayed)
    plain = problem.rows(scores, PayloadOptions(temperature=1.0))
    order = np.argsort(-plain.topk_logprobs, axis=1, kind="stable")
    assert plain.topk_ids is not None
    assert (rows.native_ids[:, :6] == np.take_along_axis(plain.topk_ids, order, axis=1)).all()
    listed = np.take_along_axis(plain.topk_logprobs, order, axis=1)
    assert rows.native_logprobs[:, :6] == pytest.approx(listed, abs=1e-6)
    assert rows.native_log_tail == pytest.approx(plain.log_tail, abs=1e-5)


def test_pulling_one_row_39() -> None:
    # p_T = (c .1, a .5, b .2); abc is spelled a, b, c: .5 + .1 * .2 + .01 * .1 = .521
    with np.errstate(divide="ignore"):
        scores = TeacherScores(
            teacher="t",
            model_fingerprint="f",
            token_ids=np.array([1], dtype=np.int32),
            byte_ends=np.array([1]),
            logprobs=np.log(np.array([0.5], dtype=np.float32)),
            topk_ids=np.array([[0, 1, 2]], dtype=np.int32),
            topk_logprobs=np.log(np.array([[0.1, 0.5, 0.2]], dtype=np.float32)),
            log_tail=np.log(np.array([0.0], dtype=np.float32)),
            lse=None,
            valid=np.ones(1, dtype=bool),
        )
    pieces = Pieces(
        piece_ptr=np.array([0, 3, 4]), piece=np.array([1, 2, 0, 2], np.int32), decay=0.1, top_k=9
    )
    rows = teacher_rows(
        scores,
        align_bytes(np.array([1]), np.array([1]), both_end_turn=False),
        student_ids=np.array([0]),
        trainable=np.ones(1, dtype=bool),
        options=PayloadOptions(temperature=1.0, direction="pull", pieces=pieces),
    )
    total = 0.521 + 0.2
    assert native_dense(rows, 2)[0] == pytest.approx([0.521 / total, 0.2 / total, 0.0], abs=1e-6)


def test_failed_rows_contribute_nothing_to_a_decayed_sum() -> None:
    problem = random_problem(*PULLED, seed=3)
    pieces = pieces_of(problem, decay=0.5, top_k=problem.student.size)
    starts = problem.alignment.teacher_starts
    later = int(starts[2])  # the boundary row of chunk 2, and a later row of the ones before
    failed = replace(problem.scores, valid=np.arange(len(problem.scores.valid)) != later)
    found = pulled(problem, failed, pieces, decayed=True)
    logs = problem.scores.topk_logprobs.copy()
    logs[later] = -np.inf
    without = replace(problem, scores=replace(problem.scores, topk_logprobs=logs))
    with np.errstate(invalid="ignore"):  # nothing is left of chunk 2 itself
        expected = pull_by_hand(without, pieces, decayed=True)
    kept = [c for c in range(problem.alignment.num_chunks) if c != 2]
    assert native_dense(found, problem.student.size)[:, :-1] == pytest.approx(
        expected[kept], abs=1e-6
    )


def test_interior_and_pulled_rows_share_one_order() -> None:
    problem = random_problem(*VOCABULARIES[1], seed=1)
    pieces = pieces_of(problem, decay=0.1, top_k=3)
    options = PayloadOptions(
        temperature=1.0, direction="pull", pieces=pieces, interior=interior_of(problem)
    )
    rows = problem.rows(problem.scores, options)
    assert (np.diff(rows.native_position) > 0).all()
    assert set(rows.position) < set(rows.native_position)
    assert np.isneginf(rows.native_logprobs[rows.native_ids < 0]).all()


def test_a_pull_without_pieces_or_of_merged_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="pieces"):
        PayloadOptions(temperature=1.0, direction="pull")
    with pytest.raises(ValueError, match="pieces"):
        PayloadOptions(temperature=1.0, merge="decayed")
    with pytest.raises(ValueError, match="mean_prob"):
        PayloadOptions(temperature=1.0, direction="pull", merge="mean_prob")


def test_every_option_of_a_response_that_cannot_be_spelled() -> None:
    problem = random_problem(*VOCABULARIES[0], seed=0)
    pieces = pieces_of(problem, decay=0.1, top_k=3)
    none = np.zeros(0, dtype=np.int32)
    for scores in (problem.scores, problem.listed(4)):
        empty = replace(
            scores,
            token_ids=none,
            byte_ends=none.astype(np.int64),
            logprobs=scores.logprobs[:0],
            topk_ids=None if scores.topk_ids is None else scores.topk_ids[:0],
            topk_logprobs=scores.topk_logprobs[:0],
            log_tail=scores.log_tail[:0],
            valid=scores.valid[:0],
        )
        nowhere = replace(
            problem,
            alignment=align_bytes(
                problem.student.byte_ends(problem.student_ids), empty.byte_ends, both_end_turn=False
            ),
        )
        fold = problem.projection.fold
        for options in (
            PayloadOptions(temperature=2.0 if scores.topk_ids is None else 1.0, fold=fold),
            PayloadOptions(temperature=1.0, fold=fold, merge="mean_prob"),
            PayloadOptions(temperature=1.0, merge="bayesian"),
            PayloadOptions(temperature=1.0, columns=np.array([1, 2]), fold=fold),
            PayloadOptions(temperature=1.0, direction="pull", pieces=pieces),
            PayloadOptions(temperature=1.0, merge="decayed", pieces=pieces),
            PayloadOptions(temperature=1.0, interior=interior_of(problem)),
        ):
            rows = nowhere.rows(empty, options)
            assert len(rows.position) == len(rows.native_position) == len(rows.topk_logprobs) == 0
