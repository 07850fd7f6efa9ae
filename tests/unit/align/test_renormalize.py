"""Teacher mass that the student cannot express, dropped instead of joining the tail."""

from __future__ import annotations

import numpy as np
import pytest

from mopd.align.payload import PayloadOptions
from tests.helpers.payloads import random_problem

PROBLEM = random_problem(["ab", "abc"], ["bc", "cab"], "abc", seed=3)
FOLD = np.where(PROBLEM.projection.folded, PROBLEM.teacher.size, PROBLEM.projection.fold)


@pytest.mark.parametrize(("width", "temperature"), [(8, 1.0), (None, 1.0), (None, 2.0)])
def test_the_rest_is_divided_by_what_is_left(width: int | None, temperature: float) -> None:
    scores = PROBLEM.scores if width is None else PROBLEM.listed(width)
    joined = PROBLEM.rows(scores, PayloadOptions(temperature=temperature, fold=FOLD))
    dropped = PROBLEM.rows(
        scores, PayloadOptions(temperature=temperature, fold=FOLD, renormalize=True)
    )
    assert joined.topk_ids is not None and dropped.topk_ids is not None
    assert (joined.topk_ids == dropped.topk_ids).all()
    left = np.exp(dropped.topk_logprobs.astype(np.float64)).sum(-1)
    left += np.exp(dropped.log_tail.astype(np.float64))
    assert left == pytest.approx(np.ones(len(left)), abs=1e-5)
    kept = joined.topk_logprobs > -20
    gap = dropped.topk_logprobs[kept] - joined.topk_logprobs[kept]
    assert (gap >= -1e-6).all() and gap.max() > 0.05
    assert (dropped.log_tail <= joined.log_tail + 1e-6).all()
