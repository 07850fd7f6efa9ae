"""Teacher rows on the student's prediction axis: boundary rows, chunk sums and path targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mopd.align.boundaries import chunk_sizes
from mopd.types import Alignment, FibreTrie, TeacherRows, TeacherScores


@dataclass(frozen=True, slots=True, kw_only=True)
class PayloadOptions:
    """``fold`` [V_T] int32 moves teacher mass of unreachable tokens; None leaves it.

    ``paths`` maps teacher piece paths to trie nodes; None switches path terms off.
    """

    temperature: float
    max_length: int = 1
    fold: np.ndarray | None = None
    trie: FibreTrie | None = None
    paths: dict[tuple[int, ...], int] | None = None


def temper(scores: TeacherScores, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """(top-k log-probabilities [T, K], log tail [T]) at the loss's temperature.

    Raises:
        ValueError: the temperature is not 1 and the teacher sent no log-sum-exps.
    """
    if temperature == 1.0:
        return scores.topk_logprobs, scores.log_tail
    if scores.lse is None:
        raise ValueError(f"teacher {scores.teacher} sends no log-sum-exp; set temperature to 1")
    lse = scores.lse.astype(np.float64)
    topk = (scores.topk_logprobs + lse[:, :1]) / temperature - lse[:, 1:]
    with np.errstate(divide="ignore"):
        inside = np.minimum(np.log(np.exp(topk).sum(axis=1)), -1e-7)
        tail = np.log(-np.expm1(inside))
    return topk.astype(np.float32), tail.astype(np.float32)


def fold_rows(
    ids: np.ndarray, logprobs: np.ndarray, log_tail: np.ndarray, fold: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Moves each id to ``fold[id]``, adds up what meets, and what folds to null joins the tail."""
    null = len(fold)
    target = np.where(ids >= 0, fold[np.clip(ids, 0, null - 1)], null)
    order = np.argsort(target, axis=1, kind="stable")
    target = np.take_along_axis(target, order, axis=1)
    mass = np.take_along_axis(np.exp(logprobs.astype(np.float64)), order, axis=1)
    mass = np.where(np.take_along_axis(ids >= 0, order, axis=1), mass, 0.0)
    first = np.ones(target.shape, dtype=bool)
    first[:, 1:] = target[:, 1:] != target[:, :-1]
    group = np.cumsum(first, axis=1) - 1
    summed = np.zeros_like(mass)
    rows = np.broadcast_to(np.arange(len(ids))[:, None], group.shape)
    np.add.at(summed, (rows, group), mass)
    leader = np.full(target.shape, null)
    np.put_along_axis(leader, group, target, axis=1)
    is_null = leader >= null
    tail = np.exp(log_tail.astype(np.float64)) + np.where(is_null, summed, 0.0).sum(axis=1)
    with np.errstate(divide="ignore"):
        out = np.log(np.where(is_null, 0.0, summed)).astype(np.float32)
        return np.where(is_null, -1, leader).astype(np.int32), out, np.log(tail).astype(np.float32)


def teacher_rows(
    scores: TeacherScores,
    alignment: Alignment,
    *,
    student_ids: np.ndarray,
    trainable: np.ndarray,
    options: PayloadOptions,
) -> TeacherRows:
    """One rollout's rows; positions count response tokens (0 predicts the first one).

    Args:
        student_ids: [S] the sampled response; trainable: [S] bool, its loss mask.
    A chunk is dropped when its first student token is not trainable or a teacher row is missing.
    """
    a, b = alignment.student_starts, alignment.teacher_starts
    kept = trainable[a[:-1]] & scores.valid[b[:-1]]
    chunk_lp = _chunk_sums(scores.logprobs, b)
    all_valid = _chunk_sums((~scores.valid).astype(np.float32), b) == 0
    kept &= all_valid
    sizes = chunk_sizes(alignment)[kept]
    topk, tail = temper(scores, options.temperature)
    row = b[:-1][kept]
    ids, logprobs, log_tail = scores.topk_ids[row], topk[row], tail[row]
    if options.fold is not None:
        ids, logprobs, log_tail = fold_rows(ids, logprobs, log_tail, options.fold)
    position = a[:-1][kept]
    token_chunk = np.repeat(np.arange(len(position)), sizes[:, 0])
    first = np.cumsum(sizes[:, 0]) - sizes[:, 0]
    token_position = position[token_chunk] + np.arange(len(token_chunk)) - first[token_chunk]
    return TeacherRows(
        teacher=scores.teacher,
        position=position,
        topk_ids=ids,
        topk_logprobs=logprobs,
        log_tail=log_tail,
        chunk_logprob=chunk_lp[kept],
        chunk_size=sizes.astype(np.int32),
        token_position=token_position,
        token_id=student_ids[token_position].astype(np.int64),
        token_chunk=token_chunk,
        **_path_targets(scores, topk, position=position, row=row, options=options),
    )


