"""Merged rows: a chunk's student rows made into one before it meets the teacher's merged row.

M_k = sum_i c_i p_i over the rows i of chunk k, p at the temperature of the loss, y the sampled
tokens (docs/losses.md, CTKD: options):

    boundary   the chunk's first row alone (default)
    mean_prob  c_i = 1 / m, probabilities on both sides (TRL)
    nemo       the same for the student; the teacher's rows are averaged as logarithms (NeMo-RL)
    observed   the first row, times the probability of the tokens after the first (TRL)
    bayesian   the last row, times the probability of the tokens before the last (TRL)

The last two do not add up to 1, and their scalars are differentiated too. All rows of a chunk must
be in one block, which `mopd.losses.rows.blocks` sees to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mopd.losses.base import Chunks, Coupled, RowBlock, zero
from mopd.losses.chunk import ChunkTerm
from mopd.losses.softmax import RowGradient, Slopes, rows_of
from mopd.losses.vocab import VocabShard

Merge = Literal["boundary", "mean_prob", "nemo", "observed", "bayesian"]
BoundaryTerm = Callable[[Tensor, RowBlock, VocabShard], Slopes]  # of rows [r, V_local]

CHAINED = ("observed", "bayesian")  # c is a product of probabilities
SCALAR_FLOOR = 1e-8  # TRL's: a sampled token's probability counts at least this much


@dataclass(frozen=True, slots=True, kw_only=True)
class MergingTerm(ChunkTerm):
    """A loss with boundary rows that may be merged ones.

    ``coupled`` then makes the driver visit the rows inside chunks; without a chunk term its first
    pass has nothing to do.
    """

    merge: Merge = "boundary"

    @property
    def coupled(self) -> bool:
        return self.merge != "boundary" or self.lambda_chunk > 0.0

    @property
    def has_chunk_term(self) -> bool:
        return self.lambda_chunk > 0.0

    def measure(self, logits: Tensor, rows: RowBlock, shard: VocabShard) -> Tensor:
        if not self.has_chunk_term:
            return logits.new_zeros(len(rows.token_row))
        return ChunkTerm.measure(self, logits, rows, shard)

    def couple(self, token_logprob: Tensor, chunk_logprob: Tensor, chunks: Chunks) -> Coupled:
        if not self.has_chunk_term:
            none = zero(token_logprob)
            return Coupled(loss=none, token_grad=torch.zeros_like(token_logprob), kl=none)
        return ChunkTerm.couple(self, token_logprob, chunk_logprob, chunks)


def add_boundary(
    gradient: RowGradient,
    probs: Tensor,
    rows: RowBlock,
    shard: VocabShard,
    *,
    merge: Merge,
    term: BoundaryTerm,
) -> Slopes:
    """Adds the gradient of ``term`` on the block's boundary rows [r], merged or as they are.

    ``probs`` [n, V_local] are those of ``gradient``. The value is a weighted sum of what is
    returned, weighted by ``rows.weight``.
    """
    if merge == "boundary":
        slopes = term(rows_of(probs, rows.boundary), rows, shard)
        gradient.add(slopes, rows.boundary, rows.weight)
        return slopes
    chunks = _chunks(probs, rows, shard, merge)
    slopes = term(chunks.merged(probs), rows, shard)
    _add_rows(gradient, probs, chunks, slopes, rows.weight, shard)
    if merge in CHAINED:
        # D hangs on log c by c (rest + <p, excess>), and on every factor of c alike
        through = rows.weight * (slopes.rest * chunks.mass + slopes.mean)
        factors = chunks.factors
        column, mine = shard.local(factors.token)
        gradient.add_logprobs(factors.row, column, through[factors.of_row], mine=mine)
    return slopes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tokens:
    """Sampled tokens of the block's r chunks, ascending: row, chunk (of 0..r - 1), id; [t] each."""

    row: Tensor
    of_row: Tensor
    token: Tensor

    def where(self, kept: Tensor) -> _Tokens:
        return _Tokens(row=self.row[kept], of_row=self.of_row[kept], token=self.token[kept])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chunks:
    """``members`` are the rows with a share in M; ``factors`` those whose token moves their c."""

    members: _Tokens
    share: Tensor  # [members]: c
    factors: _Tokens
    mass: Tensor  # [r]: what the merged row adds up to

    def merged(self, probs: Tensor) -> Tensor:
        """[r, V_local]."""
        shares = rows_of(probs, self.members.row) * self.share[:, None]
        if len(shares) == len(self.mass):  # one row per chunk
            return shares
        out = probs.new_zeros(len(self.mass), probs.shape[1])
        return out.index_add_(0, self.members.of_row, shares)


