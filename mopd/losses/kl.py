"""KL for a teacher with the student's own tokenizer: on listed tokens, or on the whole vocabulary.

For on-policy training reverse KL is the usual choice. With a teacher's whole rows the support can
also be the student's own likeliest tokens, or those of both (TRL's choice for reverse KL and JSD).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mopd.losses.base import Chunks, Coupled, LossSums, RowBlock, RowKl
from mopd.losses.dense import add_dense
from mopd.losses.divergence import Divergence
from mopd.losses.softmax import RowGradient, Slopes, rows_of, tempered
from mopd.losses.vocab import VocabShard


@dataclass(frozen=True, slots=True, kw_only=True)
class KlLoss:
    """``value_scale`` is temperature^2, or 1.

    ``support`` "student" and "union" take ``support_top_k`` tokens of each side and need whole rows
    of the teacher; "teacher" takes what the payload lists.
    """

    divergence: Divergence
    temperature: float
    value_scale: float
    support: Literal["teacher", "student", "union"] = "teacher"
    support_top_k: int = 64

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
        if self.support != "teacher":
            each = self._chosen(logits, out, rows, shard, factor=factor)
        elif rows.topk_ids is None:
            each = add_dense(logits, out, rows, self, shard, factor=factor)
        elif self.divergence.top_k_mode == "renorm":
            each = _renormalised(logits, out, rows, self, shard, factor=factor)
        else:
            each = self._listed(logits, out, rows, shard, factor=factor)
        value = each.sum()
        of_rows = RowKl(row=rows.boundary, total=each, weight=rows.weight)
        return LossSums(loss=value * self.value_scale, kl=value, rows=of_rows)

    def _listed(
        self, logits: Tensor, out: Tensor, rows: RowBlock, shard: VocabShard, *, factor: float
    ) -> Tensor:
        probs = tempered(logits, out, self.temperature, shard)
        slopes = support_slopes(
            rows_of(probs, rows.boundary),
            _ids(rows),
            torch.exp(rows.topk_logprobs),
            torch.exp(rows.log_tail),
            self.divergence,
            shard=shard,
        )
        gradient = RowGradient(probs)
        gradient.add(slopes, rows.boundary, rows.weight)
        gradient.write(factor)
        return slopes.value * rows.weight

    def _chosen(
        self, logits: Tensor, out: Tensor, rows: RowBlock, shard: VocabShard, *, factor: float
    ) -> Tensor:
        """On the student's likeliest tokens, and the teacher's too for "union"."""
        if rows.topk_ids is not None:
            raise ValueError(f"support {self.support} needs the teacher's whole vocabulary")
        probs = tempered(logits, out, self.temperature, shard)
        student = rows_of(probs, rows.boundary)
        theirs = rows.topk_logprobs[:, shard.start : shard.start + shard.size]
        teacher = tempered(theirs, torch.empty_like(theirs), self.temperature, shard)
        _, ids = shard.top_k(student, self.support_top_k)
        if self.support == "union":
            _, listed = shard.top_k(teacher, self.support_top_k)
            repeated = (listed[:, :, None] == ids[:, None, :]).any(dim=-1)
            ids = torch.cat([ids, torch.where(repeated, -1, listed)], dim=1)
        column, mine = shard.local(ids)
        mine = mine & (ids >= 0)
        inside = torch.where(mine, teacher.gather(1, column), 0.0)
        outside = teacher.scatter_add_(1, column, -inside).sum(dim=-1, keepdim=True)
        both = shard.sum(torch.cat([inside, outside], dim=1))
        slopes = support_slopes(
            student, ids, both[:, :-1], both[:, -1], self.divergence, shard=shard
        )
        gradient = RowGradient(probs)
        gradient.add(slopes, rows.boundary, rows.weight)
        gradient.write(factor)
        return slopes.value * rows.weight


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


def _ids(rows: RowBlock) -> Tensor:
    """[r, K], also where all rows share one list."""
    assert rows.topk_ids is not None
    return rows.topk_ids.expand(rows.topk_logprobs.shape)


def _renormalised(
    logits: Tensor, out: Tensor, rows: RowBlock, loss: KlLoss, shard: VocabShard, *, factor: float
) -> Tensor:
    """Both sides renormalised inside the support: the softmax over the vocabulary cancels."""
    ids = _ids(rows)
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
    return value * rows.weight
