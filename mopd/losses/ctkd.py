"""CTKD: projection-matrix KL at common byte boundaries, with fold, path terms and chunk likelihood.

At a boundary both models have consumed the same bytes. The student's distribution is pushed onto
the teacher's vocabulary, q~ = W^T q, and compared with the teacher's top-k plus one tail bin
(X-Token 2605.21699; fold and path terms: docs/losses.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from mopd.losses.base import LossSums, ProjectionRows, RowBlock, RowKl, zero
from mopd.losses.chunk import add_token_gradient
from mopd.losses.divergence import Divergence
from mopd.losses.learned import LearnedRows, entry_gradient
from mopd.losses.merge import MergingTerm, add_boundary
from mopd.losses.native import add_native
from mopd.losses.paths import add_paths
from mopd.losses.softmax import RowGradient, Slopes, tempered
from mopd.losses.vocab import VocabShard


@dataclass(frozen=True, slots=True, kw_only=True)
class CtkdLoss(MergingTerm):
    """``value_scale`` is temperature^2, or 1.

    Lists are at ``temperature`` and folded. Whole rows (``topk_ids`` None) are logits at
    temperature 1, up to a constant, and have no tail. A payload with lists of width 0 has no
    boundary term: its native rows are the loss. With a learned projection `grad` adds the gradient
    of the entries too.
    """

    projection: ProjectionRows
    divergence: Divergence
    temperature: float
    value_scale: float
    _known: dict[str, _Entries] = field(init=False, default_factory=dict, repr=False, compare=False)

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
        probs = tempered(logits, out, self.temperature, shard)
        gradient = RowGradient(probs)
        boundary, of_rows = zero(logits), None
        is_listed = rows.topk_logprobs.shape[1] > 0
        if is_listed and len(rows.boundary):
            term = partial(self._boundary, factor=scale * self.value_scale)
            slopes = add_boundary(gradient, probs, rows, shard, merge=self.merge, term=term)
            each = slopes.value * rows.weight
            boundary = each.sum()
            of_rows = RowKl(row=rows.boundary, total=each, weight=rows.weight)
        each = add_native(gradient, probs, rows, shard, divergence=self.divergence)
        native = each.sum()
        if not is_listed:
            of_rows = RowKl(row=rows.native, total=each, weight=rows.native_weight)
        path = add_paths(
            gradient,
            logits,
            rows,
            shard,
            divergence=self.divergence,
            temperature=self.temperature,
        )
        gradient.write(scale * self.value_scale / self.temperature)
        if token_grad is not None and self.has_chunk_term:
            add_token_gradient(out, logits, rows, token_grad * scale, shard)
        value = (boundary + native + path) * self.value_scale
        return LossSums(loss=value, kl=boundary if is_listed else native, rows=of_rows)

    def _boundary(
        self, probs: Tensor, rows: RowBlock, shard: VocabShard, *, factor: float
    ) -> Slopes:
        """Divergence of the tail bins on q~ = W^T q for probabilities [r, V_local]."""
        if rows.topk_ids is not None and rows.topk_ids.dim() == 2:
            return self._listed(probs, rows, rows.topk_ids, shard, factor=factor)
        return self._shared(probs, rows, shard, factor=factor)

    def _listed(
        self, probs: Tensor, rows: RowBlock, ids: Tensor, shard: VocabShard, *, factor: float
    ) -> Slopes:
        """Every row has its own list ``ids`` [r, K]; the block projects onto their union."""
        present = ids >= 0
        support, place = torch.unique(ids.clamp_min(0), return_inverse=True)
        student_row, column, weight = self.projection.columns(support)
        touched, entry = torch.unique(student_row, return_inverse=True)
        weight = weight.to(probs.dtype)
        member = probs.new_zeros(len(probs), len(support))
        member.scatter_add_(1, place, present.to(probs.dtype)).clamp_(max=1.0)
        at = probs.index_select(1, touched)
        entries = at.index_select(1, entry)
        projected = torch.zeros_like(member).index_add_(1, column, entries * weight)
        # the tail is summed over what lies outside, not taken as 1 - inside: no cancellation
        covered = torch.zeros_like(at).index_add_(1, entry, member.index_select(1, column) * weight)
        untouched = probs.new_ones(probs.shape[1]).index_fill_(0, touched, 0.0)
        tail = (at * (1.0 - covered).clamp_min(0.0)).sum(dim=-1) + probs @ untouched
        both = shard.sum(torch.cat([projected, tail[:, None]], dim=1))
        student = torch.where(present, both[:, :-1].gather(1, place), 0.0)
        value, slope, rest = self.divergence.support(
            torch.exp(rows.topk_logprobs) * present,
            student,
            teacher_rest=torch.exp(rows.log_tail[:, None]),
            student_rest=both[:, -1:],
        )
        listed = torch.where(present, slope - rest, 0.0)
        excess = torch.zeros_like(member).scatter_add_(1, place, listed)
        excess = excess.index_select(1, column)
        if isinstance(self.projection, LearnedRows):
            amount = entry_gradient(entries, excess, rows.weight * factor)
            self.projection.accumulate(support, amount)
        return Slopes(
            value=value,
            rest=rest[:, 0],
            mean=(student * listed).sum(dim=-1),
            parts=((student_row, excess.mul_(weight)),),
        )

    def _shared(self, probs: Tensor, rows: RowBlock, shard: VocabShard, *, factor: float) -> Slopes:
        """All rows have the same columns: ``rows.topk_ids`` [G], or the teacher's whole vocabulary.

        What a student token has outside the columns is then the same in every row too.
        """
        columns = self._entries(rows, probs)
        entries = probs.index_select(1, columns.student)
        pushed = entries * columns.weight
        projected = probs.new_zeros(rows.topk_logprobs.shape).index_add_(1, columns.column, pushed)
        tail = probs @ columns.outside
        both = shard.sum(torch.cat([projected, tail[:, None]], dim=1))
        student = both[:, :-1]
        listed, listed_tail = _shared_bins(rows, self.temperature)
        value, slope, rest = self.divergence.support(
            listed, student, teacher_rest=listed_tail, student_rest=both[:, -1:]
        )
        slope = slope - rest
        excess = slope.index_select(1, columns.column)
        if isinstance(self.projection, LearnedRows):
            amount = entry_gradient(entries, excess, rows.weight * factor)
            self.projection.accumulate(columns.ids, amount)
        return Slopes(
            value=value,
            rest=rest[:, 0],
            mean=torch.linalg.vecdot(student, slope),
            parts=((columns.student, excess.mul_(columns.weight)),),
        )

    def _entries(self, rows: RowBlock, like: Tensor) -> _Entries:
        """Entries of the shared columns, kept from block to block while W and the columns last."""
        key = "whole" if rows.topk_ids is None else "shared"
        ids = rows.topk_ids
        if ids is None:
            ids = torch.arange(self.projection.teacher_size, device=like.device)
        known = self._known.get(key)
        if known is not None and known.fits(ids, like):
            return known
        found = _Entries.of(self.projection, ids, like)
        if not isinstance(self.projection, LearnedRows):
            self._known[key] = found
        return found


@dataclass(frozen=True, slots=True)
class _Entries:
    """The part of W that columns ``ids`` [G] hold on this rank."""

    ids: Tensor  # [G] int64
    student: Tensor  # [E] int64: local student token
    column: Tensor  # [E] int64: index into ids
    weight: Tensor  # [E]
    outside: Tensor  # [V_local]: what each student token has in other columns

    @classmethod
    def of(cls, projection: ProjectionRows, ids: Tensor, like: Tensor) -> _Entries:
        student, column, weight = projection.columns(ids)
        weight = weight.to(like.dtype)
        outside = like.new_ones(like.shape[1]).index_add_(0, student, -weight)
        # rows of W add up to 1 within rounding only: what is left of a covered row is nothing
        outside = torch.where(outside > 1e-6, outside, 0.0)
        return cls(ids, student, column, weight, outside)

    def fits(self, ids: Tensor, like: Tensor) -> bool:
        same_kind = self.weight.dtype == like.dtype and self.weight.device == like.device
        return same_kind and len(self.outside) == like.shape[1] and torch.equal(self.ids, ids)


def _shared_bins(rows: RowBlock, temperature: float) -> tuple[Tensor, Tensor]:
    """The teacher's masses [r, G] and its tail [r, 1], which the whole vocabulary has not."""
    if rows.topk_ids is not None:
        return torch.exp(rows.topk_logprobs), torch.exp(rows.log_tail)[:, None]
    mass = torch.softmax(rows.topk_logprobs / temperature, dim=-1)
    mass.div_(mass.sum(dim=-1, keepdim=True))  # as in VocabShard.softmax
    return mass, mass.new_zeros(len(mass), 1)
