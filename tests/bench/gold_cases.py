"""GOLD and ULD with a teacher that sends its whole vocabulary: problems, formulas, truncation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mopd.losses.base import Loss
from mopd.types import TeacherRows
from tests.bench import formulas, problems
from tests.helpers.losses import build_loss

Sizes = tuple[int, int]  # student and teacher vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class SortedProblem:
    """``formula`` takes logits of either precision; ``truncation`` what `top_u` costs."""

    problem: problems.CrossProblem
    rows: TeacherRows
    loss: Loss
    formula: Callable[[Tensor], Tensor]
    truncation: Callable[[], dict[str, float]] | None
    what: str


def hybrid(sizes: Sizes, rows: int, cache: Path, *, top_u: int | None) -> SortedProblem:
    """Matched JSD with a rest bin, and the sorted uncommon tokens; both weigh the same."""
    return _sorted(problems.cross_problem(sizes, rows, cache), top_u, weights=(0.5, 0.5))


def uld(sizes: Sizes, rows: int, cache: Path, *, top_u: int | None) -> SortedProblem:
    """Both vocabularies sorted, nothing matched."""
    problem = problems.nothing_common(problems.cross_problem(sizes, rows, cache))
    return _sorted(problem, top_u, weights=(0.0, 1.0))


def _sorted(
    problem: problems.CrossProblem, top_u: int | None, *, weights: tuple[float, float]
) -> SortedProblem:
    common = problem.shard.common
    teacher = problems.dense_teacher(problem, seed=7)
    rows = problems.dense_rows(problem, teacher)
    position = torch.from_numpy(rows.position)

    def formula(logits: Tensor) -> Tensor:
        return formulas.dense_gold(
            logits[position],
            teacher.to(logits.dtype),
            common,
            beta=0.5,
            weights=weights,
            top_u=top_u,
        )

    def truncation() -> dict[str, float]:
        return formulas.truncation(problem.logits[position], teacher, common, top_u or 0)

    return SortedProblem(
        problem=problem,
        rows=rows,
        loss=build_loss("gold", problem.shard, beta=0.5, weights=weights, top_u=top_u),
        formula=formula,
        truncation=truncation if top_u else None,
        what=f"dense teacher, its softmax included, {top_u or 'all'} sorted",
    )
