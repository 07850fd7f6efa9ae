"""Where a block of logits comes from, and where its gradient goes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mopd.losses.rows import Block
from mopd.losses.sizes import PANEL_ROWS
from mopd.losses.vocab import VocabShard

SLICE_ELEMENTS = 8_000_000  # of a product that is rounded before it is added up


class Source(Protocol):
    """Rows of vocabulary-parallel logits without padded columns, in float32 (or float64).

    `visit` goes through blocks in their order, and a block's logits and room last until the next
    one. `read` gives logits [n, V_local] that stay unchanged; `buffer` gives room of the same
    shape, and `add` takes it back holding the gradient of these rows.
    """

    dtype: torch.dtype
    device: torch.device

    def visit(self, blocks: Sequence[Block]) -> Iterator[Block]: ...

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

    def visit(self, blocks: Sequence[Block]) -> Iterator[Block]:
        return iter(blocks)

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


class LinearSource:
    """Logits ``hidden [N, H] @ weight [V_local, H].T`` that exist for one panel of rows at a time.

    A panel is a run of blocks; only visited rows are multiplied. A block's gradient takes the place
    of its logits in the panel. Products are taken in the dtype of the inputs, as an output layer
    takes them, and gradients add up in float32 (or float64). A ``frozen`` weight gets none.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, shard: VocabShard, *, frozen: bool) -> None:
        self.dtype = torch.promote_types(hidden.dtype, torch.float32)
        self.device = hidden.device
        self._hidden = hidden
        self._weight = weight
        self._columns = weight[: shard.without_padding().size]
        self._hidden_gradient = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device)
        self._weight_gradient = None
        if not frozen:
            self._weight_gradient = torch.zeros(weight.shape, dtype=self.dtype, device=self.device)
        self._room: dict[str, Tensor] = {}
        self._panel = _Panel(rows=hidden[:0], values=hidden[:0])

    def visit(self, blocks: Sequence[Block]) -> Iterator[Block]:
        for panel in _panels(blocks):
            positions = np.concatenate([block.positions for block in panel])
            index = torch.as_tensor(positions, device=self.device)
            self._open(index)
            for block in panel:
                yield block
                self._panel.first += len(block.positions)
            if self._panel.written:
                self._close(index)

    def read(self, block: Block) -> Tensor:
        logits = self._panel.cut(block)
        if logits.dtype == self.dtype:
            return logits
        return self._scratch("upcast", len(logits), self.dtype).copy_(logits)

    def buffer(self, block: Block) -> Tensor:
        return self._scratch("buffer", len(block.positions), self.dtype)

    def add(self, block: Block, gradient: Tensor) -> None:
        self._panel.cut(block).copy_(gradient)
        self._panel.written = True

    def finish(self) -> tuple[Tensor, Tensor | None]:
        """The gradients [N, H] and [V_local, H] in the dtypes of the inputs; 0 in padded rows."""
        self._room.clear()  # before the casts below need room
        self._panel = _Panel(rows=self._hidden[:0], values=self._hidden[:0])
        of_hidden, of_weight = self._hidden_gradient, self._weight_gradient
        return (
            of_hidden.to(self._hidden.dtype),
            None if of_weight is None else of_weight.to(self._weight.dtype),
        )

    def _open(self, index: Tensor) -> None:
        rows = self._hidden[index]
        room = self._scratch("panel", len(rows), rows.dtype)
        self._panel = _Panel(rows=rows, values=torch.mm(rows, self._columns.t(), out=room))

    def _close(self, index: Tensor) -> None:
        """Both products of the chain rule; every block of the panel has been written."""
        rows, gradient = self._panel.rows, self._panel.values
        self._hidden_gradient.index_add_(0, index, (gradient @ self._columns).to(self.dtype))
        if self._weight_gradient is None:
            return
        total = self._weight_gradient[: len(self._columns)]
        if gradient.dtype == self.dtype:
            total.addmm_(gradient.t(), rows)
            return
        height = max(1, SLICE_ELEMENTS // max(total.shape[1], 1))
        for begin in range(0, len(total), height):
            cut = slice(begin, begin + height)
            total[cut].add_(gradient[:, cut].t() @ rows)

    def _scratch(self, name: str, rows: int, dtype: torch.dtype) -> Tensor:
        """[rows, V_local without padding] of one allocation per name, which holds anything."""
        width = len(self._columns)
        if name not in self._room or len(self._room[name]) < rows:
            self._room[name] = torch.empty((rows, width), dtype=dtype, device=self.device)
        return self._room[name][:rows]


@dataclass(slots=True, kw_only=True)
class _Panel:
    """The rows in hand, and where among them the current block begins."""

    rows: Tensor  # [p, H]
    values: Tensor  # [p, V_local]: logits, then their gradient
    first: int = 0
    written: bool = False

    def cut(self, block: Block) -> Tensor:
        return self.values[self.first : self.first + len(block.positions)]


def _panels(blocks: Sequence[Block]) -> Iterator[list[Block]]:
    """Runs of blocks with at most `PANEL_ROWS` rows, or single blocks that have more."""
    panel: list[Block] = []
    rows = 0
    for block in blocks:
        if panel and rows + len(block.positions) > PANEL_ROWS:
            yield panel
            panel, rows = [], 0
        panel.append(block)
        rows += len(block.positions)
    if panel:
        yield panel
