"""Builds the projection from two vocabularies alone: no models, no V_S x V_T matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mopd.errors import ConfigError
from mopd.projection.options import ProjectionOptions
from mopd.projection.similarity import similar_tokens
from mopd.tokens.vocabulary import Vocabulary
from mopd.types import EXACT, MULTI, NULL, SIMILAR, SPECIAL, FibreTrie, Projection


def build_projection(
    student: Vocabulary, teacher: Vocabulary, options: ProjectionOptions
) -> Projection:
    """W, the fold of unreachable teacher tokens, and the trie of path terms.

    A student token maps 1:1 onto the teacher token with the same bytes, else (``map="pieces"``)
    onto the pieces of the teacher's own encoding of its bytes. The end of turn maps onto the end
    of turn, a control token with a role onto its partner. What is left goes to the tokens with
    similar embeddings if any are given, else to the null column.

    Raises:
        ConfigError: a role names what is not one token.
        ArtifactError: embeddings that do not belong to the two vocabularies.
    """
    pieces, kind = teacher_pieces(student, teacher, options)
    fold = _fold(student, teacher, pieces=pieces, kind=kind, options=options)
    similar: dict[int, dict[int, float]] = {}
    if options.similarity is not None:
        similar = similar_tokens(student, teacher, np.flatnonzero(kind == NULL), options.similarity)
        # what the student cannot write gets a column of its own where a similar token stands for it
        targets = np.unique([t for row in similar.values() for t in row]).astype(np.int64)
        lost = targets[fold[targets] == teacher.size]
        fold[lost] = lost
        kind[list(similar)] = SIMILAR
    crow, col, val = _rows(pieces, fold=fold, similar=similar, options=options)
    return Projection(
        crow=crow,
        col=col,
        val=val,
        kind=kind,
        fold=fold,
        common=_common(student, teacher, pieces=pieces, kind=kind),
        trie=_trie(student, teacher, pieces=pieces, fold=fold, max_length=options.max_length),
        student_fingerprint=student.fingerprint,
        teacher_fingerprint=teacher.fingerprint,
    )


def teacher_pieces(
    student: Vocabulary, teacher: Vocabulary, options: ProjectionOptions
) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """Per student token: the teacher ids that spell it (empty: none), and the kind of its row."""
    kind = np.zeros(student.size, dtype=np.uint8)
    pieces: list[tuple[int, ...]] = [()] * student.size
    special = {student.eos_id: teacher.eos_id} | _roles(student, teacher, options.roles)
    for token, same in special.items():
        pieces[token], kind[token] = (same,), SPECIAL
    open_rows: list[int] = []
    for token, data in enumerate(student.token_bytes):
        if student.control[token] or not data or token in special:
            continue
        if (same := teacher.by_bytes.get(data)) is not None:
            pieces[token], kind[token] = (same,), EXACT
        elif options.map == "pieces":
            open_rows.append(token)
    encoded = teacher.encode_many([student.token_bytes[token] for token in open_rows])
    for token, ids in zip(open_rows, encoded, strict=True):
        pieces[token], kind[token] = tuple(ids), MULTI if ids else NULL
    return pieces, kind


def _roles(student: Vocabulary, teacher: Vocabulary, roles: Mapping[str, str]) -> dict[int, int]:
    """Student id -> teacher id of the roles."""
    return {
        _named(student, mine, f"the student of role {mine}={theirs}"): _named(
            teacher, theirs, f"the teacher of role {mine}={theirs}"
        )
        for mine, theirs in roles.items()
    }


def _named(vocabulary: Vocabulary, text: str, whose: str) -> int:
    """The token with this text: a control token, or one that some tokenizers do not mark so."""
    data = text.encode()
    for token in np.flatnonzero(vocabulary.control).tolist():
        if data and vocabulary.token_bytes[token] == data:
            return token
    if (token := vocabulary.by_bytes.get(data)) is not None:
        return token
    raise ConfigError(
        f"{whose} has no token {text!r}; name one of its control tokens (the end of turn needs "
        "no role)"
    )


def _rows(
    pieces: Sequence[tuple[int, ...]],
    *,
    fold: np.ndarray,
    similar: Mapping[int, Mapping[int, float]],
    options: ProjectionOptions,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """CSR of row-stochastic weights on folded columns; a repeated one collapses into one entry."""
    powers = [float(options.gamma) ** j for j in range(options.max_length)]
    null = len(fold)
    crow, col, val = [0], [], []
    for token, ids in enumerate(pieces):
        given = similar[token].items() if token in similar else zip(ids, powers, strict=False)
        weights: dict[int, float] = {}
        for piece, power in given:
            if power > 0:
                column = int(fold[piece])
                weights[column] = weights.get(column, 0.0) + power
        if not weights:
            weights = {null: 1.0}
        total = sum(weights.values())
        col += weights
        val += [weight / total for weight in weights.values()]
        crow.append(len(col))
    return (
        np.asarray(crow, dtype=np.int32),
        np.asarray(col, dtype=np.int32),
        np.asarray(val, dtype=np.float32),
    )


def _fold(
    student: Vocabulary,
    teacher: Vocabulary,
    *,
    pieces: Sequence[tuple[int, ...]],
    kind: np.ndarray,
    options: ProjectionOptions,
) -> np.ndarray:
    """[V_T] int32: the column that stands for each teacher token.

    A teacher token without a student token of the same bytes is written by the student beginning
    with a shorter token, whose own first teacher piece is shorter still: following that ends at a
    column both have, or at null. Leaving such a token's column to the LONGER student tokens that
    begin with it would teach the student to write those instead. The exact map follows nothing: a
    teacher token of other bytes than every student token's goes to null.
    """
    null = teacher.size
    fold = np.full(null + 1, null, dtype=np.int32)
    special = {pieces[token][0] for token in np.flatnonzero(kind == SPECIAL).tolist()}
    fold[list(special)] = list(special)
    begins = {spelled[0] for spelled in pieces if spelled}
    open_columns = []
    for column, data in enumerate(teacher.token_bytes):
        if teacher.control[column] or not data or column in special:
            continue
        same = student.by_bytes.get(data)
        if same is not None:
            fold[column] = pieces[same][0]
        elif options.map == "pieces":
            open_columns.append(column)
    encoded = student.encode_many([teacher.token_bytes[t] for t in open_columns])
    for column, ids in zip(open_columns, encoded, strict=True):
        spelled = pieces[ids[0]] if ids else ()
        if spelled:
            fold[column] = spelled[0]
        elif column in begins:  # the student cannot write it, only longer tokens that begin with it
            fold[column] = column
    while not np.array_equal(fold[fold], fold):
        fold = fold[fold]
    return fold[:-1]


def _common(
    student: Vocabulary,
    teacher: Vocabulary,
    *,
    pieces: Sequence[tuple[int, ...]],
    kind: np.ndarray,
) -> np.ndarray:
    """[V_T] int32: one-to-one partners by bytes; end of turn with end of turn, roles by name."""
    common = np.full(teacher.size, -1, dtype=np.int32)
    for token in student.by_bytes.values():
        if kind[token] == EXACT:
            common[pieces[token][0]] = token
    for token in np.flatnonzero(kind == SPECIAL)[::-1].tolist():  # the lowest id stays
        common[pieces[token][0]] = token
    common[teacher.eos_id] = student.eos_id
    return common


def _trie(
    student: Vocabulary,
    teacher: Vocabulary,
    *,
    pieces: Sequence[tuple[int, ...]],
    fold: np.ndarray,
    max_length: int,
) -> FibreTrie:
    """Nodes are the proper prefixes (1 to max_length - 1 pieces) of multi-piece student tokens."""
    groups: dict[tuple[int, ...], dict[int, list[int]]] = {}
    for token, ids in enumerate(pieces):
        for depth in range(1, min(len(ids), max_length)):
            groups.setdefault(ids[:depth], {}).setdefault(ids[depth], []).append(token)
    paths = sorted(groups)
    spelled = student.encode_many([teacher.decode(path) for path in paths])
    stops = [
        ids[0] if ids and (len(ids) == 1 or len(path) == 1) else -1
        for path, ids in zip(paths, spelled, strict=True)
    ]
    flat = [(path, p, groups[path][p]) for path in paths for p in sorted(groups[path])]
    closed = {path for path, stop in zip(paths, stops, strict=True) if stop >= 0}
    columns: dict[int, list[int]] = {}
    for node, path in enumerate(paths):
        if len(path) == 1:
            columns.setdefault(int(fold[path[0]]), []).append(node)
    node_column = np.full(len(paths), -1, dtype=np.int32)
    for number, members in enumerate(columns.values()):
        node_column[members] = number
    return FibreTrie(
        node_ptr=_offsets([len(path) for path in paths]),
        node_piece=np.asarray([p for path in paths for p in path], dtype=np.int32),
        group_ptr=_offsets([len(groups[path]) for path in paths]),
        group_piece=np.asarray([piece for _, piece, _ in flat], dtype=np.int32),
        member_ptr=_offsets([len(members) for _, _, members in flat]),
        member_token=np.asarray([m for _, _, members in flat for m in members], dtype=np.int32),
        stop_token=np.asarray(stops, dtype=np.int32),
        group_open=np.asarray(
            [(*path, p) in groups and (*path, p) not in closed for path, p, _ in flat], dtype=bool
        ),
        node_column=node_column,
        column_ptr=_offsets([len(members) for members in columns.values()]),
        column_node=np.asarray(
            [n for members in columns.values() for n in members], dtype=np.int32
        ),
    )


def _offsets(counts: Sequence[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.asarray(counts, dtype=np.int64))]).astype(np.int64)
