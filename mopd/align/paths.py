"""Path terms: what the teacher's rows along the actual text say of the student's own next token.

A walk (docs/losses.md) follows the teacher's actual pieces from a boundary through the trie of
the student's longer tokens; every leaf and every stop it passes is a slot with a probability.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from mopd.align.canonical import Members, column_entries, moved
from mopd.align.slots import NO_STOP, Entries, concatenate, slots_of
from mopd.align.temper import Tempered
from mopd.types import FibreTrie, TeacherScores, ragged_arange


@dataclass(frozen=True, kw_only=True)
class PathOptions:
    """``fold`` [V_T] gives the columns; paths have fewer than ``max_length`` pieces.

    ``canonical``: the text's own mass goes to the student's own next token of that text
    (`mopd.align.canonical`).
    """

    trie: FibreTrie
    fold: np.ndarray
    max_length: int
    canonical: bool = False

    @cached_property
    def index(self) -> TrieIndex:
        return trie_index(self.trie, self.fold)

    @cached_property
    def members(self) -> Members:
        return Members.of(self.trie)

    @cached_property
    def column_of(self) -> np.ndarray:
        """[V_T + 1] the number of each column that has one-piece paths, else -1."""
        found = np.full(len(self.fold) + 1, -1, dtype=np.int64)
        ones = np.flatnonzero(self.trie.node_column >= 0)
        found[self.fold[self.trie.node_piece[self.trie.node_ptr[ones]]]] = self.trie.node_column[
            ones
        ]
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class TrieIndex:
    """Integer tables for walking the trie, one piece at a time."""

    root: np.ndarray  # [V_T] int64: node of the one-piece path, or -1
    key: np.ndarray  # [n] int64, ascending: parent node * V_T + piece
    child: np.ndarray  # [n] int64
    column_token: np.ndarray  # [V_T] int64: teacher tokens, column by column
    column_begin: np.ndarray  # [V_T] int64: where the tokens of a token's column begin
    column_size: np.ndarray  # [V_T] int64: how many they are

    def children(self, node: np.ndarray, piece: np.ndarray) -> np.ndarray:
        """The node behind ``piece`` at each ``node``; -1 where there is none."""
        if not len(self.key):
            return np.full(len(node), -1, dtype=np.int64)
        wanted = node * len(self.root) + piece
        place = np.minimum(np.searchsorted(self.key, wanted), len(self.key) - 1)
        return np.where((self.key[place] == wanted) & (node >= 0), self.child[place], -1)


def trie_index(trie: FibreTrie, fold: np.ndarray) -> TrieIndex:
    """The tables of ``trie``: a node's parent is the node of its path without the last piece."""
    size = len(fold)
    length = np.diff(trie.node_ptr)
    counts = np.bincount(fold, minlength=size + 1)
    index = TrieIndex(
        root=np.full(size, -1, dtype=np.int64),
        key=np.zeros(0, dtype=np.int64),
        child=np.zeros(0, dtype=np.int64),
        column_token=np.argsort(fold, kind="stable"),
        column_begin=(np.cumsum(counts) - counts)[fold],
        column_size=counts[fold],
    )
    ones = np.flatnonzero(length == 1)
    index.root[trie.node_piece[trie.node_ptr[ones]]] = ones
    for depth in range(2, int(length.max(initial=1)) + 1):
        nodes = np.flatnonzero(length == depth)
        piece = trie.node_piece[trie.node_ptr[nodes][:, None] + np.arange(depth)].astype(np.int64)
        parent = index.root[piece[:, 0]]
        for level in range(1, depth - 1):
            parent = index.children(parent, piece[:, level])
        nodes, parent, last = nodes[parent >= 0], parent[parent >= 0], piece[parent >= 0, -1]
        key = np.concatenate([index.key, parent * size + last])
        order = np.argsort(key)
        child = np.concatenate([index.child, nodes])[order]
        index = replace(index, key=key[order], child=child)
    return index


@dataclass(slots=True)
class _Walk:
    """The boundaries whose actual text is still inside the trie, one level at a time."""

    boundary: np.ndarray  # [A] index of the boundary
    node: np.ndarray  # [A] trie node of the pieces walked so far
    row: np.ndarray  # [A] teacher row after those pieces
    reach: np.ndarray  # [A] teacher's probability of those pieces, given the boundary's column
    stop: np.ndarray  # [A] slot of the student token written when the text goes on otherwise


