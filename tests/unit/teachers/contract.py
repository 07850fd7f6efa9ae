"""What every teacher backend promises: `check_teacher` against a plain forward pass, or without.

A backend's test calls it with a factory; a real server needs only its URL (see `test_contract`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from mopd.teachers.base import Teacher, teacher_input
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Rollout, TeacherScores


@dataclass(frozen=True, kw_only=True)
class Case:
    """``reference(ids)`` [T - 1, V]: log-probabilities of the same model; None: not compared.

    ``same``: a teacher whose numbers are the same, with log-sum-exps where this one sends them.
    """

    teacher: Teacher
    student: ChatTokenizer
    rollouts: Sequence[Rollout]
    top_k: int
    tolerance: float
    reference: Callable[[Sequence[int]], np.ndarray] | None = None
    same: Teacher | None = None


def check_teacher(case: Case) -> None:
    """All checks, in one go."""
    found = case.teacher.score(case.rollouts)
    assert len(found) == len(case.rollouts)
    for rollout, scores in zip(case.rollouts, found, strict=True):
        check_shape(case, rollout, scores)
        check_numbers(case, scores)
        if case.reference is not None:
            check_reference(case, rollout, scores)
    if case.same is not None:
        for one, two in zip(found, case.same.score(case.rollouts), strict=True):
            check_same(case, one, two)
    check_repeatable(case, found)


def check_shape(case: Case, rollout: Rollout, scores: TeacherScores) -> None:
    tokenizer = case.teacher.tokenizer
    own = teacher_input(rollout, tokenizer, student=case.student)
    num, k = len(own.token_ids), min(case.top_k, tokenizer.vocabulary.size)
    assert scores.teacher == case.teacher.name and scores.model_fingerprint
    assert scores.token_ids.tolist() == own.token_ids.tolist()
    assert scores.byte_ends.tolist() == own.byte_ends.tolist()
    assert scores.topk_ids is not None
    assert scores.topk_ids.shape == scores.topk_logprobs.shape == (num, k)
    assert scores.logprobs.shape == scores.log_tail.shape == scores.valid.shape == (num,)
    assert scores.topk_ids.dtype == np.int32 and scores.valid.dtype == bool
    for array in (scores.logprobs, scores.topk_logprobs, scores.log_tail):
        assert array.dtype == np.float32
    assert scores.lse is None or scores.lse.shape == (num, 2)
    assert scores.valid.all()


def check_numbers(case: Case, scores: TeacherScores) -> None:
    assert scores.topk_ids is not None
    size = case.teacher.tokenizer.vocabulary.size
    assert (scores.topk_ids >= 0).all() and (scores.topk_ids < size).all()
    ranked = np.sort(scores.topk_ids, axis=1)
    assert (ranked[:, 1:] > ranked[:, :-1]).all()
    assert np.isfinite(scores.topk_logprobs).all() and np.isfinite(scores.logprobs).all()
    assert (np.diff(scores.topk_logprobs, axis=1) <= 0).all()
    listed = scores.topk_ids == scores.token_ids[:, None]
    where = listed.any(axis=1)
    assert scores.topk_logprobs[listed] == pytest.approx(scores.logprobs[where], abs=1e-6)
    assert (scores.logprobs[~where] <= scores.topk_logprobs[~where, -1] + 1e-5).all()
    mass = np.exp(scores.topk_logprobs.astype(np.float64)).sum(1) + np.exp(scores.log_tail)
    assert mass == pytest.approx(1.0, abs=1e-5)
    assert (scores.logprobs[~where] <= scores.log_tail[~where] + 1e-5).all()


def check_reference(case: Case, rollout: Rollout, scores: TeacherScores) -> None:
    assert case.reference is not None and scores.topk_ids is not None
    prompt = case.teacher.tokenizer.prompt_ids(rollout.prompt.messages)
    rows = case.reference([*prompt.tolist(), *scores.token_ids.tolist()])[len(prompt) - 1 :]
    top = -np.sort(-rows, axis=1)[:, : scores.topk_ids.shape[1]]
    listed = np.take_along_axis(rows, scores.topk_ids.astype(np.int64), axis=1)
    actual = rows[np.arange(len(rows)), scores.token_ids]
    assert scores.logprobs == pytest.approx(actual, abs=case.tolerance)
    assert scores.topk_logprobs == pytest.approx(top, abs=case.tolerance)
    assert scores.topk_logprobs == pytest.approx(listed, abs=case.tolerance)
    tail = 1.0 - np.exp(listed.astype(np.float64)).sum(axis=1)
    assert np.exp(scores.log_tail) == pytest.approx(tail, abs=max(case.tolerance, 1e-5))


def check_same(case: Case, one: TeacherScores, two: TeacherScores) -> None:
    """Every number; of tokens closer than the tolerance, either may come first."""
    assert one.topk_ids is not None and two.topk_ids is not None
    assert one.token_ids.tolist() == two.token_ids.tolist()
    assert one.logprobs == pytest.approx(two.logprobs, abs=case.tolerance)
    assert one.topk_logprobs == pytest.approx(two.topk_logprobs, abs=case.tolerance)
    assert np.exp(one.log_tail) == pytest.approx(np.exp(two.log_tail), abs=case.tolerance)
    assert (one.topk_ids == two.topk_ids).mean() > 0.98
    if one.lse is not None:
        assert one.lse == pytest.approx(two.lse, abs=case.tolerance)
        assert one.log_tail == pytest.approx(two.log_tail, abs=case.tolerance)
        assert one.model_fingerprint == two.model_fingerprint


def check_repeatable(case: Case, found: Sequence[TeacherScores]) -> None:
    """Order, batch mates and a second time change nothing."""
    backwards = case.teacher.score(case.rollouts[::-1])[::-1]
    alone = [case.teacher.score([rollout])[0] for rollout in case.rollouts]
    for other in (backwards, alone):
        for one, two in zip(found, other, strict=True):
            assert one.token_ids.tolist() == two.token_ids.tolist()
            assert one.logprobs == pytest.approx(two.logprobs, abs=case.tolerance)
            assert one.topk_logprobs == pytest.approx(two.topk_logprobs, abs=case.tolerance)
            assert one.model_fingerprint == two.model_fingerprint
    assert case.teacher.score([]) == []
