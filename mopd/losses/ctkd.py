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
from mopd.losses.softmax import boundary_probs, mean_slope, rescale, spread, tempered
from mopd.losses.vocab import VocabShard


@dataclass(frozen=True, slots=True, kw_only=True)
class CtkdLoss(ChunkTerm):
    """``value_scale`` is temperature^2, or 1; the chunk term is `ChunkTerm`'s."""

    projection: ProjectionRows
    divergence: Divergence
    temperature: float
    value_scale: float

    def grad(
        self, logits: Tensor, rows: RowBlock, token_grad: Tensor | None, shard: VocabShard
    ) -> tuple[LossSums, Tensor]:
        scaled = tempered(logits, self.temperature)
        kl, at_boundary = self._boundary(boundary_probs(scaled, rows, shard), rows, shard)
        gradient = spread(at_boundary, logits, rows)
        path = self._path(scaled, rows, shard, gradient)
        rescale(gradient, self.temperature, self.value_scale)
        sums = LossSums(loss=(kl + path) * self.value_scale, kl=kl)
        if token_grad is not None:
            add_token_gradient(gradient, logits, rows, token_grad, shard)
        return sums, gradient

    def _boundary(self, probs: Tensor, rows: RowBlock, shard: VocabShard) -> tuple[Tensor, Tensor]:
        """Divergence of the tail bins on q~ = W^T q: its sum and its gradient, in ``probs``."""
        present = rows.topk_ids >= 0
        support, inverse = torch.unique(rows.topk_ids.clamp_min(0), return_inverse=True)
        student_row, column, weight = self.projection.columns(support)
        touched, entry = torch.unique(student_row, return_inverse=True)
        weight = weight.to(probs.dtype)
        member = probs.new_zeros(len(probs), len(support))
        member.scatter_add_(1, inverse, present.to(probs.dtype)).clamp_(max=1.0)
        at = probs[:, touched]
        spelled = at[:, entry] * weight
        projected = torch.zeros_like(member).index_add_(1, column, spelled)
        # the tail is summed over what lies outside, not taken as 1 - inside: no cancellation
        covered = torch.zeros_like(at).index_add_(1, entry, member[:, column] * weight)
        untouched = probs.new_ones(probs.shape[1]).index_fill_(0, touched, 0.0)
        tail = (at * (1.0 - covered).clamp_min(0.0)).sum(dim=-1) + probs @ untouched
        both = shard.sum(torch.cat([projected, tail[:, None]], dim=1))
        student = torch.cat(
            [torch.where(present, both[:, :-1].gather(1, inverse), 0.0), both[:, -1:]], dim=1
        )
        value, support_slope, rest = self.divergence.support(
            torch.exp(rows.topk_logprobs) * present,
            student[:, :-1],
            teacher_rest=torch.exp(rows.log_tail[:, None]),
            student_rest=student[:, -1:],
        )
        excess = torch.zeros_like(member)
        excess.scatter_add_(1, inverse, torch.where(present, support_slope - rest, 0.0))
        probs.mul_(rest - mean_slope(student, support_slope, rest)[:, None])
        probs.index_add_(1, student_row, spelled.mul_(excess[:, column]))
        return value.sum(), probs

    def _path(self, scaled: Tensor, rows: RowBlock, shard: VocabShard, gradient: Tensor) -> Tensor:
        """Divergence of R from Q over the slots, Q renormalised; adds to ``gradient``."""
        num_paths = len(rows.path_weight)
        if num_paths == 0:
            return zero(scaled)
        path_of_entry = rows.slot_path[rows.entry_slot]
        score = scaled[rows.entry_row, rows.entry_token]
        peak = scaled.new_full((num_paths,), float("-inf"))
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
        weight = rows.path_weight[path_of_entry]
        conditional = mass / total[path_of_entry]
        gradient.index_put_(
            (rows.entry_row, rows.entry_token),
            weight * conditional * (slope[rows.entry_slot] - mean[path_of_entry]),
            accumulate=True,
        )
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
