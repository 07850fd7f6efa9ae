"""KL for a teacher with the student's own tokenizer: top-k bins plus one tail bin."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mopd.losses.base import LossSums, RowBlock, RowScalars
from mopd.losses.divergence import Divergence
from mopd.losses.softmax import boundary_probs, mean_slope, rescale, spread, tempered
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
        probs = boundary_probs(tempered(logits, self.temperature), rows, shard)
        value, base, column, correction = support_divergence(
            probs,
            rows.topk_ids,
            torch.exp(rows.topk_logprobs),
            torch.exp(rows.log_tail),
            self.divergence,
            shard=shard,
        )
        probs.mul_(base[:, None]).scatter_add_(1, column, correction)
        gradient = spread(probs, logits, rows)
        rescale(gradient, self.temperature, self.value_scale)
        return LossSums(loss=value * self.value_scale, kl=value), gradient


def support_divergence(
    probs: Tensor,
    ids: Tensor,
    teacher: Tensor,
    teacher_tail: Tensor,
    divergence: Divergence,
    *,
    shard: VocabShard,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Divergence on the support ``ids`` [r, K] (student ids, -1 absent) and what lies outside.

    Returns the sum over rows and the gradient in the logits in two parts: q times ``base`` [r]
    everywhere, and ``correction`` [r, K] to add at the local ``column`` [r, K]. The student's mass
    outside is summed outside, so that rows near one-hot lose nothing to cancellation.
    """
    present = ids >= 0
    column, mine = shard.local(ids)
    mine = mine & present
    local = torch.where(mine, probs.gather(1, column), 0.0)
    # absent entries point at some column too: they must take nothing away from it
    outside = probs.clone().scatter_add_(1, column, -local).clamp_min_(0.0)
    tail = outside.sum(dim=-1, keepdim=True)
    student = shard.sum(torch.cat([local, tail], dim=1))
    value, slope, rest = divergence.support(
        torch.where(present, teacher, 0.0),
        student[:, :-1],
        teacher_rest=teacher_tail[:, None],
        student_rest=student[:, -1:],
    )
    base = rest[:, 0] - mean_slope(student, slope, rest)
    return value.sum(), base, column, local * torch.where(mine, slope - rest, 0.0)
