"""GOLD with a teacher that sends its whole vocabulary: both terms, one pass for the gradient."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from mopd.losses.base import LossSums, RowBlock, RowKl
from mopd.losses.divergence import Divergence
from mopd.losses.matched import LOG_TINY, CommonTokens, Matched, Pairs, matched_divergence
from mopd.losses.softmax import rows_of
from mopd.losses.sorted import SortedL1, largest, sorted_l1
from mopd.losses.vocab import VocabShard


class Options(Protocol):
    """What `GoldLoss` says of its terms."""

    @property
    def divergence(self) -> Divergence: ...

    @property
    def temperature(self) -> float: ...

    @property
    def weights(self) -> tuple[float, float]: ...

    @property
    def top_u(self) -> int | None: ...

    @property
    def rest_bin(self) -> bool: ...


def add_dense(
    logits: Tensor,
    out: Tensor,
    rows: RowBlock,
    options: Options,
    common: CommonTokens,
    *,
    shard: VocabShard,
    factor: float,
) -> LossSums:
    """``out`` [n, V_local] becomes ``factor`` times the gradient in ``logits / temperature``.

    ``rows.topk_logprobs`` [r, V_T] are the teacher's logits, log-probabilities or anything between:
    a constant per row cancels. Every shard has them whole and takes their softmax itself.
    """
    theirs = rows.topk_logprobs
    if options.temperature != 1.0:
        theirs, logits = theirs / options.temperature, logits / options.temperature
    teacher = _whole(theirs).softmax(theirs, out=torch.empty_like(theirs))
    every = shard.softmax(logits, out=out)
    probs = rows_of(every, rows.boundary)
    # where nothing is common, all of it is the rest, and need not be copied
    student_rest = probs.index_select(1, common.student_rest) if common.exist else probs
    teacher_rest = teacher.index_select(1, common.teacher_rest) if common.exist else teacher
    kept = teacher_rest.shape[1] if options.top_u is None else options.top_u
    ranked = sorted_l1(
        student_rest,
        largest(teacher_rest, kept),
        top_u=options.top_u,
        shard=shard,
        width=common.rest_width,
    )
    w_matched, w_unmatched = options.weights
    value, mean = w_unmatched * ranked.value, w_unmatched * ranked.mean
    kl = torch.zeros_like(value)
    matched = None
    if common.exist:
        pairs = Pairs(
            teacher=teacher.index_select(1, common.teacher),
            student=probs.index_select(1, common.student),
            log_teacher=_logs(theirs, teacher, common.teacher, _whole(theirs)),
            log_student=_logs(rows_of(logits, rows.boundary), probs, common.student, shard),
        )
        rests = (teacher_rest.sum(dim=-1), student_rest.sum(dim=-1)) if options.rest_bin else None
        matched = matched_divergence(pairs, common, options.divergence, rests=rests, shard=shard)
        kl, value, mean = (
            matched.value,
            value + w_matched * matched.value,
            mean + w_matched * matched.mean,
        )
    scale = rows.weight * factor
    gradient = probs.mul_((-scale * mean)[:, None])
    if matched is not None:
        _add_matched(gradient, matched, student_rest, common, scale * w_matched)
    _add_ranked(gradient, ranked, common, scale * w_unmatched)
    if probs is not every:
        out.zero_().index_copy_(0, rows.boundary, gradient)
    each = kl * rows.weight
    return LossSums(
        loss=(value * rows.weight).sum(),
        kl=each.sum(),
        rows=RowKl(row=rows.boundary, total=each, weight=rows.weight) if common.exist else None,
    )


def _add_matched(
    gradient: Tensor, matched: Matched, rest: Tensor, common: CommonTokens, scale: Tensor
) -> None:
    """The flows of the pairs, and of the rest bin; both tensors are used up."""
    gradient.index_add_(1, common.student, matched.flow.mul_(scale[:, None]))
    gradient.index_add_(1, common.student_rest, rest.mul_((scale * matched.rest)[:, None]))


def _add_ranked(gradient: Tensor, ranked: SortedL1, common: CommonTokens, scale: Tensor) -> None:
    amount = ranked.slope.mul_(ranked.probs).mul_(scale[:, None])
    gradient.scatter_add_(1, common.student_rest[ranked.index], amount)


def _logs(logits: Tensor, probs: Tensor, columns: Tensor, shard: VocabShard) -> Tensor:
    """Log-probabilities [r, C] of some ``columns``, without a logarithm per column."""
    normaliser = shard.lse_of(logits, probs)[:, None]
    return logits.index_select(1, columns).sub_(normaliser).clamp_min_(LOG_TINY)


def _whole(values: Tensor) -> VocabShard:
    """A vocabulary that this rank has to itself."""
    return VocabShard(start=0, size=values.shape[1], vocab_size=values.shape[1])
