"""Losses on one rank in a line each, for identities that must hold (docs/losses.md, oracles)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mopd.losses.divergence import Divergence
from mopd.losses.vocab import VocabShard
from mopd.projection import Projection, ProjectionShard
from mopd.types import TeacherRows
from tests.helpers.losses import build_loss, run_head
from tests.helpers.random_losses import problem

CPU = torch.device("cpu")
KINDS = ("forward_kl", "reverse_kl", "jsd", "mixed", "skew_kl", "skew_reverse_kl", "tvd")


def run(
    name: str,
    logits: Tensor,
    rows: TeacherRows,
    projection: Projection,
    *,
    block_size: int = 512,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """(value, gradient)."""
    size = logits.shape[1]
    local = ProjectionShard(projection, start=0, end=size, device=CPU)
    return run_head(
        build_loss(name, local, **options),
        logits,
        rows,
        shard=VocabShard(start=0, size=size, vocab_size=size),
        projection=local,
        block_size=block_size,
    )


def run_kl(logits: Tensor, rows: TeacherRows, kind: Any, **options: Any) -> tuple[Tensor, Tensor]:
    return run(
        "kl", logits, rows, problem().projection, divergence=Divergence(kind=kind, **options)
    )


def same(found: Sequence[Tensor], expected: Sequence[Tensor], *, tolerance: float = 1e-10) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def dense(projection: Projection) -> np.ndarray:
    """W [student, teacher + 1]."""
    weights = np.zeros((projection.student_size, projection.teacher_size + 1))
    row = np.repeat(np.arange(projection.student_size), np.diff(projection.crow))
    weights[row, projection.col] = projection.val
    return weights


def random_rows(size: int, count: int = 4, *, seed: int = 0) -> tuple[Tensor, np.ndarray]:
    """Student logits and teacher probabilities [count, size]."""
    generator = np.random.default_rng(seed)
    logits = torch.as_tensor(generator.normal(size=(count, size)) * 2.0)
    return logits, generator.dirichlet(np.ones(size), size=count)
