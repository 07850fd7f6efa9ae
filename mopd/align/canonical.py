"""The student's own next token at every place of an answer, where its own encoding has one.

A walk (docs/losses.md, path terms) ends where the teacher's pieces leave the student's longer
tokens. What is left then belongs to the longest token walked past: a guess, and a wrong one where
the teacher merges across two student tokens or the student's merges are not left to right. The
student's own encoding of the answer knows better.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mopd.align.slots import NO_STOP, Entries, concatenate
from mopd.tokens.vocabulary import Vocabulary
from mopd.types import FibreTrie, ragged_arange


def own_next(
    vocabulary: Vocabulary, response: bytes, byte_ends: np.ndarray, *, ended: bool
) -> np.ndarray:
    """`canonical_next` of the tokens that end at ``byte_ends`` [S] of ``response``."""
    own = np.asarray(vocabulary.encode(response), dtype=np.int64)
    return canonical_next(byte_ends, own, vocabulary.byte_ends(own), ended=ended)


def canonical_next(
    byte_ends: np.ndarray, own_ids: np.ndarray, own_ends: np.ndarray, *, ended: bool
) -> np.ndarray:
    """[S] int64: the token of the own encoding that begins where each sampled token does, or -1.

    Args:
        byte_ends: [S] of the sampled tokens; own_ids, own_ends: [N] the tokenizer's own encoding of
            the same bytes.
        ended: whether the answer came to its end; else its last own token may have gone on.
    """
    begins = np.concatenate([[0], byte_ends[:-1]]) if len(byte_ends) else np.zeros(0, np.int64)
    count = len(own_ids) - (not ended)
    if count <= 0:
        return np.full(len(begins), -1, dtype=np.int64)
    own_begins = np.concatenate([[0], own_ends[: count - 1]])
    place = np.minimum(np.searchsorted(own_begins, begins), count - 1)
    return np.where(own_begins[place] == begins, own_ids[place], -1).astype(np.int64)


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


def moved(entries: Entries, ends: Entries, wanted: np.ndarray, members: Members) -> Entries:
    """What takes the mass of ``ends`` out of its slots and into those of ``wanted`` [boundaries].

    Where no slot of the boundary has the token (-1: there is none), nothing moves.
    """
    hit = np.flatnonzero(members.holds(entries.key, wanted[entries.boundary]))
    hit = hit[entries.slot[hit] != NO_STOP]
    target = np.full(len(wanted), -1, dtype=np.int64)
    target[entries.boundary[hit]] = hit
    going = target[ends.boundary] >= 0
    to = target[ends.boundary[going]]
    prob = ends.prob[going]
    taken = Entries(
        boundary=ends.boundary[going], slot=ends.slot[going], key=ends.key[going], prob=-prob
    )
    given = Entries(
        boundary=entries.boundary[to], slot=entries.slot[to], key=entries.key[to], prob=prob
    )
    return concatenate([taken, given])


def column_entries(
    trie: FibreTrie,
    members: Members,
    boundary: np.ndarray,
    column: np.ndarray,
    wanted: np.ndarray,
    share: np.ndarray,
) -> Entries:
    """Two slots for each of ``boundary`` [A]: what holds ``wanted``, with ``share``, and the rest
    of its ``column``. A boundary whose column lacks the token, or holds nothing else, has none.

    Args:
        column, wanted, share: of all boundaries.
    """
    nodes = trie.column_ptr[column[boundary] + 1] - trie.column_ptr[column[boundary]]
    of = np.repeat(boundary, nodes)
    node = trie.column_node[ragged_arange(trie.column_ptr[column[boundary]], nodes)]
    groups = trie.group_ptr[node + 1] - trie.group_ptr[node]
    key = np.concatenate(
        [-1 - trie.stop_token[node].astype(np.int64), ragged_arange(trie.group_ptr[node], groups)]
    )
    of = np.concatenate([of, np.repeat(of, groups)])
    real = np.concatenate([trie.stop_token[node] >= 0, np.ones(groups.sum(), dtype=bool)])
    key, of = key[real], of[real]
    mine = members.holds(key, wanted[of])
    first_mine = _first_key(of, key, mine, len(wanted))
    first_other = _first_key(of, key, ~mine, len(wanted))
    kept = (first_mine != NO_STOP) & (first_other != NO_STOP)
    slot = np.where(mine, first_mine[of], first_other[of])
    leads = key == slot
    prob = np.where(leads, np.where(mine, share[of], 1.0 - share[of]), 0.0)
    # a token may stop at several nodes of a column: its mass counts once
    again = np.unique(np.stack([of, key]), axis=1, return_index=True)[1]
    chosen = again[kept[of[again]]]
    return Entries(boundary=of[chosen], slot=slot[chosen], key=key[chosen], prob=prob[chosen])


def _first_key(of: np.ndarray, key: np.ndarray, chosen: np.ndarray, count: int) -> np.ndarray:
    """[count] the lowest chosen key of each boundary, NO_STOP where there is none."""
    lowest = np.full(count, np.iinfo(np.int64).max)
    np.minimum.at(lowest, of[chosen], key[chosen])
    return np.where(lowest == np.iinfo(np.int64).max, NO_STOP, lowest)
