"""All token bytes in one array: the bytes of a sequence of ids in a handful of array operations.

Shape legend: V tokens of the vocabulary, D bytes of all of them, S ids, N bytes of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteTable:
    """Token v has the bytes ``data[begins[v] : begins[v] + lengths[v]]``.

    Row V is empty and stands for every id that no token has, such as a padded column of a model.
    """

    lengths: np.ndarray  # [V + 1] int64
    begins: np.ndarray  # [V + 1] int64
    data: np.ndarray  # [D] uint8

    @classmethod
    def of(cls, token_bytes: Sequence[bytes]) -> ByteTable:
        lengths = np.fromiter(map(len, (*token_bytes, b"")), dtype=np.int64)
        return cls(
            lengths=lengths,
            begins=np.cumsum(lengths) - lengths,
            data=np.frombuffer(b"".join(token_bytes), dtype=np.uint8),
        )

    def rows(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """[S] int64: the row of each id."""
        return np.minimum(np.asarray(ids, dtype=np.int64), len(self.lengths) - 1)

    def ends(self, rows: np.ndarray) -> np.ndarray:
        """[S] int64: bytes after each of ``rows``."""
        return np.cumsum(self.lengths[rows])

    def spell(self, rows: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """[N] uint8: the bytes of ``rows``, whose `ends` are given."""
        if not len(rows):
            return np.zeros(0, dtype=np.uint8)
        counts = self.lengths[rows]
        index = np.repeat(self.begins[rows] - ends + counts, counts)
        index += np.arange(len(index))
        return self.data[index]
