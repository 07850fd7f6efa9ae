"""Path terms: what the teacher's rows along the actual text say of the student's own next token.

A walk (docs/losses.md) follows the teacher's actual pieces from a boundary through the trie of
the student's longer tokens; every leaf and every stop it passes is a slot with a probability.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from mopd.align.temper import Tempered
from mopd.types import FibreTrie, TeacherScores, ragged_arange

_NO_STOP = np.iinfo(np.int64).min


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Members:
    """Which student tokens are in which group: ``group * size + token``, ascending."""

    packed: np.ndarray  # [M] int64
    size: int

    @classmethod
    def of(cls, trie: FibreTrie) -> Members:
        size = int(trie.member_token.max(initial=0)) + 1
        group = np.repeat(np.arange(len(trie.group_piece)), np.diff(trie.member_ptr))
        return cls(packed=np.sort(group * size + trie.member_token), size=size)

    def holds(self, key: np.ndarray, token: np.ndarray) -> np.ndarray:
        """[M] bool: whether ``token`` is ``key``, as in `Entries`, or one of its members."""
        wanted = key * self.size + token
        place = np.minimum(np.searchsorted(self.packed, wanted), max(len(self.packed) - 1, 0))
        found = (self.packed[place] == wanted) if len(self.packed) else np.zeros(len(key), bool)
        is_group = (key >= 0) & (token >= 0) & (token < self.size)
        return np.where(key >= 0, found & is_group, (key == -1 - token) & (token >= 0))


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
    entries = _concatenate(parts)
    if options is not None and options.canonical and canonical_ids is not None:
        moved = _moved(entries, _concatenate(ends), canonical_ids[position], options.members)
        entries = _concatenate([entries, moved])
    return _slots(entries, position)


def _moved(entries: _Entries, ends: _Entries, wanted: np.ndarray, members: Members) -> _Entries:
    """What takes the mass of ``ends`` out of its slots and into those of ``wanted`` [boundaries].

    Where no slot of the boundary has the token (-1: there is none), nothing moves.
    """
    hit = np.flatnonzero(members.holds(entries.key, wanted[entries.boundary]))
    hit = hit[entries.slot[hit] != _NO_STOP]
    target = np.full(len(wanted), -1, dtype=np.int64)
    target[entries.boundary[hit]] = hit
    going = target[ends.boundary] >= 0
    to = target[ends.boundary[going]]
    prob = ends.prob[going]
    taken = _Entries(
        boundary=ends.boundary[going], slot=ends.slot[going], key=ends.key[going], prob=-prob
    )
    given = _Entries(
        boundary=entries.boundary[to], slot=entries.slot[to], key=entries.key[to], prob=prob
    )
    return _concatenate([taken, given])


def _slots(entries: _Entries, position: np.ndarray) -> dict[str, np.ndarray]:
    """Entries sorted by boundary, slot and key, without repetitions; mass summed per slot."""
    told = entries.slot != _NO_STOP
    boundary, slot, key = entries.boundary[told], entries.slot[told], entries.key[told]
    # one integer per entry: sorting those is far faster than sorting rows of three
    low = int(min(slot.min(initial=0), key.min(initial=0)))
    bits = (int(max(slot.max(initial=0), key.max(initial=0))) - low).bit_length()
    assert len(position).bit_length() + 2 * bits < 63
    head = (boundary << bits) | (slot - low)
    packed = np.sort((head << bits) | (key - low))
    packed = packed[np.diff(packed, prepend=-1) != 0]
    entry_head = packed >> bits
    first = np.diff(entry_head, prepend=-1) != 0
    heads = entry_head[first]
    prob = entries.prob[told]
    some = np.flatnonzero(prob)
    mass = np.bincount(np.searchsorted(heads, head[some]), weights=prob[some], minlength=len(heads))
    mass = np.maximum(mass, 0.0)  # what was moved away leaves a rounding error
    owner = heads >> bits
    begins = np.flatnonzero(np.diff(owner, prepend=-1))
    counts = np.diff(begins, append=len(owner))
    index = np.repeat(np.arange(len(begins)), counts)
    total = np.bincount(index, weights=mass, minlength=len(begins))
    return {
        "path_position": position[owner[begins]],
        "path_weight": np.minimum(total, 1.0).astype(np.float32),
        "path_offsets": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        "path_target": (mass / np.maximum(total, 1e-30)[index]).astype(np.float32),
        "path_entry_slot": np.cumsum(first) - 1,
        "path_entry": (packed & ((1 << bits) - 1)) + low,
    }


def _walk(
    scores: TeacherScores, tempered: Tempered, *, row: np.ndarray, options: PathOptions
) -> tuple[list[_Entries], list[_Entries]]:
    """All walks, level by level: their slots, and the actual text's own mass where each ends."""
    parts: list[_Entries] = []
    ends: list[_Entries] = []
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
) -> _Entries:
    """Walks that the actual text leaves here: the part of their stop's mass that is that text's."""
    groups = trie.group_ptr[walk.node + 1] - trie.group_ptr[walk.node]
    of = np.repeat(np.arange(len(walk.node)), groups)
    piece = trie.group_piece[ragged_arange(trie.group_ptr[walk.node], groups)]
    actual = scores.token_ids[walk.row]
    listed = np.bincount(of, weights=piece == actual[of], minlength=len(groups)) > 0
    left = (following < 0) & ~listed
    prob = walk.reach * np.exp(tempered.actual[walk.row].astype(np.float64))
    stop = walk.stop[left]
    return _Entries(boundary=walk.boundary[left], slot=stop, key=stop, prob=prob[left])


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
    return np.where(stop >= 0, -1 - stop, _NO_STOP)


def _level(
    scores: TeacherScores,
    tempered: Tempered,
    walk: _Walk,
    *,
    following: np.ndarray,
    trie: FibreTrie,
) -> tuple[_Entries, _Walk]:
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
    return _concatenate(parts), _Walk(
        boundary=walk.boundary[onward],
        node=following[onward],
        row=walk.row[onward] + 1,
        reach=(walk.reach * step)[onward],
        stop=np.where(own_stop == _NO_STOP, walk.stop, own_stop)[onward],
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
    none = np.zeros(0, dtype=np.int64)
    parts = [_Entries(boundary=none, slot=none, key=none, prob=np.zeros(0)), *parts]
    names = ("boundary", "slot", "key", "prob")
    return _Entries(**{n: np.concatenate([getattr(p, n) for p in parts]) for n in names})


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
