"""Rows from embeddings of the tokens' strings, for tokens that no bytes and no role map."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from mopd.errors import ArtifactError
from mopd.projection.options import Similarity
from mopd.tokens.vocabulary import Vocabulary

_BLOCK_ENTRIES = 1 << 22  # cosines held at a time: 16 MiB in float32


def similar_tokens(
    student: Vocabulary, teacher: Vocabulary, tokens: np.ndarray, similarity: Similarity
) -> dict[int, dict[int, float]]:
    """Student token of ``tokens`` [n] -> {teacher id: weight}, largest first.

    Tokens without a string and the two ends of turn take no part, nor does a cosine that is not
    positive; a token with no partner is left out. Equal cosines are cut by the lowest id.

    Raises:
        ArtifactError: not a safetensors file of ``student`` [V_S, d] and ``teacher`` [V_T, d], or
            the file has changed since its digest was taken.
    """
    rows, columns = _embeddings(similarity, student, teacher)
    wanted = tokens[student.lengths[tokens] > 0]
    offered = np.flatnonzero(teacher.lengths > 0)
    columns = _unit(columns[offered])
    found: dict[int, dict[int, float]] = {}
    for block in _blocks(wanted, _BLOCK_ENTRIES // max(len(offered), 1)):
        cosines = _unit(rows[block]) @ columns.T
        for token, cosine in zip(block.tolist(), cosines, strict=True):
            best = _largest(cosine, similarity.top)
            if len(best):
                weights = (cosine[best] / cosine[best[0]]).astype(np.float64) ** similarity.power
                ids = offered[best].tolist()
                found[token] = dict(zip(ids, (weights / weights.sum()).tolist(), strict=True))
    return found


def _embeddings(
    similarity: Similarity, student: Vocabulary, teacher: Vocabulary
) -> tuple[np.ndarray, np.ndarray]:
    path = similarity.path
    if Similarity.of(path).digest != similarity.digest:
        raise ArtifactError(f"{path}: the embeddings have changed since the run began")
    try:
        arrays = load_file(path)
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path}: not readable as safetensors ({error})") from error
    sides = [arrays.get(name) for name in ("student", "teacher")]
    found = [side for side in sides if side is not None and side.ndim == 2]
    if len(found) != 2 or found[0].shape[1] != found[1].shape[1]:
        raise ArtifactError(f"{path}: wanted `student` [V_S, d] and `teacher` [V_T, d] of one d")
    for name, side, vocabulary in zip(
        ("student", "teacher"), found, (student, teacher), strict=True
    ):
        if side.dtype.kind != "f" or not np.isfinite(side).all():
            raise ArtifactError(f"{path}: `{name}` is not finite floating point")
        if len(side) < vocabulary.size:
            raise ArtifactError(
                f"{path}: `{name}` has {len(side)} rows, its tokenizer {vocabulary.size} tokens"
            )
    return found[0], found[1]


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1 in float32; a row of zeros stays one, and is similar to nothing."""
    vectors = vectors.astype(np.float32)
    norm = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norm > 0, norm, 1.0)


def _blocks(tokens: np.ndarray, size: int) -> Iterator[np.ndarray]:
    size = max(size, 1)
    for begin in range(0, len(tokens), size):
        yield tokens[begin : begin + size]


def _largest(cosine: np.ndarray, top: int) -> np.ndarray:
    """Indices of the ``top`` largest positive entries, largest first, then the lowest index."""
    top = min(top, len(cosine))
    least = np.partition(cosine, len(cosine) - top)[len(cosine) - top] if top else np.inf
    near = np.flatnonzero((cosine >= least) & (cosine > 0))
    return near[np.argsort(-cosine[near], kind="stable")][:top]
