"""KL for a teacher with the student's own tokenizer: top-k bins plus one tail bin."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mopd.losses.base import LossSums, RowBlock, RowScalars
from mopd.losses.divergence import bin_divergence, softmax_backward
from mopd.losses.vocab import VocabShard


@dataclass(frozen=True, slots=True, kw_only=True)
class KlLoss:
    """``beta`` as in `divergence`: reverse KL (1) is the usual choice on-policy."""

    beta: float
    temperature: float
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
        value, slope, mean = tail_divergence(
            at,
            rows.topk_ids,
            torch.exp(rows.topk_logprobs),
            torch.exp(rows.log_tail),
            self.beta,
            shard=shard,
        )
        gradient = torch.zeros_like(logits)
        gradient[rows.boundary] = softmax_backward(at, slope, mean) * self.temperature
        return LossSums(loss=value * self.temperature**2, kl=value), gradient


def tail_divergence(
    probs: Tensor,
    ids: Tensor,
    teacher: Tensor,
    teacher_tail: Tensor,
    beta: float,
    *,
    shard: VocabShard,
) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence on the bins ``ids`` [r, K] (student ids, -1 absent) and one bin for the rest.

    Returns the sum over rows, the slope in each student probability [r, V_local], and the slope's
    mean under the student [r]. The student's tail is summed outside the support, so that rows near
    one-hot lose nothing to cancellation.
    """
    present = ids >= 0
    column, mine = shard.local(ids)
    mine = mine & present
    local = torch.where(mine, probs.gather(1, column), 0.0)
    inside = torch.zeros_like(probs).scatter_add_(1, column, mine.to(probs.dtype)).clamp_(max=1.0)
    tail = (probs * (1.0 - inside)).sum(dim=-1, keepdim=True)
    student = shard.sum(torch.cat([local, tail], dim=1))
    bins = torch.cat([torch.where(present, teacher, 0.0), teacher_tail[:, None]], dim=1)
    value, bin_slope = bin_divergence(bins, student, beta)
    rest = bin_slope[:, -1:]
    slope = rest.expand_as(probs).clone()
    slope.scatter_add_(1, column, torch.where(mine, bin_slope[:, :-1] - rest, 0.0))
    mean = torch.where(student > 0, student * bin_slope, 0.0).sum(dim=-1)
    return value.sum(), slope, mean
