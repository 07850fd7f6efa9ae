"""CTKD: projection-matrix KL at common byte boundaries, with fold, path terms and chunk likelihood.

At a boundary both models have consumed the same bytes. The student's distribution is pushed onto
the teacher's vocabulary, q~ = W^T q, and compared with the teacher's top-k plus one tail bin
(X-Token 2605.21699; fold and path terms: docs/losses.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mopd.losses.base import LossSums, ProjectionRows, RowBlock, zero
from mopd.losses.chunk import ChunkTerm, add_token_gradient
from mopd.losses.divergence import Divergence
from mopd.losses.softmax import RowGradient, Slopes, rows_of, tempered
from mopd.losses.vocab import VocabShard


@dataclass(frozen=True, slots=True, kw_only=True)
class CtkdLoss(ChunkTerm):
    """``value_scale`` is temperature^2, or 1; the chunk term is `ChunkTerm`'s."""

    projection: ProjectionRows
    divergence: Divergence
    temperature: float
    value_scale: float

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
        slopes = self._boundary(rows_of(probs, rows.boundary), rows, shard)
        gradient.add(slopes, rows.boundary, rows.weight)
        kl = (slopes.value * rows.weight).sum()
        path = self._path(logits, rows, shard, gradient)
        gradient.write(scale * self.value_scale / self.temperature)
        if token_grad is not None:
            add_token_gradient(out, logits, rows, token_grad * scale, shard)
        return LossSums(loss=(kl + path) * self.value_scale, kl=kl)

    def _boundary(self, probs: Tensor, rows: RowBlock, shard: VocabShard) -> Slopes:
        """Divergence of the tail bins on q~ = W^T q for probabilities [r, V_local]."""
        support, inverse = _support(rows, self.projection.teacher_size)
        present = inverse >= 0
        place = inverse.clamp_min(0)
        student_row, column, weight = self.projection.columns(support)
        touched, entry = torch.unique(student_row, return_inverse=True)
        weight = weight.to(probs.dtype)
        member = probs.new_zeros(len(probs), len(support))
        member.scatter_add_(1, place, present.to(probs.dtype)).clamp_(max=1.0)
        at = probs[:, touched]
        projected = torch.zeros_like(member).index_add_(1, column, at[:, entry] * weight)
        # the tail is summed over what lies outside, not taken as 1 - inside: no cancellation
        covered = torch.zeros_like(at).index_add_(1, entry, member[:, column] * weight)
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
        return Slopes(
            value=value,
            rest=rest[:, 0],
            mean=(student * listed).sum(dim=-1),
            parts=((student_row, excess[:, column] * weight),),
        )

    def _path(
        self, logits: Tensor, rows: RowBlock, shard: VocabShard, gradient: RowGradient
    ) -> Tensor:
        """Divergence of R from Q over the slots, Q renormalised; adds to ``gradient``."""
        num_paths = len(rows.path_weight)
        if num_paths == 0:
            return zero(logits)
        path_of_entry = rows.slot_path[rows.entry_slot]
        score = logits[rows.entry_row, rows.entry_token] / self.temperature
        peak = logits.new_full((num_paths,), float("-inf"))
        peak.scatter_reduce_(0, path_of_entry, score, reduce="amax")
        peak = shard.max(peak)
        mass = torch.exp(score - peak[path_of_entry])
        slots = shard.sum(torch.zeros_like(rows.slot_target).index_add_(0, rows.entry_slot, mass))
        total = torch.zeros_like(peak).index_add_(0, rows.slot_path, slots)
        student = slots / total[rows.slot_path]
        value, slope = self._slot_divergence(rows, student)
        mean = torch.zeros_like(peak).index_add_(
            0, rows.slot_path, torch.where(student > 0, student * slope, 0.0)
        )
        conditional = rows.path_weight[path_of_entry] * mass / total[path_of_entry]
        amount = conditional * (slope[rows.entry_slot] - mean[path_of_entry])
        gradient.add_points(rows.entry_row, rows.entry_token, amount)
        return (rows.path_weight[rows.slot_path] * value).sum()

    def _slot_divergence(self, rows: RowBlock, student: Tensor) -> tuple[Tensor, Tensor]:
        """Contributions and slopes [s] of ragged rows of slots, laid out as padded rows."""
        counts = torch.bincount(rows.slot_path, minlength=len(rows.path_weight))
        first = torch.cumsum(counts, 0) - counts
        place = torch.arange(len(student), device=student.device) - first[rows.slot_path]
        where = (rows.slot_path, place)
        shape = (len(counts), int(counts.max()))
        value, slope = self.divergence.bins(
            student.new_zeros(shape).index_put_(where, rows.slot_target),
            student.new_zeros(shape).index_put_(where, student),
        )
        return value[where], slope[where]


def _support(rows: RowBlock, teacher_size: int) -> tuple[Tensor, Tensor]:
    """The teacher columns of a block [G], and where each listed token is among them, -1 absent."""
    ids = rows.topk_ids
    shape = rows.topk_logprobs.shape
    if ids is None:
        ids = torch.arange(teacher_size, device=rows.topk_logprobs.device)
    if ids.dim() == 1:
        return ids, torch.arange(len(ids), device=ids.device).expand(shape)
    support, inverse = torch.unique(ids.clamp_min(0), return_inverse=True)
    return support, torch.where(ids >= 0, inverse, -1)
