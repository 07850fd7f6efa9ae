"""Cross-entropy on the tokens that follow: supervised fine-tuning beside distillation."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from mopd.losses.base import RowBlock
from mopd.losses.rows import Block
from mopd.losses.source import Source
from mopd.losses.vocab import VocabShard
from mopd.types import MicroBatch

CROSS_ENTROPY = "cross_entropy"  # its name among the denominators and the metrics of a step


def targets(micro: MicroBatch) -> tuple[np.ndarray, np.ndarray]:
    """(rows [N] of the flattened prediction axis that train, the tokens [N] they predict).

    Raises:
        ValueError: the last row of a sequence is to be trained, but no token follows it.
    """
    if micro.response_mask[:, -1:].any():
        raise ValueError("response_mask marks a last row, which predicts no token")
    positions = np.flatnonzero(micro.response_mask)
    return positions, micro.tokens.reshape(-1)[positions + 1].astype(np.int64)


@torch.no_grad()
def cross_entropy(
    source: Source, micro: MicroBatch, shard: VocabShard, *, scale: float, block_rows: int
) -> Tensor:
    """Sum over `targets` of -log p(token) at temperature 1, unscaled.

    Adds ``scale`` times its gradient, p - onehot, to ``source``. Divide by the global number of
    targets, not by this micro-batch's.
    """
    shard = shard.without_padding()
    positions, tokens = targets(micro)
    total = torch.zeros((), dtype=source.dtype, device=source.device)
    begins = range(0, len(positions), block_rows)
    blocks = [_bare_block(positions[begin : begin + block_rows]) for begin in begins]
    for begin, block in zip(begins, source.visit(blocks), strict=True):
        ids = torch.as_tensor(tokens[begin : begin + block_rows], device=source.device)
        logits, out = source.read(block), source.buffer(block)
        total = total + token_loss(logits, out, ids, shard, scale=scale).sum()
        source.add(block, out)
    return total


def token_loss(
    logits: Tensor, out: Tensor, ids: Tensor, shard: VocabShard, *, scale: float
) -> Tensor:
    """[n] -log p(ids) of logits [n, V_local]; ``out`` becomes ``scale`` times d(sum)/d(logits)."""
    rows = torch.arange(len(ids), device=ids.device)
    at_token = shard.pick(logits, rows, ids)
    probs = shard.softmax(logits, out=out)
    lse = shard.lse_of(logits, probs)
    out.mul_(scale)
    column, mine = shard.local(ids)
    out.index_put_((rows, column), mine.to(out.dtype) * -scale, accumulate=True)
    return lse - at_token


def _bare_block(positions: np.ndarray) -> Block:
    """Rows without a teacher: a source asks for nothing but the positions."""
    empty = torch.zeros(0)
    rows = RowBlock(**{field.name: empty for field in fields(RowBlock)})
    return Block(positions=positions, rows=rows, tokens=slice(0, 0))
