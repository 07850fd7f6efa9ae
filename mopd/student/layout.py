"""A micro-batch as this rank's model reads it: padded to what the parallel axes need, and split.

Sequence parallelism wants lengths that its ranks divide, context parallelism wants each text cut
into ``2 * cp_size`` pieces, expert parallelism wants the same shape on all replicas. The losses
know nothing of it: `Layout.restore` gives outputs the shape of the micro-batch again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from mopd.align.positions import zigzag_positions
from mopd.types import MicroBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What goes into the model, and how its output comes back.

    A text of ``offsets`` is attended by itself; without offsets each row is a text.
    """

    tokens: np.ndarray  # [B', L'] int64: this context rank's
    real: np.ndarray  # [B', L'] bool: not padding
    offsets: np.ndarray | None  # [texts + 1]: of the row before context ranks split it
    natural: np.ndarray | None  # [L' * cp] place in the ranks' order of each position of the row
    kept: np.ndarray | None  # [B * L] the same, of each position of the micro-batch
    rows: int  # B of the micro-batch
    length: int  # L of the micro-batch

    def restore(self, output: torch.Tensor) -> torch.Tensor:
        """[B, L, ...] of the whole row's output [B', L' * cp, ...], or [1, B * L, ...] of
        `kept`."""
        if self.kept is not None:
            return output.reshape(self.rows, self.length, *output.shape[2:])
        if output.shape[:2] == (self.rows, self.length):
            return output
        return output[: self.rows, : self.length]


def lay_out(
    micro: MicroBatch,
    *,
    multiple: int = 1,
    context: tuple[int, int] = (0, 1),
    at_least: tuple[int, int] = (0, 0),
) -> Layout:
    """The layout of one micro-batch.

    Args:
        multiple: what the length on a context rank is a multiple of.
        context: (rank, size). With a size above 1 rows become texts of one packed row.
        at_least: rows and length of the row before context ranks split it.
    """
    rows, length = micro.tokens.shape
    if context[1] > 1 or micro.offsets is not None:
        return _packed(micro, multiple=multiple, context=context, at_least=at_least[1])
    size = (max(rows, at_least[0]), _up(max(length, at_least[1]), multiple))
    real = np.zeros(size, dtype=bool)
    real[:rows, :length] = np.arange(length) < micro.lengths[:, None]
    return Layout(
        tokens=_grown(micro.tokens, size),
        real=real,
        offsets=None,
        natural=None,
        kept=None,
        rows=rows,
        length=length,
    )


def packed_length(micro: MicroBatch, *, multiple: int, cp_size: int) -> int:
    """Length of the row that `lay_out` packs, before context ranks split it."""
    total = sum(_up(extent, _pieces(cp_size)) for extent in _extents(micro))
    return _up(total, _unit(multiple, cp_size))


def _unit(multiple: int, cp_size: int) -> int:
    return cp_size * math.lcm(multiple, 2) if cp_size > 1 else multiple


def _pieces(cp_size: int) -> int:
    return 2 * cp_size if cp_size > 1 else 1


def _packed(micro: MicroBatch, *, multiple: int, context: tuple[int, int], at_least: int) -> Layout:
    rows, length = micro.tokens.shape
    rank, cp_size = context
    extents = _extents(micro)
    aligned = [_up(extent, _pieces(cp_size)) for extent in extents]
    total = _up(max(sum(aligned), at_least), _unit(multiple, cp_size))
    if total > sum(aligned):
        aligned.append(total - sum(aligned))  # padding is a text of its own
    offsets = np.concatenate([[0], np.cumsum(aligned)]).astype(np.int64)
    # where each position of the micro-batch lies in the aligned row
    place = np.concatenate([offsets[i] + np.arange(extent) for i, extent in enumerate(extents)])
    tokens, real = np.zeros(total, dtype=np.int64), np.zeros(total, dtype=bool)
    tokens[place] = micro.tokens.reshape(-1)
    for start, size in zip(offsets, micro.lengths, strict=False):
        real[start : start + size] = True
    natural = kept = None
    mine = np.arange(total)
    if cp_size > 1:
        held = [_held(offsets, each, cp_size) for each in range(cp_size)]
        mine = held[rank]
        natural = np.empty(total, dtype=np.int64)
        natural[np.concatenate(held)] = np.arange(total)
        kept = natural[place]
    return Layout(
        tokens=tokens[None, mine],
        real=real[None, mine],
        offsets=offsets,
        natural=natural,
        kept=kept,
        rows=rows,
        length=length,
    )


def _extents(micro: MicroBatch) -> list[int]:
    """Room of each text in the flattened micro-batch, padding behind it included."""
    if micro.offsets is None:
        return [micro.tokens.shape[1]] * len(micro.tokens)
    return np.diff(micro.offsets).tolist()


def _held(offsets: np.ndarray, rank: int, cp_size: int) -> np.ndarray:
    """Positions of the row that a context rank holds, text by text."""
    return np.concatenate(
        [
            start + zigzag_positions(int(end - start), cp_size, rank)
            for start, end in pairwise(offsets)
        ]
    )


def _grown(tokens: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if tokens.shape == size:
        return tokens
    grown = np.zeros(size, dtype=np.int64)
    grown[: tokens.shape[0], : tokens.shape[1]] = tokens
    return grown


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
