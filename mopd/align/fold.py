"""Teacher mass moved to the columns that stand for it, in listed and in whole rows.

The fold (docs/losses.md) makes both sides one coarsening of the same events: mass of a teacher
token that the student lacks goes to the column where the student's own spelling of it begins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mopd.align.temper import row_blocks


def fold_rows(
    ids: np.ndarray, logprobs: np.ndarray, log_tail: np.ndarray, fold: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Moves each id to ``fold[id]``, adds up what meets, and what folds to null joins the tail.

    Args:
        ids: [R, K] teacher tokens, no two alike in a row, -1 where padded; logprobs: [R, K].
        log_tail: [R]; fold: [V_T], V_T for null.
    Returns:
        The same three, float32. A row without folded ids is left as it is; the others ascend,
        with -1 where entries met.
    """
    table = np.append(fold, len(fold)).astype(np.int32)  # padding, -1, is the last entry: null
    target = table[ids]
    moved = np.flatnonzero(((target != ids) & (ids >= 0)).any(axis=1))
    logprobs, log_tail = logprobs.astype(np.float32), log_tail.astype(np.float32)
    if 2 * len(moved) > len(ids):
        return _fold_all(target, ids, logprobs, log_tail, null=len(fold))
    out = (ids.astype(np.int32), logprobs, log_tail)
    if len(moved):
        parts = _fold_all(
            target[moved], ids[moved], logprobs[moved], log_tail[moved], null=len(fold)
        )
        for whole, part in zip(out, parts, strict=True):
            whole[moved] = part
    return out


def _fold_all(
    target: np.ndarray, ids: np.ndarray, logprobs: np.ndarray, log_tail: np.ndarray, *, null: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows, width = target.shape
    shift = max(width - 1, 1).bit_length()
    # sorting (target, column) as one integer is several times faster than an argsort
    kind = np.int32 if (null + 1) << shift < 2**31 else np.int64
    key = (target.astype(kind) << shift) | np.arange(width, dtype=kind)
    key.sort(axis=1)
    source = (np.arange(rows)[:, None] * width + (key & ((1 << shift) - 1))).reshape(-1)
    out_ids = (key >> shift).astype(np.int32, copy=False).reshape(-1)
    out = logprobs.reshape(-1)[source]

    follows = np.zeros((rows, width), dtype=bool)
    np.equal(
        out_ids.reshape(rows, width)[:, 1:], out_ids.reshape(rows, width)[:, :-1], follows[:, 1:]
    )
    follows = follows.reshape(-1)
    lost = out_ids == null
    follows &= ~lost
    members = follows.copy()
    members[:-1] |= follows[1:]
    index = np.flatnonzero(members)
    if len(index):
        first = np.flatnonzero(~follows[index])
        with np.errstate(divide="ignore"):
            summed = np.log(np.add.reduceat(np.exp(out[index].astype(np.float64)), first))
        out[index], out_ids[follows] = -np.inf, -1
        out[index[first]] = summed

    index = np.flatnonzero(lost)
    mass = np.exp(out[index].astype(np.float64)) * (ids.reshape(-1)[source[index]] >= 0)
    out_ids[index], out[index] = -1, -np.inf
    tail = np.exp(log_tail.astype(np.float64))
    tail += np.bincount(index // width, weights=mass, minlength=rows)
    with np.errstate(divide="ignore"):
        tail = np.log(tail).astype(np.float32)
    return out_ids.reshape(rows, width), out.reshape(rows, width), tail


def keep_columns(
    ids: np.ndarray, logprobs: np.ndarray, log_tail: np.ndarray, columns: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Listed rows cut to ``columns`` [K], ascending; the mass of the others joins the tail."""
    place = np.minimum(np.searchsorted(columns, ids), len(columns) - 1)
    kept = columns[place] == ids
    lost = np.where(kept | (ids < 0), 0.0, np.exp(logprobs.astype(np.float64))).sum(axis=1)
    with np.errstate(divide="ignore"):
        tail = np.log(np.exp(log_tail.astype(np.float64)) + lost)
    return (
        np.where(kept, ids, -1).astype(np.int32),
        np.where(kept, logprobs, -np.inf).astype(np.float32),
        tail.astype(np.float32),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnMap:
    """Where the columns of whole rows go: ``order[starts[c] : starts[c + 1]]`` to ``ids[c]``."""

    ids: np.ndarray  # [K] int32, ascending
    order: np.ndarray  # [n] int64 teacher columns
    starts: np.ndarray  # [K] int64
    outside: np.ndarray  # [V_T] float64: 1 where the column joins the tail
    lost: np.ndarray  # [V_T] bool: kept columns that fold to null

    def apply(self, logprobs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[R, V_T] normalised log-probabilities -> ([R, K] float32, log_tail [R] float32)."""
        out = np.empty((len(logprobs), len(self.ids)), dtype=np.float32)
        tail = np.empty(len(logprobs), dtype=np.float32)
        alone = len(self.order) == len(self.ids)
        for part in row_blocks(len(logprobs), logprobs.shape[1]):
            mass = np.exp(logprobs[part].astype(np.float64))
            with np.errstate(divide="ignore"):
                tail[part] = np.log(mass @ self.outside)
                if alone:
                    out[part] = logprobs[part][:, self.order]
                else:
                    out[part] = np.log(np.add.reduceat(mass[:, self.order], self.starts, axis=1))
        return out, tail


def column_map(size: int, *, fold: np.ndarray | None, columns: np.ndarray | None) -> ColumnMap:
    """The map of rows over ``size`` teacher tokens: ``columns`` are kept, then folded."""
    target = np.full(size, size, dtype=np.int64)
    kept = np.arange(size) if columns is None else columns.astype(np.int64)
    target[kept] = kept if fold is None else fold[kept]
    order = np.argsort(target, kind="stable")[: int((target < size).sum())]
    ids, starts = np.unique(target[order], return_index=True)
    return ColumnMap(
        ids=ids.astype(np.int32),
        order=order,
        starts=starts,
        outside=(target == size).astype(np.float64),
        lost=np.zeros(size, dtype=bool) if fold is None else _lost(size, fold, kept),
    )


def _lost(size: int, fold: np.ndarray, kept: np.ndarray) -> np.ndarray:
    lost = np.zeros(size, dtype=bool)
    lost[kept] = fold[kept] == size
    return lost