def path_targets(
    scores: TeacherScores,
    tempered: Tempered,
    *,
    position: np.ndarray,
    row: np.ndarray,
    options: PathOptions | None,
    canonical_ids: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """The path fields of `TeacherRows` for boundaries at ``position`` with teacher rows ``row``.

    Args:
        canonical_ids: [S] of `mopd.align.canonical`, for options that ask for it.

    The boundary row says how likely the column is; the rows after it say how the text goes on, so
    by the chain rule they say which of the student tokens behind that column comes next. Tokens
    that the rows do not tell apart share a slot: those that begin with other pieces of the same
    column share the stop's, and so do those of a group that no token of its own ends.
    """
    parts, ends = ([], []) if options is None else _walk(scores, tempered, row=row, options=options)
    entries = concatenate(parts)
    if options is not None and options.canonical and canonical_ids is not None:
        wanted = canonical_ids[position]
        entries = concatenate(
            [
                entries,
                moved(entries, concatenate(ends), wanted, options.members),
                _of_folded(scores, tempered, row=row, wanted=wanted, options=options),
            ]
        )
    return slots_of(entries, position)


def _of_folded(
    scores: TeacherScores,
    tempered: Tempered,
    *,
    row: np.ndarray,
    wanted: np.ndarray,
    options: PathOptions,
) -> Entries:
    """Boundaries whose actual token is no path of the trie, but folds into a column that has some.

    Its share of the column belongs to the student's own next token, and the rest of the column to
    the other tokens there.
    """
    actual = scores.token_ids[row]
    column = options.column_of[options.fold[actual]]
    alone = np.flatnonzero(
        (options.index.root[actual] < 0) & (column >= 0) & (wanted >= 0) & scores.valid[row]
    )
    share = np.ones(len(row))
    share[alone] = _column_share(scores, tempered, row[alone], options)
    return column_entries(options.trie, options.members, alone, column, wanted, share)


def _walk(
    scores: TeacherScores, tempered: Tempered, *, row: np.ndarray, options: PathOptions
) -> tuple[list[Entries], list[Entries]]:
    """All walks, level by level: their slots, and the actual text's own mass where each ends."""
    parts: list[Entries] = []
    ends: list[Entries] = []
    walk = _first_level(scores, tempered, row=row, options=options)
    for _ in range(1, options.max_length):
        if not len(walk.node):
            break
        following = _next_nodes(scores, walk, options.index)
        if options.canonical:
            ends.append(_ends(scores, tempered, walk, following=following, trie=options.trie))
        entries, walk = _level(scores, tempered, walk, following=following, trie=options.trie)
        parts.append(entries)
    return parts, ends


def _ends(
    scores: TeacherScores,
    tempered: Tempered,
    walk: _Walk,
    *,
    following: np.ndarray,
    trie: FibreTrie,
) -> Entries:
    """Walks that the actual text leaves here: the part of a slot's mass that is that text's.

    It leaves behind the pieces walked, and then the mass is part of the stop's; or behind one piece
    more, which ends a group, and there must be a row that says how the text goes on.
    """
    groups = trie.group_ptr[walk.node + 1] - trie.group_ptr[walk.node]
    of = np.repeat(np.arange(len(walk.node)), groups)
    group = ragged_arange(trie.group_ptr[walk.node], groups)
    actual = np.exp(tempered.actual.astype(np.float64))
    step = walk.reach * actual[walk.row]
    taken = (trie.group_piece[group] == scores.token_ids[walk.row][of]) & (following < 0)[of]
    listed = np.bincount(of, weights=taken, minlength=len(groups)) > 0
    left = (following < 0) & ~listed
    behind = taken & _goes_on(scores, walk.row)[of]
    inside, last = group[behind], of[behind]
    after = np.minimum(walk.row[last] + 1, len(actual) - 1)
    slot = np.where(trie.group_open[inside], walk.stop[last], inside)
    return Entries(
        boundary=np.concatenate([walk.boundary[left], walk.boundary[last]]),
        slot=np.concatenate([walk.stop[left], slot]),
        key=np.concatenate([walk.stop[left], inside]),
        prob=np.concatenate([step[left], step[last] * actual[after]]),
    )


def _first_level(
    scores: TeacherScores, tempered: Tempered, *, row: np.ndarray, options: PathOptions
) -> _Walk:
    node = np.where(_goes_on(scores, row), options.index.root[scores.token_ids[row]], -1)
    boundary = np.flatnonzero(node >= 0)
    return _Walk(
        boundary=boundary,
        node=node[boundary],
        row=row[boundary] + 1,
        reach=_column_share(scores, tempered, row[boundary], options),
        stop=_stop_slot(options.trie, node[boundary]),
    )


def _goes_on(scores: TeacherScores, row: np.ndarray) -> np.ndarray:
    """Whether the row after the actual token of ``row`` is there: responses end, rows fail."""
    after = np.minimum(row + 1, max(len(scores.valid) - 1, 0))
    return (row + 1 < len(scores.token_ids)) & scores.valid[after]


def _next_nodes(scores: TeacherScores, walk: _Walk, index: TrieIndex) -> np.ndarray:
    """[A] node after one more actual piece; -1 where the walk ends.

    It ends at a path that no student token goes on from, at the end of the response (a path needs
    the row after it) and at a teacher row that is missing.
    """
    following = index.children(walk.node, scores.token_ids[walk.row])
    return np.where(_goes_on(scores, walk.row), following, -1)


def _stop_slot(trie: FibreTrie, node: np.ndarray) -> np.ndarray:
    stop = trie.stop_token[node].astype(np.int64)
    return np.where(stop >= 0, -1 - stop, NO_STOP)


def _level(
    scores: TeacherScores,
    tempered: Tempered,
    walk: _Walk,
    *,
    following: np.ndarray,
    trie: FibreTrie,
) -> tuple[Entries, _Walk]:
    """The slots at the present nodes, and the walk one actual piece further."""
    groups = trie.group_ptr[walk.node + 1] - trie.group_ptr[walk.node]
    of = np.repeat(np.arange(len(walk.node)), groups)
    group = ragged_arange(trie.group_ptr[walk.node], groups)
    piece = trie.group_piece[group]
    prob = _probabilities(scores, tempered, walk.row, of=of, piece=piece)
    stopped = np.maximum(1.0 - np.bincount(of, weights=prob, minlength=len(groups)), 0.0)

    taken = (following >= 0)[of] & (piece == scores.token_ids[walk.row][of])
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
    return concatenate(parts), _Walk(
        boundary=walk.boundary[onward],
        node=following[onward],
        row=walk.row[onward] + 1,
        reach=(walk.reach * step)[onward],
        stop=np.where(own_stop == NO_STOP, walk.stop, own_stop)[onward],
    )


def _probabilities(
    scores: TeacherScores,
    tempered: Tempered,
    row: np.ndarray,
    *,
    of: np.ndarray,
    piece: np.ndarray,
) -> np.ndarray:
    """[M] P(``piece``) in teacher rows ``row[of]``; 0 for what a row does not list.

    ``of`` ascends. Listed entries and wanted pieces meet by a search among sorted integers, as a
    comparison of all with all would be as wide as the list.
    """
    if scores.topk_ids is None:
        return np.exp(tempered.at(row[of], piece).astype(np.float64))
    width = scores.topk_ids.shape[1]
    shift = max(width - 1, 1).bit_length()
    listed = ((scores.topk_ids[row].astype(np.int64) + 1) << shift) | np.arange(width)
    listed.sort(axis=1)
    span = (max(int(listed.max(initial=0)) >> shift, int(piece.max(initial=0)) + 1) + 1) << shift
    listed = (listed + np.arange(len(row))[:, None] * span).reshape(-1)
    wanted = of * span + ((piece.astype(np.int64) + 1) << shift)
    place = np.searchsorted(listed, wanted)
    found = listed[np.minimum(place, len(listed) - 1)] if len(listed) else wanted - 1
    hit = np.flatnonzero(((found >> shift) == (wanted >> shift)) & (place < len(listed)))
    prob = np.zeros(len(of))
    column = found[hit] & ((1 << shift) - 1)
    prob[hit] = np.exp(tempered.at(row[of[hit]], column).astype(np.float64))
    return prob


def _level_entries(
    walk: _Walk,
    *,
    of: np.ndarray,
    group: np.ndarray,
    prob: np.ndarray,
    joined: np.ndarray,
    taken: np.ndarray,
) -> Entries:
    """The groups off the actual path; the one on it is told apart at the next level."""
    leaf = ~taken
    return Entries(
        boundary=walk.boundary[of[leaf]],
        slot=np.where(joined, walk.stop[of], group)[leaf],
        key=group[leaf],
        prob=prob[leaf],
    )


def _stops(walk: _Walk, prob: np.ndarray) -> Entries:
    return Entries(boundary=walk.boundary, slot=walk.stop, key=walk.stop, prob=prob)


def _beside(walk: _Walk, trie: FibreTrie) -> Entries:
    """Student tokens behind the other one-piece nodes of the column: part of the stop's slot."""
    column = trie.node_column[walk.node]
    siblings = trie.column_ptr[column + 1] - trie.column_ptr[column]
    of = np.repeat(np.arange(len(walk.node)), siblings)
    node = trie.column_node[ragged_arange(trie.column_ptr[column], siblings)]
    of, node = of[node != walk.node[of]], node[node != walk.node[of]]
    groups = trie.group_ptr[node + 1] - trie.group_ptr[node]
    of = np.repeat(of, groups)
    return Entries(
        boundary=walk.boundary[of],
        slot=walk.stop[of],
        key=ragged_arange(trie.group_ptr[node], groups),
        prob=np.zeros(len(of)),
    )


def _column_share(
    scores: TeacherScores, tempered: Tempered, row: np.ndarray, options: PathOptions
) -> np.ndarray:
    """[A] P(actual token) over P(all tokens of its column) in teacher rows ``row``."""
    actual, fold = scores.token_ids[row], options.fold
    own = np.exp(tempered.actual[row].astype(np.float64))
    alike = np.flatnonzero(options.index.column_size[actual] > 1)
    if scores.topk_ids is None:
        here = actual[alike]
        size = options.index.column_size[here]
        member = np.repeat(np.arange(len(alike)), size)
        begin = options.index.column_begin[here]
        column = options.index.column_token[ragged_arange(begin, size)]
        member, column = member[column != here[member]], column[column != here[member]]
    else:
        ids = scores.topk_ids[row[alike]]
        same = (ids >= 0) & (ids != actual[alike, None])
        same &= fold[np.maximum(ids, 0)] == fold[actual[alike]][:, None]
        member, column = np.nonzero(same)
    prob = np.exp(tempered.at(row[alike][member], column).astype(np.float64))
    others = np.bincount(alike[member], weights=prob, minlength=len(row))
    return own / np.maximum(own + others, 1e-30)
