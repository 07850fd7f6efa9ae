"""The vocabulary as one rank sees it: the only collectives of the losses.

Gradients are written in closed form beside their values, so these reductions need no autograd:
what a rank computes from summed quantities is already the gradient of its own columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabShard:
    """Columns ``start : start + size`` of a vocabulary of ``vocab_size`` true tokens.

    ``group`` None means that this rank has them all. Columns at or beyond ``vocab_size`` are
    padding with arbitrary weights.
    """

    start: int
    size: int
    vocab_size: int
    group: dist.ProcessGroup | None = None

    def sum(self, value: Tensor) -> Tensor:
        """Sum over the shards, in place."""
        if self.group is not None:
            dist.all_reduce(value, op=dist.ReduceOp.SUM, group=self.group)
        return value

    def max(self, value: Tensor) -> Tensor:
        """Maximum over the shards, in place."""
        if self.group is not None:
            dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.group)
        return value

    def gather_columns(self, value: Tensor) -> Tensor:
        """[n, k] of every shard side by side: [n, k * shards], shard 0 first."""
        if self.group is None:
            return value
        parts = [torch.empty_like(value) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, value.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)

    def rank_offset(self, width: int) -> int:
        """Where this shard's part begins in `gather_columns` of ``width`` columns each."""
        return 0 if self.group is None else width * dist.get_rank(self.group)

    def mask_padding(self, logits: Tensor) -> Tensor:
        """``logits`` [n, size] with padded columns at -inf, in place."""
        real = max(0, min(self.size, self.vocab_size - self.start))
        if real < self.size:
            logits[:, real:] = float("-inf")
        return logits

    def local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Global ids -> (column here, clamped into range; whether it is here)."""
        column = ids - self.start
        mine = (column >= 0) & (column < self.size)
        return column.clamp(0, self.size - 1), mine

    def log_softmax(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """[n, size] float -> (log-probabilities [n, size], log-sum-exp [n])."""
        peak = self.max(logits.amax(dim=-1))
        total = self.sum(torch.exp(logits - peak[:, None]).sum(dim=-1))
        lse = peak + torch.log(total)
        return logits - lse[:, None], lse

    def pick(self, values: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        """``values[rows, ids]`` [t] for global ids, wherever they live."""
        column, mine = self.local(ids)
        return self.sum(torch.where(mine, values[rows, column], 0.0))
