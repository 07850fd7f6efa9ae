"""KL for a teacher with the student's own tokenizer: on listed tokens, or on the whole vocabulary.

For on-policy training reverse KL is the usual choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mopd.losses.base import Chunks, Coupled, LossSums, RowBlock
from mopd.losses.dense import add_dense
from mopd.losses.divergence import Divergence
from mopd.losses.softmax import RowGradient, Slopes, rows_of, tempered
from mopd.losses.vocab import VocabShard


@dataclass(frozen=True, slots=True, kw_only=True)
class KlLoss:
    """``value_scale`` is temperature^2, or 1."""

    divergence: Divergence
    temperature: float
    value_scale: float

    @property
    def coupled(self) -> bool:
        return False

    def measure(self, logits: Tensor, rows: RowBlock, shard: VocabShard) -> Tensor:
        raise NotImplementedError("kl has no coupled term")

    def couple(self, token_logprob: Tensor, chunk_logprob: Tensor, chunks: Chunks) -> Coupled:
        raise NotImplementedError("kl has no coupled term")

    def grad(
        self,
        logits: Tensor,
        out: Tensor,
        rows: RowBlock,
        token_grad: Tensor | None,
        shard: VocabShard,
        *,
        scale: float,
    ) -> LossSums:
        factor = scale * self.value_scale / self.temperature
        if rows.topk_ids is None:
            value = add_dense(logits, out, rows, self, shard, factor=factor)
        elif self.divergence.top_k_mode == "renorm":
            value = _renormalised(logits, out, rows, self, shard, factor=factor)
        else:
            value = self._listed(logits, out, rows, shard, factor=factor)
        return LossSums(loss=value * self.value_scale, kl=value)

    def _listed(
        self, logits: Tensor, out: Tensor, rows: RowBlock, shard: VocabShard, *, factor: float
    ) -> Tensor:
        probs = tempered(logits, out, self.temperature, shard)
        assert rows.topk_ids is not None
        slopes = support_slopes(
            rows_of(probs, rows.boundary),
            rows.topk_ids,
            torch.exp(rows.topk_logprobs),
            torch.exp(rows.log_tail),
            self.divergence,
            shard=shard,
        )
        gradient = RowGradient(probs)
        gradient.add(slopes, rows.boundary, rows.weight)
        gradient.write(factor)
        return (slopes.value * rows.weight).sum()


def support_slopes(
    probs: Tensor,
    ids: Tensor,
    teacher: Tensor,
    teacher_tail: Tensor,
    divergence: Divergence,
    *,
    shard: VocabShard,
) -> Slopes:
    """Divergence on the support ``ids`` [r, K] (student ids, -1 absent) and what lies outside.

    The student's mass outside is summed outside, so that rows near one-hot lose nothing to
    cancellation: ``probs`` [r, V_local] is without the support for a moment, and whole afterwards.
    """
    present = ids >= 0
    column, mine = shard.local(ids)
    mine = mine & present
    local = torch.where(mine, probs.gather(1, column), 0.0)
    # absent entries point at some column too: they must take nothing away from it
    tail = probs.scatter_add_(1, column, -local).sum(dim=-1, keepdim=True)
    probs.scatter_add_(1, column, local)
    student = shard.sum(torch.cat([local, tail], dim=1))
    value, slope, rest = divergence.support(
        torch.where(present, teacher, 0.0),
        student[:, :-1],
        teacher_rest=teacher_tail[:, None],
        student_rest=student[:, -1:],
    )
    excess = torch.where(present, slope - rest, 0.0)
    mean = (student[:, :-1] * excess).sum(dim=-1)
    return Slopes(
        value=value, rest=rest[:, 0], mean=mean, parts=((column, torch.where(mine, excess, 0.0)),)
    )


def _renormalised(
    logits: Tensor, out: Tensor, rows: RowBlock, loss: KlLoss, shard: VocabShard, *, factor: float
) -> Tensor:
    """Both sides renormalised inside the support: the softmax over the vocabulary cancels."""
    assert rows.topk_ids is not None
    ids = rows.topk_ids if rows.topk_ids.dim() == 2 else rows.topk_ids.expand_as(rows.topk_logprobs)
    present = ids >= 0
    column, mine = shard.local(ids)
    mine = mine & present
    at = rows.boundary[:, None]
    listed = shard.sum(torch.where(mine, logits[at, column] / loss.temperature, 0.0))
    student = torch.softmax(listed.masked_fill(~present, -torch.inf), dim=-1)
    none = student.new_zeros(len(student), 1)
    value, slope, _ = loss.divergence.support(
        torch.where(present, torch.exp(rows.topk_logprobs), 0.0),
        student,
        teacher_rest=none,
        student_rest=none,
    )
    amount = torch.where(mine, rows.weight[:, None] * factor * student * slope, 0.0)
    out.zero_().index_put_((at.expand_as(column), column), amount, accumulate=True)
    return (value * rows.weight).sum()
