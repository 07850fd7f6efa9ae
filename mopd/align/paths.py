"""Path terms: what the teacher's rows along the actual text say of the student's own next token.

A walk (docs/losses.md) follows the teacher's actual pieces from a boundary through the trie of
the student's longer tokens; every leaf and every stop it passes is a slot with a probability.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mopd.types import FibreTrie, TeacherScores, ragged_arange

_NO_STOP = np.iinfo(np.int64).min


@dataclass(frozen=True, slots=True, kw_only=True)
class PathOptions:
    """``paths`` maps teacher piece paths to nodes of ``trie``; ``fold`` [V_T] gives the columns."""

    trie: FibreTrie
    paths: Mapping[tuple[int, ...], int]
    fold: np.ndarray
    max_length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tempered:
    """Teacher log-probabilities at the loss's temperature."""

    topk: np.ndarray  # [T, K] float32
    log_tail: np.ndarray  # [T] float32
    actual: np.ndarray  # [T] float32


@dataclass(slots=True)
class _Walk:
    """The boundaries whose actual text is still inside the trie, one level at a time."""

    boundary: np.ndarray  # [A] index of the boundary
    node: np.ndarray  # [A] trie node of the pieces walked so far
    row: np.ndarray  # [A] teacher row after those pieces
    reach: np.ndarray  # [A] teacher's probability of those pieces, given the boundary's column
    stop: np.ndarray  # [A] slot of the student token written when the text goes on otherwise


@dataclass(slots=True)
class _Entries:
    """Tokens and their slots. Entries of one (boundary, slot) add up to one probability."""

    boundary: np.ndarray  # [M]
    slot: np.ndarray  # [M] the key of the slot's first member
    key: np.ndarray  # [M] a trie group, or -1 - student token
    prob: np.ndarray  # [M]


def path_targets(
    scores: TeacherScores,
    tempered: Tempered,
    *,
    position: np.ndarray,
    row: np.ndarray,
    options: PathOptions | None,
) -> dict[str, np.ndarray]:
    """The path fields of `TeacherRows` for boundaries at ``position`` with teacher rows ``row``.

    The boundary row says how likely the column is; the rows after it say how the text goes on, so
    by the chain rule they say which of the student tokens behind that column comes next. Tokens
    that the rows do not tell apart share a slot: those that begin with other pieces of the same
    column share the stop's, and so do those of a group that no token of its own ends.
    """
    parts = [] if options is None else _walk(scores, tempered, row=row, options=options)
    columns = [
        np.concatenate([getattr(p, name) for p in parts] or [np.zeros(0)])
        for name in ("boundary", "slot", "key", "prob")
    ]
    boundary, slot, key = (column.astype(np.int64) for column in columns[:3])
    told = slot != _NO_STOP
    entries, inverse = np.unique(
        np.stack([boundary, slot, key])[:, told], axis=1, return_inverse=True
    )
    first = np.any(np.diff(entries[:2], axis=1, prepend=-1 - entries[:2, :1]) != 0, axis=0)
    entry_slot = np.cumsum(first) - 1
    owner = entries[0][first]
    mass = np.bincount(
        entry_slot[inverse.reshape(-1)], weights=columns[3][told], minlength=len(owner)
    )
    rows, index, counts = np.unique(owner, return_inverse=True, return_counts=True)
    total = np.bincount(index, weights=mass, minlength=len(rows))
    return {
        "path_position": position[rows],
        "path_weight": np.minimum(total, 1.0).astype(np.float32),
        "path_offsets": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        "path_target": (mass / np.maximum(total, 1e-30)[index]).astype(np.float32),
        "path_entry_slot": entry_slot,
        "path_entry": entries[2],
    }


def _walk(
    scores: TeacherScores, tempered: Tempered, *, row: np.ndarray, options: PathOptions
) -> list[_Entries]:
    """All walks, level by level."""
    parts: list[_Entries] = []
    walk = _first_level(scores, tempered, row=row, options=options)
    for length in range(1, options.max_length):
        if not len(walk.node):
            break
        following = _nodes(scores, row[walk.boundary], length + 1, options.paths)
        entries, walk = _level(scores, tempered, walk, following=following, options=options)
        parts.append(entries)
    return parts


def _first_level(
    scores: TeacherScores, tempered: Tempered, *, row: np.ndarray, options: PathOptions
) -> _Walk:
    node = _nodes(scores, row, 1, options.paths)
    boundary = np.flatnonzero(node >= 0)
    return _Walk(
        boundary=boundary,
        node=node[boundary],
        row=row[boundary] + 1,
        reach=_column_share(scores, tempered, row[boundary], options.fold),
        stop=_stop_slot(options.trie, node[boundary]),
    )


def _stop_slot(trie: FibreTrie, node: np.ndarray) -> np.ndarray:
    stop = trie.stop_token[node].astype(np.int64)
    return np.where(stop >= 0, -1 - stop, _NO_STOP)


