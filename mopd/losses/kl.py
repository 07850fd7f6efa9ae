"""KL for a teacher with the student's own tokenizer: top-k bins plus one tail bin."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mopd.losses.base import LossSums, RowBlock, RowScalars
from mopd.losses.divergence import Divergence, softmax_backward
from mopd.losses.vocab import VocabShard


@dataclass(frozen=True, slots=True, kw_only=True)
class KlLoss:
    """Reverse KL is the usual choice on-policy."""

    divergence: Divergence
    temperature: float
    value_scale: float
    coupled: bool = False

    def measure(self, logits: Tensor, rows: RowBlock, shard: VocabShard) -> RowScalars:
        raise NotImplementedError("kl has no coupled term")

    def couple(
        self, chunk_logprob: Tensor, teacher_logprob: Tensor, chunk_size: Tensor
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("kl has no coupled term")

    def grad(
        self, logits: Tensor, rows: RowBlock, token_grad: Tensor | None, shard: VocabShard
    ) -> tuple[LossSums, Tensor]:
        log_probs, _ = shard.log_softmax(logits / self.temperature)
        probs = torch.exp(log_probs)
        at = probs[rows.boundary]
        value, slope, mean = support_divergence(
            at,
            rows.topk_ids,
            torch.exp(rows.topk_logprobs),
            torch.exp(rows.log_tail),
            self.divergence,
            shard=shard,
        )
        gradient = torch.zeros_like(logits)
        gradient[rows.boundary] = softmax_backward(at, slope, mean)
        gradient *= self.value_scale / self.temperature
        return LossSums(loss=value * self.value_scale, kl=value), gradient


def support_divergence(
    probs: Tensor,
    ids: Tensor,
    teacher: Tensor,
    teacher_tail: Tensor,
    divergence: Divergence,
    *,
    shard: VocabShard,
) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence on the support ``ids`` [r, K] (student ids, -1 absent) and what lies outside.

    Returns the sum over rows, the slope in each student probability [r, V_local], and the slope's
    mean under the student [r]. The student's mass outside is summed outside, so that rows near
    one-hot lose nothing to cancellation.
    """
    present = ids >= 0
    column, mine = shard.local(ids)
    mine = mine & present
    local = torch.where(mine, probs.gather(1, column), 0.0)
    inside = torch.zeros_like(probs).scatter_add_(1, column, mine.to(probs.dtype)).clamp_(max=1.0)
    tail = (probs * (1.0 - inside)).sum(dim=-1, keepdim=True)
    student = shard.sum(torch.cat([local, tail], dim=1))
    value, support_slope, rest = divergence.support(
        torch.where(present, teacher, 0.0),
        student[:, :-1],
        teacher_rest=teacher_tail[:, None],
        student_rest=student[:, -1:],
    )
    slope = rest.expand_as(probs).clone()
    slope.scatter_add_(1, column, torch.where(mine, support_slope - rest, 0.0))
    mean = mean_slope(student, support_slope, rest)
    return value.sum(), slope, mean


def mean_slope(student: Tensor, support_slope: Tensor, rest: Tensor) -> Tensor:
    """[r] the slope's mean under the student; bins it gives nothing count nothing."""
    slopes = torch.cat([support_slope, rest], dim=1)
    return torch.where(student > 0, student * slopes, 0.0).sum(dim=-1)
