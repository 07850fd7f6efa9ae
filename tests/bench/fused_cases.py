"""Rows that start from hidden states: output layer and loss together, no whole logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mopd.losses.divergence import Divergence
from mopd.losses.head import DistillationHead, TeacherTerm
from mopd.losses.kl import KlLoss
from mopd.losses.vocab import VocabShard
from mopd.types import TeacherRows
from tests.bench import formulas, problems
from tests.bench.cases import SLICE, Case, Run, Shape
from tests.helpers.losses import step_of

HIDDEN = 128
JSD = Divergence(kind="jsd", beta=0.5)


def factors(shape: Shape, width: int = HIDDEN) -> tuple[Tensor, Tensor]:
    """Hidden states [rows, width] and output weight [vocab, width]; each row likes one token."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape.vocab, width, generator=generator)
    likely = torch.randint(shape.vocab, (shape.rows,), generator=generator)
    hidden = torch.randn(shape.rows, width, generator=generator).mul_(2.0 * width**-0.5)
    return hidden.add_(weight[likely] * (14.0 / width)), weight


def together(hidden: Tensor, weight: Tensor, value: Callable[[Tensor, Tensor], Tensor]) -> Run:
    """Forward and backward; both gradients as one flat tensor, that of ``hidden`` first."""

    def run() -> tuple[Tensor, Tensor]:
        leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
        total = value(*leaves)
        gradients = torch.autograd.grad(total, leaves)
        return total.detach(), torch.cat([gradient.flatten() for gradient in gradients])

    return run


def exact(hidden: Tensor, weight: Tensor, value: Callable[[Tensor, slice], Tensor]) -> Run:
    """The same in float64, a few rows at a time, for a formula on logits that is a sum of rows."""

    def run() -> tuple[Tensor, Tensor]:
        total, of_hidden = torch.zeros((), dtype=torch.float64), []
        of_weight = torch.zeros(weight.shape, dtype=torch.float64)
        for begin in range(0, len(hidden), SLICE):
            cut = slice(begin, begin + SLICE)
            leaves = [x.double().requires_grad_() for x in (hidden[cut], weight)]
            part = value(leaves[0] @ leaves[1].t(), cut)
            upper, lower = torch.autograd.grad(part, leaves)
            total, of_weight = total + part.detach(), of_weight + lower
            of_hidden.append(upper)
        return total, torch.cat([*of_hidden, of_weight]).flatten()

    return run


def through_linear_head(hidden: Tensor, weight: Tensor, loss: Any, rows: TeacherRows) -> Run:
    """`DistillationHead.from_hidden` with one teacher of weight 1."""
    size = len(weight)
    head = DistillationHead(
        terms={"t": TeacherTerm(loss=loss, weight=1.0, projection=None)},
        shard=VocabShard(start=0, size=size, vocab_size=size),
    )
    micro, batch = step_of(rows, len(hidden))
    return together(hidden, weight, lambda h, w: head.from_hidden(h[None], w, micro, batch).total)


def fused_jsd(shape: Shape, cache: Path) -> Case:
    """JSD 0.5 from dense teacher logits, which both sides are given."""
    hidden, weight = factors(shape)
    teacher = problems.near(hidden @ weight.t(), seed=1)
    no_tail = np.full(shape.rows, -np.inf, dtype=np.float32)
    rows = problems.rows_of(None, teacher.numpy(), no_tail)
    return Case(
        ours=through_linear_head(
            hidden, weight, KlLoss(divergence=JSD, temperature=1.0, value_scale=1.0), rows
        ),
        baseline=together(hidden, weight, lambda h, w: formulas.jsd(h @ w.t(), teacher, 0.5)),
        reference=exact(hidden, weight, lambda z, cut: formulas.jsd(z, teacher[cut].double(), 0.5)),
        tensor_bytes=teacher.nbytes,
        work=f"{shape.rows} x {HIDDEN} x {shape.vocab}, dense teacher, its softmax included",
        baseline_name="matmul + log_softmax + JSD under autograd",
    )
