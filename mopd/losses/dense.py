"""Divergences on the whole vocabulary, with a teacher that has the student's columns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mopd.losses.base import RowBlock
from mopd.losses.divergence import TINY, Divergence
from mopd.losses.softmax import rows_of
from mopd.losses.vocab import VocabShard

LOG_TINY = math.log(TINY)


class _Options(Protocol):
    @property
    def divergence(self) -> Divergence: ...

    @property
    def temperature(self) -> float: ...


def add_dense(
    logits: Tensor,
    out: Tensor,
    rows: RowBlock,
    options: _Options,
    shard: VocabShard,
    *,
    factor: float,
) -> Tensor:
    """``out`` [n, V_local] becomes ``factor`` times the gradient in ``logits / temperature``.

    ``rows.topk_logprobs`` [r, V] are the teacher's logits, log-probabilities or anything between:
    a constant per row cancels. Returns the weighted divergences [r].
    """
    columns = slice(shard.start, shard.start + shard.size)
    theirs = rows.topk_logprobs[:, columns]
    if options.temperature != 1.0:
        theirs, logits = theirs / options.temperature, logits / options.temperature
    teacher = shard.softmax(theirs, out=torch.empty_like(theirs))
    probs = shard.softmax(logits, out=out)
    block = _Block(
        teacher=teacher,
        student=rows_of(probs, rows.boundary),
        log_teacher=theirs - shard.lse_of(theirs, teacher)[:, None],
        shard=shard,
    )
    block.log_teacher.clamp_min_(LOG_TINY)
    own = rows_of(logits, rows.boundary)
    constant = shard.lse_of(own, block.student)[:, None]
    value, grad = _value_and_gradient(block, own, constant, options.divergence)
    grad.mul_((rows.weight * factor)[:, None])
    if block.student is not probs:
        out.zero_().index_copy_(0, rows.boundary, grad)
    return value * rows.weight


@dataclass(frozen=True, slots=True)
class _Block:
    """[r, V_local] each; all but ``teacher`` may be overwritten."""

    teacher: Tensor
    student: Tensor
    log_teacher: Tensor
    shard: VocabShard

    def mean(self, probs: Tensor, values: Tensor) -> Tensor:
        """[r] sum of ``probs * values`` over all shards."""
        return self.shard.sum(torch.linalg.vecdot(probs, values))


def _value_and_gradient(
    block: _Block, logits: Tensor, constant: Tensor, divergence: Divergence
) -> tuple[Tensor, Tensor]:
    """[r] values and the gradient in the logits, in the room of ``block.student``.

    log Q is ``logits - constant``. The kinds in use on large vocabularies have forms that take no
    logarithm, or one, per column.
    """
    kind, beta = divergence.kind, divergence.beta
    if kind == "jsd" and beta in (0.0, 1.0):
        kind = "forward_kl" if beta == 0.0 else "reverse_kl"
    student = block.student
    finite = torch.finfo(student.dtype).max  # 0 times infinity is not 0
    if kind == "forward_kl":
        gap = block.log_teacher.sub_(logits).add_(constant).clamp_max_(finite)
        return block.mean(block.teacher, gap), student.sub_(block.teacher)
    if kind == "reverse_kl":
        gap = block.log_teacher.sub_(logits).add_(constant).neg_().clamp_min_(-finite)
        value = block.mean(student, gap)
        return value, student.mul_(gap.sub_(value[:, None]))
    if kind == "jsd":
        mixture = torch.lerp(student, block.teacher, beta).clamp_min_(TINY).log_()
        teacher_part = block.mean(block.teacher, block.log_teacher.sub_(mixture))
        gap = torch.sub(logits, constant, out=block.log_teacher).sub_(mixture)
        gap.clamp_min_(-finite)
        student_part = block.mean(student, gap)
        grad = student.mul_(gap.sub_(student_part[:, None])).mul_(1.0 - beta)
        return beta * teacher_part + (1.0 - beta) * student_part, grad
    if divergence.kind == "akl" and block.shard.group is not None:
        raise ValueError("akl over a whole sharded vocabulary is not offered; use a top-k")
    contribution, slope = divergence.bins(block.teacher, student)
    mean = block.mean(student, slope)
    value = block.shard.sum(contribution.sum(dim=-1))
    return value, student.mul_(slope.sub_(mean[:, None]))
