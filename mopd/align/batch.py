"""Rollouts with their teachers' rows -> micro-batches, right-padded or packed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from mopd.types import MicroBatch, Rollout, TeacherRows


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One rollout and what each of its teachers says; positions count response tokens.

    ``trained`` [S] bool narrows the rollout's loss mask.
    """

    rollout: Rollout
    rows: Mapping[str, TeacherRows]
    trained: np.ndarray | None = None

    @property
    def mass(self) -> dict[str, tuple[float, float]]:
        """Per teacher: its chunks and the student tokens in them, whatever they weigh."""
        sizes = {name: rows.chunk_size[:, 0] for name, rows in self.rows.items()}
        return {name: (float(len(each)), float(each.sum())) for name, each in sizes.items()}

    @property
    def loss_mask(self) -> np.ndarray:
        """[S] bool: the tokens that are trained."""
        return self.rollout.loss_mask if self.trained is None else self.trained


@dataclass(frozen=True, slots=True, kw_only=True)
class Batching:
    """How samples become micro-batches.

    ``size`` samples each or, with ``max_tokens``, as many as fit, padding counted; a sample that is
    longer has a micro-batch of its own. ``packing`` puts them behind each other.
    """

    size: int
    max_tokens: int | None = None
    packing: bool = False


def make_micro_batches(
    samples: Sequence[Sample], *, batching: Batching, pad_id: int
) -> tuple[MicroBatch, ...]:
    """Micro-batches of the samples; of one common padded length where ``size`` cuts them.

    The student reads prompt + response; row i predicts token i + 1, so the response token s of a
    prompt of P tokens is predicted by row P - 1 + s. Labels are never shifted again.
    """
    lengths = [_length(sample) for sample in samples]
    groups = _groups(lengths, batching)
    if batching.packing:
        return tuple(_packed([samples[i] for i in group]) for group in groups)
    longest = max(lengths)
    return tuple(
        _padded_batch(
            [samples[i] for i in group],
            length=longest if batching.max_tokens is None else max(lengths[i] for i in group),
            pad_id=pad_id,
        )
        for group in groups
    )


def _groups(lengths: Sequence[int], batching: Batching) -> list[list[int]]:
    """Samples of each micro-batch."""
    limit = batching.max_tokens
    if limit is None:
        every = list(range(len(lengths)))
        return [every[i : i + batching.size] for i in range(0, len(every), batching.size)]
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups: list[list[int]] = []
    for i in longest_first:
        if batching.packing:  # first fit, decreasing
            fits = (g for g in groups if sum(lengths[k] for k in g) + lengths[i] <= limit)
        else:  # the first of a group is its longest
            fits = (g for g in groups[-1:] if (len(g) + 1) * lengths[g[0]] <= limit)
        group = next(fits, None)
        if group is None:
            groups.append(group := [])
        group.append(i)
    return [sorted(group) for group in groups]


def _length(sample: Sample) -> int:
    return len(sample.rollout.prompt_ids) + len(sample.rollout.token_ids)


def _padded_batch(samples: Sequence[Sample], *, length: int, pad_id: int) -> MicroBatch:
    starts = [b * length for b in range(len(samples))]
    return _micro_batch(samples, starts, shape=(len(samples), length), pad_id=pad_id)


def _packed(samples: Sequence[Sample]) -> MicroBatch:
    offsets = np.cumsum([0, *(_length(sample) for sample in samples)])
    batch = _micro_batch(samples, offsets[:-1].tolist(), shape=(1, int(offsets[-1])), pad_id=0)
    return replace(batch, offsets=offsets)


def _micro_batch(
    samples: Sequence[Sample], starts: Sequence[int], *, shape: tuple[int, int], pad_id: int
) -> MicroBatch:
    """Sample i begins at position ``starts[i]`` of the flattened micro-batch."""
    tokens = np.full(shape[0] * shape[1], pad_id, dtype=np.int64)
    mask = np.zeros(tokens.shape, dtype=bool)
    per_teacher: dict[str, list[TeacherRows]] = {}
    for start, sample in zip(starts, samples, strict=True):
        rollout, total = sample.rollout, _length(sample)
        first = start + len(rollout.prompt_ids)
        tokens[start:first], tokens[first : start + total] = rollout.prompt_ids, rollout.token_ids
        mask[first - 1 : start + total - 1] = sample.loss_mask
        for name, rows in sample.rows.items():
            per_teacher.setdefault(name, []).append(_moved(rows, first - 1))
    return MicroBatch(
        tokens=tokens.reshape(shape),
        lengths=np.array([_length(sample) for sample in samples], dtype=np.int64),
        response_mask=mask.reshape(shape),
        rows={name: concatenate_rows(parts) for name, parts in per_teacher.items()},
        domains=tuple(sample.rollout.prompt.domain for sample in samples),
    )


def _moved(rows: TeacherRows, offset: int) -> TeacherRows:
    return replace(
        rows,
        position=rows.position + offset,
        token_position=rows.token_position + offset,
        path_position=rows.path_position + offset,
        native_position=rows.native_position + offset,
    )


def concatenate_rows(parts: Sequence[TeacherRows]) -> TeacherRows:
    """Rows of several samples of one teacher, one after the other; narrower lists are padded.

    Raises:
        ValueError: the parts list different shared columns.
    """
    chunks_before = _before([len(part.chunk_logprob) for part in parts])
    targets_before = _before([len(part.path_target) for part in parts])
    columns: dict[str, np.ndarray] = {}
    for column in fields(TeacherRows):
        if column.name in ("teacher", "path_offsets", "topk_ids"):
            continue
        arrays = [getattr(part, column.name) for part in parts]
        if column.name in _PADDING:
            arrays = _padded(arrays, _PADDING[column.name])
        elif column.name == "token_chunk":
            arrays = [a + n for a, n in zip(arrays, chunks_before, strict=True)]
        elif column.name == "chunk_sequence":  # a part is one rollout
            arrays = [np.full_like(a, number) for number, a in enumerate(arrays)]
        elif column.name == "path_entry_slot":
            arrays = [a + n for a, n in zip(arrays, targets_before, strict=True)]
        columns[column.name] = np.concatenate(arrays)
    offsets = [p.path_offsets[1:] + n for p, n in zip(parts, targets_before, strict=True)]
    return TeacherRows(
        teacher=parts[0].teacher,
        topk_ids=_listed([part.topk_ids for part in parts]),
        path_offsets=np.concatenate([np.zeros(1, dtype=np.int64), *offsets]),
        **columns,
    )


_PADDING = {"topk_logprobs": -np.inf, "native_ids": -1, "native_logprobs": -np.inf}


def _listed(parts: Sequence[np.ndarray | None]) -> np.ndarray | None:
    first = parts[0]
    if first is not None and first.ndim == 2:
        return np.concatenate(_padded([part for part in parts if part is not None], -1))
    if any(not np.array_equal(part, first) for part in parts):  # pyright: ignore[reportArgumentType]
        raise ValueError("samples of one micro-batch list different shared teacher columns")
    return first


def _before(counts: Sequence[int]) -> np.ndarray:
    return np.cumsum([0, *counts])[:-1]


def _padded(arrays: Sequence[np.ndarray], fill: float) -> list[np.ndarray]:
    width = max(array.shape[1] for array in arrays)
    return [
        np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=fill)
        for array in arrays
    ]