def _chunk_sums(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    total = np.concatenate([[0.0], np.cumsum(values.astype(np.float64))])
    return (total[starts[1:]] - total[starts[:-1]]).astype(np.float32)


@dataclass(slots=True)
class _Walk:
    """The boundaries whose actual text is still inside the trie, one level at a time."""

    boundary: np.ndarray  # [A] index of the boundary
    node: np.ndarray  # [A] trie node of the pieces walked so far
    row: np.ndarray  # [A] teacher row after those pieces
    reach: np.ndarray  # [A] teacher's probability of those pieces, given the boundary's column
    stop: np.ndarray  # [A] student token written when the text goes on otherwise, -1 unknown


def _path_targets(
    scores: TeacherScores,
    topk: np.ndarray,
    *,
    position: np.ndarray,
    row: np.ndarray,
    options: PayloadOptions,
) -> dict[str, np.ndarray]:
    """R: the teacher's distribution over the student's own next tokens, along the actual text.

    The boundary row says how likely the column is; the rows after it say how the text goes on, so
    by the chain rule they say which of the student tokens behind that column comes next: a longer
    one (a leaf of the trie), or the stop token of the longest path that has one. What the teacher
    puts on tokens of the same column that are not on the actual path counts as stop.
    """
    keys, probs, owners = _leaves(scores, topk, row=row, options=options)
    unique, inverse = np.unique(np.stack([owners, keys]), axis=1, return_inverse=True)
    mass = np.bincount(inverse.reshape(-1), weights=probs, minlength=unique.shape[1])
    owner, key = unique
    known = key != _NO_STOP
    owner, key, mass = owner[known], key[known], mass[known]
    rows, index, counts = np.unique(owner, return_inverse=True, return_counts=True)
    total = np.bincount(index, weights=mass, minlength=len(rows))
    return {
        "path_position": position[rows],
        "path_weight": np.minimum(total, 1.0).astype(np.float32),
        "path_offsets": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        "path_slot": key.astype(np.int64),
        "path_target": (mass / np.maximum(total, 1e-30)[index]).astype(np.float32),
    }


_NO_STOP = np.iinfo(np.int64).min


def _leaves(
    scores: TeacherScores, topk: np.ndarray, *, row: np.ndarray, options: PayloadOptions
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(slot key, probability, boundary) of every leaf of every walk, level by level."""
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    trie, paths = options.trie, options.paths or {}
    if trie is not None:
        walk = _first_level(scores, topk, row=row, paths=paths, trie=trie, fold=options.fold)
        for length in range(1, options.max_length):
            if not len(walk.node):
                break
            leaves, walk = _level(
                scores, topk, walk, row=row, length=length, paths=paths, trie=trie
            )
            parts.append(leaves)
    if not parts:
        empty = np.zeros(0, dtype=np.int64)
        return empty, np.zeros(0), empty
    keys, probs, owners = (np.concatenate(column) for column in zip(*parts, strict=True))
    return keys, probs, owners


def _first_level(
    scores: TeacherScores,
    topk: np.ndarray,
    *,
    row: np.ndarray,
    paths: Mapping[tuple[int, ...], int],
    trie: FibreTrie,
    fold: np.ndarray | None,
) -> _Walk:
    node = _nodes(scores, row, np.ones(len(row), dtype=np.int64), paths)
    boundary = np.flatnonzero(node >= 0)
    return _Walk(
        boundary=boundary,
        node=node[boundary],
        row=row[boundary] + 1,
        reach=_class_share(scores, topk, row[boundary], fold),
        stop=trie.stop_token[node[boundary]].astype(np.int64),
    )


def _level(
    scores: TeacherScores,
    topk: np.ndarray,
    walk: _Walk,
    *,
    row: np.ndarray,
    length: int,
    paths: Mapping[tuple[int, ...], int],
    trie: FibreTrie,
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], _Walk]:
    """The leaves at the present nodes, and the walk one actual piece further."""
    groups = trie.group_ptr[walk.node + 1] - trie.group_ptr[walk.node]
    of = np.repeat(np.arange(len(walk.node)), groups)
    group = np.arange(len(of)) - (np.cumsum(groups) - groups)[of] + trie.group_ptr[walk.node][of]
    source = walk.row[of]
    hit = scores.topk_ids[source] == trie.group_piece[group][:, None]
    prob = np.where(hit, np.exp(topk[source].astype(np.float64)), 0.0).sum(axis=1)
    stopped = np.maximum(1.0 - np.bincount(of, weights=prob, minlength=len(groups)), 0.0)

    begin = row[walk.boundary]
    node = _nodes(scores, begin, np.full(len(begin), length + 1), paths)
    onward = (node >= 0) & (_prob_of_actual(scores, walk.row) > 0)
    taken = onward[of] & (trie.group_piece[group] == scores.token_ids[source])
    leaf = ~taken
    keys = np.concatenate([group[leaf], np.where(walk.stop >= 0, -1 - walk.stop, _NO_STOP)])
    probs = np.concatenate([walk.reach[of[leaf]] * prob[leaf], walk.reach * stopped])
    # what the boundary's column holds beside the actual piece is stop too, once
    if length == 1:
        probs[leaf.sum() :] += 1.0 - walk.reach
    owners = np.concatenate([walk.boundary[of[leaf]], walk.boundary])
    step = np.bincount(of[taken], weights=prob[taken], minlength=len(groups))
    own_stop = trie.stop_token[np.maximum(node, 0)]
    following = _Walk(
        boundary=walk.boundary[onward],
        node=node[onward],
        row=walk.row[onward] + 1,
        reach=(walk.reach * step)[onward],
        stop=np.where(own_stop >= 0, own_stop, walk.stop)[onward].astype(np.int64),
    )
    return (keys, probs, owners), following


def _prob_of_actual(scores: TeacherScores, row: np.ndarray) -> np.ndarray:
    """Teacher's probability of the token that follows in ``row``."""
    return np.exp(scores.logprobs[row].astype(np.float64))


def _nodes(
    scores: TeacherScores,
    begin: np.ndarray,
    length: np.ndarray,
    paths: Mapping[tuple[int, ...], int],
) -> np.ndarray:
    """[A] node of the ``length`` actual pieces from ``begin``; -1 where the walk ends.

    It ends at a path that no student token goes on from, at the end of the response (a path needs
    the row after it) and at a teacher row that is missing.
    """
    ids, valid = scores.token_ids.tolist(), scores.valid
    found = np.full(len(begin), -1, dtype=np.int64)
    for index, (low, size) in enumerate(zip(begin.tolist(), length.tolist(), strict=True)):
        high = low + size
        if high < len(ids) and valid[high]:
            found[index] = paths.get(tuple(ids[low:high]), -1)
    return found


def _class_share(
    scores: TeacherScores, topk: np.ndarray, row: np.ndarray, fold: np.ndarray | None
) -> np.ndarray:
    """[Q] P(actual token) over P(all tokens of its column) in teacher rows ``row``."""
    if fold is None:
        return np.ones(len(row))
    actual = scores.token_ids[row]
    own = _prob_of_actual(scores, row)
    ids, null = scores.topk_ids[row], len(fold)
    same = (ids >= 0) & (ids != actual[:, None])
    same &= fold[np.clip(ids, 0, null - 1)] == fold[actual][:, None]
    others = np.where(same, np.exp(topk[row].astype(np.float64)), 0.0).sum(axis=1)
    return own / np.maximum(own + others, 1e-30)