def _level(
    scores: TeacherScores,
    tempered: Tempered,
    walk: _Walk,
    *,
    following: np.ndarray,
    options: PathOptions,
) -> tuple[_Entries, _Walk]:
    """The slots at the present nodes, and the walk one actual piece further."""
    trie = options.trie
    groups = trie.group_ptr[walk.node + 1] - trie.group_ptr[walk.node]
    of = np.repeat(np.arange(len(walk.node)), groups)
    group = ragged_arange(trie.group_ptr[walk.node], groups)
    source = walk.row[of]
    hit = scores.topk_ids[source] == trie.group_piece[group][:, None]
    prob = np.where(hit, np.exp(tempered.topk[source].astype(np.float64)), 0.0).sum(axis=1)
    stopped = np.maximum(1.0 - np.bincount(of, weights=prob, minlength=len(groups)), 0.0)

    taken = (following >= 0)[of] & (trie.group_piece[group] == scores.token_ids[source])
    joined = ~taken & trie.group_open[group]
    entries = _level_entries(
        walk, of=of, group=group, prob=walk.reach[of] * prob, joined=joined, taken=taken
    )
    parts = [entries, _stops(walk, walk.reach * stopped)]
    if len(walk.node) and trie.node_column[walk.node[0]] >= 0:  # the first level
        parts += [_stops(walk, 1.0 - walk.reach), _beside(walk, trie)]
    onward = following >= 0
    step = np.bincount(of[taken], weights=prob[taken], minlength=len(groups))
    own_stop = _stop_slot(trie, np.maximum(following, 0))
    return _concatenate(parts), _Walk(
        boundary=walk.boundary[onward],
        node=following[onward],
        row=walk.row[onward] + 1,
        reach=(walk.reach * step)[onward],
        stop=np.where(own_stop == _NO_STOP, walk.stop, own_stop)[onward],
    )


def _level_entries(
    walk: _Walk,
    *,
    of: np.ndarray,
    group: np.ndarray,
    prob: np.ndarray,
    joined: np.ndarray,
    taken: np.ndarray,
) -> _Entries:
    """The groups off the actual path; the one on it is told apart at the next level."""
    leaf = ~taken
    return _Entries(
        boundary=walk.boundary[of[leaf]],
        slot=np.where(joined, walk.stop[of], group)[leaf],
        key=group[leaf],
        prob=prob[leaf],
    )


def _stops(walk: _Walk, prob: np.ndarray) -> _Entries:
    return _Entries(boundary=walk.boundary, slot=walk.stop, key=walk.stop, prob=prob)


def _beside(walk: _Walk, trie: FibreTrie) -> _Entries:
    """Student tokens behind the other one-piece nodes of the column: part of the stop's slot."""
    column = trie.node_column[walk.node]
    siblings = trie.column_ptr[column + 1] - trie.column_ptr[column]
    of = np.repeat(np.arange(len(walk.node)), siblings)
    node = trie.column_node[ragged_arange(trie.column_ptr[column], siblings)]
    of, node = of[node != walk.node[of]], node[node != walk.node[of]]
    groups = trie.group_ptr[node + 1] - trie.group_ptr[node]
    of = np.repeat(of, groups)
    return _Entries(
        boundary=walk.boundary[of],
        slot=walk.stop[of],
        key=ragged_arange(trie.group_ptr[node], groups),
        prob=np.zeros(len(of)),
    )


def _concatenate(parts: list[_Entries]) -> _Entries:
    names = ("boundary", "slot", "key", "prob")
    return _Entries(**{n: np.concatenate([getattr(p, n) for p in parts]) for n in names})


def _nodes(
    scores: TeacherScores, begin: np.ndarray, length: int, paths: Mapping[tuple[int, ...], int]
) -> np.ndarray:
    """[A] node of the ``length`` actual pieces from ``begin``; -1 where the walk ends.

    It ends at a path that no student token goes on from, at the end of the response (a path needs
    the row after it) and at a teacher row that is missing.
    """
    ids, valid = scores.token_ids.tolist(), scores.valid
    found = np.full(len(begin), -1, dtype=np.int64)
    for index, low in enumerate(begin.tolist()):
        high = low + length
        if high < len(ids) and valid[high]:
            found[index] = paths.get(tuple(ids[low:high]), -1)
    return found


def _column_share(
    scores: TeacherScores, tempered: Tempered, row: np.ndarray, fold: np.ndarray
) -> np.ndarray:
    """[A] P(actual token) over P(all tokens of its column) in teacher rows ``row``."""
    actual = scores.token_ids[row]
    own = np.exp(tempered.actual[row].astype(np.float64))
    ids = scores.topk_ids[row]
    same = (ids >= 0) & (ids != actual[:, None])
    same &= fold[np.clip(ids, 0, len(fold) - 1)] == fold[actual][:, None]
    others = np.where(same, np.exp(tempered.topk[row].astype(np.float64)), 0.0).sum(axis=1)
    return own / np.maximum(own + others, 1e-30)
