"""NeMo-RL's dense top-k projections (``.pt``): read, checked, turned into ours."""

from __future__ import annotations

import dataclasses
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mopd.errors import ArtifactError
from mopd.projection.build import build_projection
from mopd.projection.options import ProjectionOptions
from mopd.tokens.vocabulary import Vocabulary
from mopd.types import EXACT, MULTI, NULL, SPECIAL, Projection

# What NeMo's generator has built in; the options under which a converted file is stored.
NEMO_OPTIONS = ProjectionOptions(max_length=4, gamma=0.1)
# NeMo sets the last of its 32 columns to 0.2 before it normalises: 0.2 / 1.2 of a row.
_SCALE_SHARE, _SCALE_TOLERANCE = 0.2 / 1.2, 2e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class TopK:
    """Row s holds up to k teacher tokens and their weights."""

    indices: np.ndarray  # [V_S, k] int64, -1 where padded
    likelihoods: np.ndarray  # [V_S, k] float64, not negative


@dataclass(frozen=True, slots=True, kw_only=True)
class NemoImport:
    """``scaled_rows`` [n] int64: student tokens whose row carries the scale trick's noise."""

    projection: Projection
    scaled_rows: np.ndarray


def load_topk(path: Path) -> TopK:
    """Reads ``indices`` and ``likelihoods`` without running code from the file.

    Raises:
        ArtifactError: not such a file, or tensors of another kind or shape.
    """
    if not zipfile.is_zipfile(path):  # torch.save writes nothing else since 1.6
        raise ArtifactError(f"{path}: not a readable .pt of tensors (no zip archive)")
    try:
        # weights_only: tensors and plain containers, nothing that the file could execute
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()
        raise ArtifactError(
            f"{path}: not a readable .pt of tensors ({reason[0] if reason else error!r})"
        ) from error
    fields = [content.get(k) for k in ("indices", "likelihoods")] if _is_dict(content) else []
    tensors = [field for field in fields if isinstance(field, torch.Tensor)]
    if len(tensors) != 2:
        raise ArtifactError(f"{path}: wanted a dict of two tensors, `indices` and `likelihoods`")
    indices, likelihoods = tensors
    if indices.ndim != 2 or indices.shape != likelihoods.shape or indices.is_floating_point():
        raise ArtifactError(
            f"{path}: wanted integer indices and likelihoods, both [V_S, k]; they are "
            f"{indices.dtype} {list(indices.shape)} and {list(likelihoods.shape)}"
        )
    weights = likelihoods.to(torch.float64).numpy()
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise ArtifactError(f"{path}: likelihoods are negative or not finite")
    return TopK(indices=indices.to(torch.int64).numpy(), likelihoods=weights)


def import_topk(
    topk: TopK,
    *,
    student: Vocabulary,
    teacher: Vocabulary,
    reapply_exact: bool = True,
    top: int = NEMO_OPTIONS.max_length,
) -> NemoImport:
    """Our projection of this pair with the file's weights in place of the builder's.

    As in NeMo's own pipeline: with ``reapply_exact`` a token of equal bytes gets a one-hot row
    whatever the file says, every row is sorted by weight and cut to its ``top`` largest (equal
    ones in the file's order), and normalised (bfloat16 rows sum to 1.0017). Weights are put on
    folded columns; a row without entries goes to null. The end of turn keeps our row: NeMo has
    none for it.

    Raises:
        ArtifactError: the file has fewer rows than the student has tokens, entries in rows past
            the last token, or indices past the teacher's last token.
    """
    _check_sizes(topk, student=student, teacher=teacher)
    size = student.size
    built = build_projection(student, teacher, NEMO_OPTIONS)
    own = built.kind == SPECIAL
    if reapply_exact:
        own |= built.kind == EXACT
    weights = np.where(topk.indices >= 0, topk.likelihoods, 0.0)[:size]
    weights[own] = 0.0
    scaled = _scaled(weights)
    row, place = np.nonzero(_largest(weights, top))
    ours = np.flatnonzero(own)  # one entry each
    empty = np.flatnonzero(~own & ~(weights > 0).any(axis=1))
    crow, col, val = _csr(
        np.concatenate([row, ours, empty]),
        np.concatenate(
            [
                built.fold[topk.indices[row, place]].astype(np.int64),
                built.col[built.crow[ours]].astype(np.int64),
                np.full(len(empty), teacher.size),
            ]
        ),
        np.concatenate([weights[row, place], np.ones(len(ours) + len(empty))]),
        shape=(size, teacher.size + 1),
    )
    converted = dataclasses.replace(
        built, crow=crow, col=col, val=val, kind=_kinds(built, crow=crow, col=col)
    )
    return NemoImport(projection=converted, scaled_rows=scaled)


def _check_sizes(topk: TopK, *, student: Vocabulary, teacher: Vocabulary) -> None:
    filled = (topk.indices >= 0) & (topk.likelihoods > 0)
    if len(filled) < student.size or filled[student.size :].any():
        raise ArtifactError(
            f"the file has {len(filled)} rows, the student {student.size} tokens; name its own "
            "tokenizer"
        )
    if (largest := int(topk.indices.max(initial=-1, where=filled))) >= teacher.size:
        raise ArtifactError(
            f"the file names teacher token {largest}, the teacher has {teacher.size} tokens; "
            "name its own tokenizer"
        )


def _largest(weights: np.ndarray, top: int) -> np.ndarray:
    """[V_S, k] bool: the ``top`` largest entries of each row that are not 0."""
    order = np.argsort(-weights, axis=1, kind="stable")[:, :top]
    kept = np.zeros(weights.shape, dtype=bool)
    np.put_along_axis(kept, order, True, axis=1)
    return kept & (weights > 0)


def _is_dict(content: object) -> bool:
    return isinstance(content, dict)


def _csr(
    row: np.ndarray, column: np.ndarray, weight: np.ndarray, *, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows that sum to 1; entries of one place are added."""
    places, index = np.unique(row * shape[1] + column, return_inverse=True)
    summed = np.bincount(index, weights=weight, minlength=len(places))
    row, column = places // shape[1], places % shape[1]
    total = np.bincount(row, weights=summed, minlength=shape[0])
    crow = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=shape[0]))])
    return (
        crow.astype(np.int32),
        column.astype(np.int32),
        (summed / total[row]).astype(np.float32),
    )


def _kinds(built: Projection, *, crow: np.ndarray, col: np.ndarray) -> np.ndarray:
    """[V_S] uint8: exact only where both the bytes and the file's row say so."""
    single = np.diff(crow) == 1
    first = col[crow[:-1]]
    same = single & (first == built.col[built.crow[:-1]])
    kind = np.where((built.kind == EXACT) & same, EXACT, MULTI)
    kind = np.where(single & (first == built.teacher_size), NULL, kind)
    return np.where(built.kind == SPECIAL, SPECIAL, kind).astype(np.uint8)


def _scaled(weights: np.ndarray) -> np.ndarray:
    """[n] int64: rows of several entries, one of which is 1/6 as the scale trick leaves it."""
    total = weights.sum(axis=1, keepdims=True)
    shares = weights / np.where(total > 0, total, 1.0)
    is_scale = np.abs(shares - _SCALE_SHARE) < _SCALE_TOLERANCE
    return np.flatnonzero(is_scale.any(axis=1))
