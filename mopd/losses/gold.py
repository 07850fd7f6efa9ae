"""GOLD: divergence on the common vocabulary plus sorted L1 on the rest, at byte boundaries.

Matched tokens are those with equal bytes (a superset of equal strings); they form the bins of a
divergence together with one bin for everything else. Unmatched probabilities are compared by rank
(ULD 2402.12030): the student's largest ``top_u`` against the teacher's listed ones, with the
teacher's tail as one more entry.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mopd.losses.base import LossSums, ProjectionRows, RowBlock
from mopd.losses.chunk import ChunkTerm, add_token_gradient
from mopd.losses.divergence import Divergence
from mopd.losses.kl import support_slopes
from mopd.losses.softmax import RowGradient, Slopes, rows_of, tempered
from mopd.losses.vocab import VocabShard


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldLoss(ChunkTerm):
    """``weights`` are (matched, unmatched); see `adaptive_weights` for TRL's rule."""

    projection: ProjectionRows
    divergence: Divergence
    temperature: float
    value_scale: float
    weights: tuple[float, float]
    top_u: int

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
        matched, slopes = self._boundary(rows_of(probs, rows.boundary), rows, shard)
        gradient = RowGradient(probs)
        gradient.add(slopes, rows.boundary, rows.weight)
        gradient.write(scale * self.value_scale / self.temperature)
        if token_grad is not None:
            add_token_gradient(out, logits, rows, token_grad * scale, shard)
        loss = (slopes.value * rows.weight).sum() * self.value_scale
        return LossSums(loss=loss, kl=(matched * rows.weight).sum())

    def _boundary(self, probs: Tensor, rows: RowBlock, shard: VocabShard) -> tuple[Tensor, Slopes]:
        """The matched divergence [r], and both terms together."""
        assert rows.topk_ids is not None
        teacher = torch.exp(rows.topk_logprobs) * (rows.topk_ids >= 0)
        partner = self.projection.common[rows.topk_ids.clamp_min(0)]
        partner = torch.where(rows.topk_ids >= 0, partner, -1)
        listed = torch.where(partner < 0, teacher, 0.0)  # unmatched teacher mass in the top-k
        tail = torch.exp(rows.log_tail)
        of_matched = support_slopes(
            probs, partner, teacher, listed.sum(dim=-1) + tail, self.divergence, shard=shard
        )
        entries = torch.cat([listed, tail[:, None]], dim=1)
        distance, column, sign = self._sorted_l1(probs, entries, shard)
        mean = shard.sum((probs.gather(1, column) * sign).sum(dim=-1))
        w_matched, w_unmatched = self.weights
        ((matched_column, matched_excess),) = of_matched.parts
        return of_matched.value, Slopes(
            value=w_matched * of_matched.value + w_unmatched * distance,
            rest=w_matched * of_matched.rest,
            mean=w_matched * of_matched.mean + w_unmatched * mean,
            parts=(
                (matched_column, w_matched * matched_excess),
                (column, w_unmatched * sign),
            ),
        )

    def _sorted_l1(
        self, probs: Tensor, entries: Tensor, shard: VocabShard
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[r] sum of |q_(r) - p_(r)| over ranks; this shard's columns [r, U], the slopes there."""
        uncommon = torch.ones(shard.size, dtype=torch.bool, device=probs.device)
        column, mine = shard.local(self.projection.common.clamp_min(0))
        uncommon[column[mine & (self.projection.common >= 0)]] = False
        width = min(self.top_u, shard.size + shard.padding)  # alike on all shards
        top, index = torch.where(uncommon, probs, 0.0).topk(min(width, shard.size), dim=-1)
        top, index = _pad(top, width), _pad(index, width)
        everyone = shard.gather_columns(top)
        # stable: equal values keep the order of the shards, as one process would have them
        student, order = torch.sort(everyone, dim=-1, descending=True, stable=True)
        student, order = student[:, : self.top_u], order[:, : self.top_u]
        teacher = torch.sort(entries, dim=-1, descending=True).values
        ranks = max(student.shape[1], teacher.shape[1])
        difference = _pad(student, ranks) - _pad(teacher, ranks)
        sign = torch.sign(difference)[:, : student.shape[1]]
        local = order - shard.rank_offset(width)
        owned = (local >= 0) & (local < width)
        target = index.gather(1, local.clamp(0, width - 1))
        owned &= uncommon[target]
        return difference.abs().sum(dim=-1), target, torch.where(owned, sign, 0.0)


def adaptive_weights(common: Tensor) -> tuple[float, float]:
    """TRL's rule: the matched share of the teacher's vocabulary, and what is left."""
    matched = float((common >= 0).float().mean())
    return matched, 1.0 - matched


def _pad(values: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, width - values.shape[1]))
