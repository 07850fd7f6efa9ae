"""The vocabulary as one rank sees it, and the only collectives of the losses.

Gradients are written in closed form beside their values, so these reductions need no autograd:
what a rank computes from summed quantities is already the gradient of its own columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

ProcessGroup = dist.ProcessGroup


def sum_over(value: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum over the ranks of ``group``, in place; ``value`` itself where there is no group."""
    if group is not None:
        dist.all_reduce(value, op=dist.ReduceOp.SUM, group=group)
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabShard:
    """Columns ``start : start + size`` of a vocabulary of ``vocab_size`` true tokens.

    ``group`` None means that this rank has them all. Columns at or beyond ``vocab_size`` are
    padding with arbitrary weights.
    """

    start: int
    size: int
    vocab_size: int
    padding: int = 0  # columns that `without_padding` took away; other shards may have kept theirs
    group: ProcessGroup | None = None

    def sum(self, value: Tensor) -> Tensor:
        """Sum over the shards, in place."""
        return sum_over(value, self.group)

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

    def without_padding(self) -> VocabShard:
        """The same shard ending at the last true token (at its own start where it has none)."""
        real = max(0, min(self.size, self.vocab_size - self.start))
        return replace(self, size=real, padding=self.padding + self.size - real)

    def local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Global ids -> (column here, clamped into range; whether it is here)."""
        column = ids - self.start
        mine = (column >= 0) & (column < self.size)
        return column.clamp(0, max(self.size - 1, 0)), mine

    def softmax(self, logits: Tensor, *, out: Tensor) -> Tensor:
        """Probabilities [n, size] of ``logits`` in ``out``, which may be ``logits`` itself."""
        if self.group is None:
            torch.softmax(logits, dim=-1, out=out)
            # on a CPU its normaliser is a plain running sum: 4e-5 off at 150,000 columns in float32
            return out.div_(out.sum(dim=-1, keepdim=True))
        peak = logits.amax(dim=-1) if self.size else logits.new_full((len(logits),), -torch.inf)
        self.max(peak)
        torch.sub(logits, peak[:, None], out=out).exp_()
        return out.div_(self.sum(out.sum(dim=-1))[:, None])

    def lse(self, logits: Tensor) -> Tensor:
        """[n] log-sum-exp over all shards."""
        if self.group is None:
            return torch.logsumexp(logits, dim=-1)
        peak = logits.amax(dim=-1) if self.size else logits.new_full((len(logits),), -torch.inf)
        self.max(peak)
        return peak + torch.log(self.sum(torch.exp(logits - peak[:, None]).sum(dim=-1)))

    def lse_of(self, logits: Tensor, probs: Tensor) -> Tensor:
        """[n] log-sum-exp of ``logits`` whose softmax is ``probs``, read off at the likeliest
        column: no exponential per column."""
        peaks = logits.new_full((2, len(logits)), -torch.inf)
        if self.size:
            peaks = torch.stack([logits.amax(dim=-1), probs.amax(dim=-1)])
        top, likeliest = self.max(peaks)
        return top - torch.log(likeliest)

    def top_k(self, values: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The ``k`` largest of [n, size] over all shards: (values, global ids), largest first.

        Equal values keep the order of the shards.
        """
        k = min(k, self.vocab_size)
        width = min(k, self.size + self.padding)  # alike on all shards
        top, index = values.topk(min(width, self.size), dim=-1)
        short = width - top.shape[-1]
        if short:
            top = torch.nn.functional.pad(top, (0, short), value=-torch.inf)
            index = torch.nn.functional.pad(index, (0, short))
        everyone, ids = self.gather_columns(top), self.gather_columns(index + self.start)
        order = everyone.argsort(dim=-1, descending=True, stable=True)[:, :k]
        return everyone.gather(1, order), ids.gather(1, order)

    def pick(self, values: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        """``values[rows, ids]`` [t] for global ids, wherever they live."""
        column, mine = self.local(ids)
        return self.sum(torch.where(mine, values[rows, column], 0.0))
