"""One-to-one partners of two vocabularies: the common vocabulary of hybrid losses."""

from __future__ import annotations

import numpy as np

from mopd.types import Projection

RELAXED_THRESHOLD = 0.6  # X-Token's; rows of two and more pieces at gamma = 0.1 begin with 0.9


def relaxed_common(projection: Projection, threshold: float = RELAXED_THRESHOLD) -> np.ndarray:
    """[V_T] int32: the student partner of each teacher token, -1 where there is none.

    Each student token asks for the teacher token that its row weighs most, if that weight is at
    least ``threshold``. Pairs of ``projection.common`` (equal bytes, end of turn, roles) win, then
    the largest weight, then the lowest student id. With ``gamma = 0`` every token of several
    pieces has weight 1, so a piece that no exact token has goes to the lowest id that begins
    with it.

    The token asked for is the piece itself, not the column that it is folded onto: that column
    has an exact token nearly always, and hybrid losses read teacher rows that are not folded.
    Without path terms (``max_length`` 1, imported rows that go elsewhere) it is the column.
    """
    rows = np.repeat(np.arange(projection.student_size), np.diff(projection.crow))
    order = np.lexsort((-projection.val, rows))  # stable: the earlier of two equal pieces
    top = order[projection.crow[:-1]]  # [V_S] entry: every row has one, and rows stay in order
    token = np.flatnonzero(
        (projection.val[top] >= threshold) & (projection.col[top] < projection.teacher_size)
    )
    top = top[token]
    column = projection.col[top].astype(np.int64)
    first = _first_pieces(projection)[token]
    asked = np.where((first >= 0) & (projection.fold[first] == column), first, column)
    exact = projection.common[asked] == token
    order = np.lexsort((token, -projection.val[top], ~exact, asked))
    found, winner = np.unique(asked[order], return_index=True)
    partners = np.full(projection.teacher_size, -1, dtype=np.int32)
    partners[found] = token[order[winner]]
    return partners


def _first_pieces(projection: Projection) -> np.ndarray:
    """[V_S] int64: the first teacher piece of tokens of several pieces, -1 for others."""
    trie = projection.trie
    first = np.full(projection.student_size, -1, dtype=np.int64)
    depth = np.diff(trie.node_ptr)
    for node in np.flatnonzero(depth == 1).tolist():
        begin, end = trie.member_ptr[trie.group_ptr[node : node + 2]]
        first[trie.member_token[begin:end]] = trie.node_piece[trie.node_ptr[node]]
    return first
