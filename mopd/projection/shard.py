"""One tensor-parallel rank's rows of a projection, on its device, column by column."""

from __future__ import annotations

import copy

import numpy as np
import torch

from mopd.types import Projection, ragged_arange


class ProjectionShard:
    """The rows ``start:end`` of W as CSC, and the fibre members that this rank owns.

    The host copy stays where it is; only this rank's entries are copied to ``device``: one local
    student row and one weight per nonzero of its rows, and two arrays of the teacher's length,
    where its columns begin and the partners of equal bytes. The trie is read on the host.
    """

    def __init__(
        self, projection: Projection, *, start: int, end: int, device: torch.device
    ) -> None:
        end = min(end, projection.student_size)
        start = min(start, end)
        low, high = int(projection.crow[start]), int(projection.crow[end])
        col = projection.col[low:high].astype(np.int64)
        row = np.repeat(np.arange(end - start), np.diff(projection.crow[start : end + 1]))
        order = np.argsort(col, kind="stable")
        counts = np.bincount(col, minlength=projection.teacher_size + 1)
        self.teacher_size = projection.teacher_size
        self.column_ptr = torch.as_tensor(_offsets(counts), device=device)
        self.row = torch.as_tensor(row[order], device=device)
        self.val = torch.as_tensor(projection.val[low:high][order], device=device)
        self.common = torch.as_tensor(projection.common.astype(np.int64), device=device)
        self._trie = projection.trie
        self._local = (start, end)
        self.device = device

    def columns(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Entries of columns ``ids`` [G]: (local student row, index into ids, value), each [E]."""
        begin, end = self.column_ptr[ids], self.column_ptr[ids + 1]
        index = torch.repeat_interleave(torch.arange(len(ids), device=ids.device), end - begin)
        entry = _ragged_arange(begin, end - begin)
        return self.row[entry], index, self.val[entry]

    def without_common(self) -> ProjectionShard:
        """The same rows with no partners of equal bytes, for losses that ignore identity."""
        return self.with_common(np.full(self.teacher_size, -1, dtype=np.int32))

    def with_common(self, common: np.ndarray) -> ProjectionShard:
        """The same rows with other partners [V_T] int32: a student token, or -1 for none."""
        assert common.shape == (self.teacher_size,), common.shape
        twin = copy.copy(self)
        twin.common = torch.as_tensor(common.astype(np.int64), device=self.device)
        return twin

    @property
    def num_entries(self) -> int:
        """Nonzeros of W in this rank's rows, those of the null column included."""
        return len(self.row)

    @property
    def device_bytes(self) -> int:
        """What this shard holds on its device: 12 per entry, 8 per teacher token twice over."""
        held = (self.row, self.val, self.column_ptr, self.common)
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def fibre_entries(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Student tokens of path slots [E] (a trie group, or -1 - token) that this rank owns.

        Returns (index into ``slots``, local student token), one entry per token.
        """
        trie = self._trie
        single = slots < 0
        group = slots[~single]
        members = trie.member_ptr[group + 1] - trie.member_ptr[group]
        token = trie.member_token[ragged_arange(trie.member_ptr[group], members)]
        slot = np.concatenate([np.repeat(np.flatnonzero(~single), members), np.flatnonzero(single)])
        token = np.concatenate([token, -1 - slots[single]])
        start, end = self._local
        mine = (token >= start) & (token < end)
        return slot[mine], token[mine] - start


def _ragged_arange(begin: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Concatenation of ``begin[i] : begin[i] + count[i]``."""
    total = int(count.sum())
    before = torch.cumsum(count, 0) - count
    offset = torch.repeat_interleave(begin - before, count, output_size=total)
    return offset + torch.arange(total, device=begin.device)


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