def _chunks(probs: Tensor, rows: RowBlock, shard: VocabShard, merge: Merge) -> _Chunks:
    tokens = _tokens(rows)
    none = torch.zeros_like(tokens.row, dtype=torch.bool)
    if merge not in CHAINED:
        count = torch.bincount(tokens.of_row, minlength=len(rows.boundary)).to(probs.dtype)
        return _Chunks(
            members=tokens,
            share=(1.0 / count)[tokens.of_row],
            factors=tokens.where(none),
            mass=torch.ones_like(count),
        )
    probability = shard.pick(probs, tokens.row, tokens.token)
    kept = _ends(tokens.of_row, last=merge == "bayesian")
    factor = torch.where(kept, 0.0, torch.log(probability.clamp_min(SCALAR_FLOOR)))
    log_mass = probs.new_zeros(len(rows.boundary)).index_add_(0, tokens.of_row, factor)
    mass = torch.exp(log_mass)
    return _Chunks(
        members=tokens.where(kept),
        share=mass,
        factors=tokens.where(~kept & (probability > SCALAR_FLOOR)),
        mass=mass,
    )


def _tokens(rows: RowBlock) -> _Tokens:
    """Tokens of the chunks that have a boundary row here; those of other chunks count nothing."""
    first = torch.searchsorted(rows.token_row, rows.boundary).clamp_max(len(rows.token_row) - 1)
    assert torch.equal(rows.token_row[first], rows.boundary), "a boundary row without its token"
    chunk = torch.searchsorted(rows.boundary, rows.token_row, right=True) - 1
    held = chunk.clamp_min(0)
    same = (chunk >= 0) & (rows.token_chunk == rows.token_chunk[first[held]])
    found = _Tokens(row=rows.token_row, of_row=held, token=rows.token_id)
    return found.where(same)


def _ends(of_row: Tensor, *, last: bool) -> Tensor:
    """[t] bool: the first, or last, of each run of equal numbers."""
    edge = torch.ones(1, dtype=torch.bool, device=of_row.device)
    turn = of_row[1:] != of_row[:-1]
    return torch.cat([turn, edge] if last else [edge, turn])


def _add_rows(
    gradient: RowGradient,
    probs: Tensor,
    chunks: _Chunks,
    slopes: Slopes,
    weight: Tensor,
    shard: VocabShard,
) -> None:
    """p_i (c_i g - <p_i, c_i g>) for every row with a share of a merged one."""
    row, of_row = chunks.members.row, chunks.members.of_row
    parts = tuple(
        (columns if columns.dim() == 1 else columns[of_row], excess[of_row])
        for columns, excess in slopes.parts
    )
    member = rows_of(probs, row)
    mean = probs.new_zeros(len(row))
    for columns, excess in parts:
        at = member.index_select(1, columns) if columns.dim() == 1 else member.gather(1, columns)
        mean = mean + (at * excess).sum(dim=-1)
    own = Slopes(
        value=slopes.value[of_row], rest=slopes.rest[of_row], mean=shard.sum(mean), parts=parts
    )
    gradient.add(own, row, weight[of_row] * chunks.share)
