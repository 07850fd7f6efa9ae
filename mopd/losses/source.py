"""Where a block of logits comes from, and where its gradient goes."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mopd.losses.rows import Block
from mopd.losses.vocab import VocabShard


class Source(Protocol):
    """Rows of vocabulary-parallel logits without padded columns, in float32 (or float64).

    `read` gives logits [n, V_local] that stay unchanged; `buffer` gives room of the same shape, and
    `add` takes it back holding the gradient of these rows.
    """

    dtype: torch.dtype
    device: torch.device

    def read(self, block: Block) -> Tensor: ...

    def buffer(self, block: Block) -> Tensor: ...

    def add(self, block: Block, gradient: Tensor) -> None: ...


class LogitsSource:
    """Logits [N, V_local] that exist; their gradient has the same shape and dtype.

    A block of neighbouring rows is read, and its gradient written, in place.
    """

    def __init__(self, logits: Tensor, shard: VocabShard) -> None:
        self.dtype = torch.promote_types(logits.dtype, torch.float32)
        self.device = logits.device
        self._logits = logits
        self._gradient = torch.empty_like(logits)
        self._real = shard.without_padding().size
        self._written = np.zeros(len(logits), dtype=bool)

    def read(self, block: Block) -> Tensor:
        span = block.span
        if span is not None:
            return self._logits[span, : self._real].to(self.dtype)
        return self._logits[self._index(block), : self._real].to(self.dtype)

    def buffer(self, block: Block) -> Tensor:
        if self._in_place(block):
            return self._gradient[block.span, : self._real]
        size = (len(block.positions), self._real)
        return torch.empty(size, dtype=self.dtype, device=self.device)

    def add(self, block: Block, gradient: Tensor) -> None:
        fresh = not self._written[block.positions].any()
        if not self._in_place(block):
            index = block.span if block.span is not None else self._index(block)
            if not fresh:
                self._clear(block)
            view = self._gradient[:, : self._real]
            value = gradient.to(view.dtype)
            view[index] = value if fresh else view[index] + value
        self._written[block.positions] = True

    def finish(self) -> Tensor:
        """The gradient [N, V_local]: 0 in rows that nobody wrote and in padded columns."""
        missing = np.flatnonzero(~self._written)
        if len(missing) == len(self._written):
            self._gradient.zero_()
        elif len(missing):
            self._gradient[torch.as_tensor(missing, device=self.device)] = 0.0
        if self._real < self._gradient.shape[1]:
            self._gradient[:, self._real :] = 0.0
        return self._gradient

    def _in_place(self, block: Block) -> bool:
        return (
            block.span is not None
            and self._gradient.dtype == self.dtype
            and not self._written[block.positions].any()
        )

    def _clear(self, block: Block) -> None:
        """Rows of a block that is partly written: those nobody wrote become 0."""
        rows = block.positions[~self._written[block.positions]]
        if len(rows):
            self._gradient[torch.as_tensor(rows, device=self.device)] = 0.0

    def _index(self, block: Block) -> Tensor:
        return torch.as_tensor(block.positions, device=self.device)
