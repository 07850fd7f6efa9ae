"""Rows inside chunks: what the boundary row says of the student's next token in mid-piece.

At a student index inside a chunk the student has read some bytes u since the boundary. The
teacher's tokens that begin with u and go on say which student token comes next: the first one of
the rest of their bytes (docs/losses.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mopd.align.merge import largest_entries, native_rows, sum_entries
from mopd.align.temper import Tempered, row_blocks
from mopd.types import TeacherScores

_UNKNOWN = -2


@dataclass(frozen=True, kw_only=True)
class Interior:
    """The bytes of both vocabularies.

    Args:
        first_token: bytes -> the first student token of their encoding, or -1; called once for
            each place inside a teacher token, then remembered.
        min_mass: places where less of the boundary row goes on are left out.
    """

    student_bytes: Sequence[bytes]
    teacher_bytes: Sequence[bytes]
    first_token: Callable[[bytes], int]
    min_mass: float = 1e-3

    @cached_property
    def text(self) -> np.ndarray:
        """uint8: the teacher's tokens, one after the other."""
        return np.frombuffer(b"".join(self.teacher_bytes), dtype=np.uint8)

    @cached_property
    def length(self) -> np.ndarray:
        """[V_T] int64."""
        return np.fromiter(map(len, self.teacher_bytes), np.int64, count=len(self.teacher_bytes))

    @cached_property
    def begin(self) -> np.ndarray:
        """[V_T] int64: where each token begins in ``text``."""
        return np.cumsum(self.length) - self.length

    @cached_property
    def _first(self) -> np.ndarray:
        return np.full(len(self.text), _UNKNOWN, dtype=np.int32)

    def first_tokens(self, token: np.ndarray, offset: np.ndarray) -> np.ndarray:
        """First student token of teacher ``token`` from byte ``offset`` on; -1 for none."""
        place = self.begin[token] + offset
        unknown, index = np.unique(place, return_index=True)
        new = self._first[unknown] == _UNKNOWN
        for at, t, o in zip(unknown[new], token[index[new]], offset[index[new]], strict=True):
            self._first[at] = self.first_token(self.teacher_bytes[t][o:])
        return self._first[place]


def interior_rows(
    scores: TeacherScores,
    tempered: Tempered,
    *,
    position: np.ndarray,
    row: np.ndarray,
    sizes: np.ndarray,
    student_ids: np.ndarray,
    trainable: np.ndarray,
    interior: Interior,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The native fields of `TeacherRows`, and the covered share of each place inside a chunk.

    A teacher token that ends within u may go on with another one that fits: that is not counted,
    and the covered share is what is counted over all that fits.
    """
    chunk = np.repeat(np.arange(len(position)), np.maximum(sizes[:, 0] - 1, 0))
    where = _inside(position, sizes[:, 0])
    chunk, where = chunk[trainable[where]], where[trainable[where]]
    written = [interior.student_bytes[token] for token in student_ids]
    text = np.frombuffer(b"".join(written), dtype=np.uint8)
    start = np.concatenate([[0], np.cumsum([len(x) for x in written], dtype=np.int64)])
    begin = start[position[chunk]]
    consumed = start[where] - begin
    width = tempered.topk.shape[1]
    owners, tokens, masses = [np.zeros(0, int)], [np.zeros(0, int)], [np.zeros(0)]
    for part in row_blocks(len(chunk), width):
        teacher_row = row[chunk[part]]
        if scores.topk_ids is None:
            ids = np.broadcast_to(np.arange(width), (len(teacher_row), width))
        else:
            ids = scores.topk_ids[teacher_row]
        of, column = _fitting(ids, text, begin[part], consumed[part], interior)
        token = ids[of, column].astype(np.int64)
        offset = consumed[part][of]
        longer = interior.length[token] > offset
        first = np.full(len(token), -1, dtype=np.int64)
        first[longer] = interior.first_tokens(token[longer], offset[longer])
        owners.append(of + part.start)
        tokens.append(first)
        masses.append(np.exp(tempered.at(teacher_row[of], column).astype(np.float64)))
    return _collected(
        np.concatenate(owners), np.concatenate(tokens), np.concatenate(masses), where, interior
    )


def _inside(position: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Positions of all student tokens of the chunks but the first ones."""
    more = np.maximum(size - 1, 0)
    before = np.cumsum(more) - more
    return np.repeat(position + 1 - before, more) + np.arange(int(more.sum()))


def _fitting(
    ids: np.ndarray, text: np.ndarray, begin: np.ndarray, consumed: np.ndarray, interior: Interior
) -> tuple[np.ndarray, np.ndarray]:
    """(row, column) of listed tokens that agree with ``text[begin : begin + consumed]``.

    They begin with these bytes or are a beginning of them. Bytes are compared one after the other:
    few tokens survive the first.
    """
    of, column = np.nonzero(ids >= 0)
    token = ids[of, column]
    shared = np.minimum(interior.length[token], consumed[of])
    alive = np.flatnonzero(shared > 0)
    of, column, token, shared = of[alive], column[alive], token[alive], shared[alive]
    for byte in range(int(shared.max(initial=0))):
        beyond = shared <= byte
        place = np.where(beyond, 0, interior.begin[token] + byte)
        read = np.where(beyond, 0, begin[of] + byte)
        same = np.flatnonzero(beyond | (interior.text[place] == text[read]))
        of, column, token, shared = of[same], column[same], token[same], shared[same]
        if byte + 1 >= int(shared.max(initial=0)):
            break
    return of, column


def _collected(
    owner: np.ndarray,
    token: np.ndarray,
    mass: np.ndarray,
    where: np.ndarray,
    interior: Interior,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    fits = np.bincount(owner, weights=mass, minlength=len(where))
    counted = token >= 0
    total = np.bincount(owner[counted], weights=mass[counted], minlength=len(where))
    covered = np.divide(total, fits, out=np.zeros(len(where)), where=fits > 0)
    kept = total >= interior.min_mass
    number = np.cumsum(kept) - 1
    mine = counted & kept[owner]
    rows, tokens, _, summed = sum_entries(number[owner[mine]], token[mine], mass[mine])
    share = summed / total[kept][rows]
    lists = largest_entries(rows, tokens, share, num_rows=int(kept.sum()), width=None)
    return native_rows(where[kept], lists), covered
