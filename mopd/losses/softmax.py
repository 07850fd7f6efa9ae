"""From slopes in the student's probabilities to gradients in its logits, in one buffer.

With dD/dq_s = rest + excess_s, and excess nonzero for a few columns, the gradient in the logits is
q_s (excess_s - mean), mean = sum_s q_s excess_s: one pass over the vocabulary, a few entries added.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mopd.losses.vocab import VocabShard


@dataclass(frozen=True, slots=True, kw_only=True)
class Slopes:
    """A divergence of each row and its derivative in the row's probabilities.

    ``parts`` are (columns, excess): columns local, [r, K] row by row or [E] alike for all rows,
    which may repeat; excess [r, K] or [r, E], 0 where a column belongs to another shard.
    """

    value: Tensor  # [r]
    rest: Tensor  # [r]: dD/dq of a column that no part names
    mean: Tensor  # [r]: sum of q * excess over all shards
    parts: tuple[tuple[Tensor, Tensor], ...]
    kl: Tensor | None = None  # [r] the divergence in it, where ``value`` holds other terms too


class RowGradient:
    """Collects d(loss)/d(logits) for the rows of one softmax ``probs`` [n, V_local].

    `write` turns ``probs`` into the gradient; until then it must stay as it is.
    """

    def __init__(self, probs: Tensor) -> None:
        self._probs = probs
        self._base = probs.new_zeros(len(probs))
        self._parts: list[tuple[Tensor | None, Tensor, Tensor]] = []
        self._points: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, slopes: Slopes, rows: Tensor, weight: Tensor) -> None:
        """``weight`` [r] times the divergences of ``rows`` [r]."""
        whole = self._whole(rows)
        probs = self._probs if whole else None
        mean = weight * slopes.mean
        self._base -= mean if whole else torch.zeros_like(self._base).index_add_(0, rows, mean)
        for columns, excess in slopes.parts:
            if columns.dim() == 1:
                at = rows_of(self._probs, rows).index_select(1, columns)
            elif probs is not None:
                at = probs.gather(1, columns)
            else:
                at = self._probs[rows[:, None], columns]
            amount = at.mul_(excess).mul_(weight[:, None])
            self._parts.append((None if whole else rows, columns, amount))

    def add_points(self, rows: Tensor, columns: Tensor, amount: Tensor) -> None:
        """Entries that already are gradients in the logits."""
        self._points.append((rows, columns, amount))

    def add_logprobs(self, rows: Tensor, columns: Tensor, amount: Tensor, *, mine: Tensor) -> None:
        """``amount`` [t] times log p of one column in each of ``rows`` [t].

        ``columns`` are local and clamped; ``mine`` tells which of them live on this shard.
        """
        self._base -= torch.zeros_like(self._base).index_add_(0, rows, amount)
        self.add_points(rows, columns, torch.where(mine, amount, 0.0))

    def write(self, scale: float) -> None:
        """``probs`` becomes ``scale`` times the gradient."""
        out = self._probs.mul_((self._base * scale)[:, None])
        for rows, columns, amount in self._parts:
            amount.mul_(scale)
            if rows is not None:
                where = (rows[:, None], columns if columns.dim() == 2 else columns[None, :])
                out.index_put_(where, amount, accumulate=True)
            elif columns.dim() == 1:
                out.index_add_(1, columns, amount)
            else:
                out.scatter_add_(1, columns, amount)
        for rows, columns, amount in self._points:
            out.index_put_((rows, columns), amount * scale, accumulate=True)

    def _whole(self, rows: Tensor) -> bool:
        return len(rows) == len(self._probs)  # rows ascend without repeats


def rows_of(probs: Tensor, rows: Tensor) -> Tensor:
    """``probs[rows]``, without a copy when ``rows`` (ascending) are all."""
    return probs if len(rows) == len(probs) else probs[rows]


def tempered(logits: Tensor, out: Tensor, temperature: float, shard: VocabShard) -> Tensor:
    """Softmax of ``logits / temperature`` in ``out``."""
    if temperature == 1.0:
        return shard.softmax(logits, out=out)
    return shard.softmax(torch.div(logits, temperature, out=out), out=out)
