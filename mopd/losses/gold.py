"""GOLD: divergence on the common vocabulary plus sorted L1 on the rest, at byte boundaries.

Matched tokens are those with equal bytes (a superset of equal strings), or another one-to-one map;
they form the bins of a divergence together with one bin for everything else. Unmatched
probabilities are compared by rank (ULD 2402.12030). A teacher that sends its whole vocabulary is
compared with all of it; one that lists its top-k is known there, and its tail is one more entry.

Forward KL with weights (1, lambda) on the partners that a projection names is the hybrid KL of
X-Token (2605.21699); without a rest bin it is the peers' form of both.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mopd.losses.base import LossSums, ProjectionRows, RowBlock, RowKl, zero
from mopd.losses.chunk import add_token_gradient
from mopd.losses.divergence import Divergence
from mopd.losses.kl import support_slopes
from mopd.losses.matched import CommonTokens, listed_without_rest
from mopd.losses.matched_dense import add_dense
from mopd.losses.merge import MergingTerm, add_boundary
from mopd.losses.softmax import RowGradient, Slopes, tempered
from mopd.losses.sorted import largest, sorted_l1
from mopd.losses.vocab import VocabShard


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldLoss(MergingTerm):
    """``weights`` are (matched, unmatched); see `adaptive_weights` for TRL's rule.

    ``top_u`` keeps so many of the largest unmatched probabilities, None all of them (a listed
    teacher's entries are all kept). What is cut off adds at most what it weighs on both sides.
    ``rest_bin`` False leaves the mass without a partner out of the divergence, whose ``top_k_mode``
    then means nothing.
    """

    projection: ProjectionRows
    divergence: Divergence
    temperature: float
    value_scale: float
    weights: tuple[float, float]
    top_u: int | None
    rest_bin: bool = True
    _tables: dict[VocabShard, CommonTokens] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

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
            sums = add_dense(
                logits, out, rows, self, self._common(shard), shard=shard, factor=factor
            )
        else:
            sums = self._listed(logits, out, rows, shard, factor=factor)
        if token_grad is not None and self.has_chunk_term:
            add_token_gradient(out, logits, rows, token_grad * scale, shard)
        return LossSums(loss=sums.loss * self.value_scale, kl=sums.kl, rows=sums.rows)

    def _common(self, shard: VocabShard) -> CommonTokens:
        """The tables of ``shard``, built when they are first asked for."""
        if shard not in self._tables:
            self._tables[shard] = CommonTokens.of(self.projection.common, shard)
        return self._tables[shard]

    def _listed(
        self, logits: Tensor, out: Tensor, rows: RowBlock, shard: VocabShard, *, factor: float
    ) -> LossSums:
        probs = tempered(logits, out, self.temperature, shard)
        gradient = RowGradient(probs)
        if not len(rows.boundary):
            gradient.write(factor)
            return LossSums(loss=zero(probs), kl=zero(probs))
        slopes = add_boundary(gradient, probs, rows, shard, merge=self.merge, term=self._boundary)
        gradient.write(factor)
        assert slopes.kl is not None
        loss = (slopes.value * rows.weight).sum()
        each = slopes.kl * rows.weight
        of_rows = None
        if self._common(shard).exist:
            of_rows = RowKl(row=rows.boundary, total=each, weight=rows.weight)
        return LossSums(loss=loss, kl=each.sum(), rows=of_rows)

    def _boundary(self, probs: Tensor, rows: RowBlock, shard: VocabShard) -> Slopes:
        """Both terms together, for probabilities [r, V_local]; ``kl`` is the matched one."""
        assert rows.topk_ids is not None
        ids = rows.topk_ids.expand_as(rows.topk_logprobs)
        teacher = torch.exp(rows.topk_logprobs) * (ids >= 0)
        partner = torch.where(ids >= 0, self.projection.common[ids.clamp_min(0)], -1)
        listed = torch.where(partner < 0, teacher, 0.0)  # unmatched teacher mass in the top-k
        tail = torch.exp(rows.log_tail)
        if self.rest_bin:
            rest = listed.sum(dim=-1) + tail
            matched = support_slopes(probs, partner, teacher, rest, self.divergence, shard=shard)
        else:
            matched = listed_without_rest(probs, partner, teacher, self.divergence, shard=shard)
        common = self._common(shard)
        entries = torch.cat([listed, tail[:, None]], dim=1)
        ranked = sorted_l1(
            probs.index_select(1, common.student_rest),
            largest(entries, self._teacher_width(rows, entries.shape[1])),
            top_u=self.top_u,
            shard=shard,
            width=common.rest_width,
        )
        w_matched, w_unmatched = self.weights
        ((column, excess),) = matched.parts
        return Slopes(
            kl=matched.value,
            value=w_matched * matched.value + w_unmatched * ranked.value,
            rest=w_matched * matched.rest,
            mean=w_matched * matched.mean + w_unmatched * ranked.mean,
            parts=(
                (column, w_matched * excess),
                (common.student_rest[ranked.index], w_unmatched * ranked.slope),
            ),
        )

    def _teacher_width(self, rows: RowBlock, width: int) -> int:
        """A list is kept whole; of all the teacher's tokens ``top_u`` are, as of the student's."""
        whole = rows.topk_logprobs.shape[1] == self.projection.teacher_size
        return min(self.top_u, width) if whole and self.top_u is not None else width


def adaptive_weights(common: Tensor) -> tuple[float, float]:
    """TRL's rule: the matched share of the teacher's vocabulary, and what is left."""
    matched = float((common >= 0).float().mean())
    return matched, 1.0 - matched
