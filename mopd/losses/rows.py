"""A teacher's payload cut into blocks of logits rows, on the device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from mopd.losses.base import ProjectionRows, RowBlock
from mopd.types import TeacherRows


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Logits rows ``positions`` [n] of the flattened prediction axis, and what is known of them."""

    positions: np.ndarray
    rows: RowBlock
    tokens: slice  # which of the payload's chunk tokens fall into this block

    @property
    def span(self) -> slice | None:
        """The positions as a slice, where they follow each other."""
        first, end = int(self.positions[0]), int(self.positions[-1]) + 1
        return slice(first, end) if end - first == len(self.positions) else None


class _Bounds:
    """Which sorted entries fall into a range of positions."""

    def __init__(self, positions: np.ndarray) -> None:
        self.positions = positions

    def cut(self, low: int, high: int) -> slice:
        a, b = np.searchsorted(self.positions, [low, high])
        return slice(int(a), int(b))


def blocks(
    payload: TeacherRows,
    *,
    projection: ProjectionRows | None,
    with_tokens: bool,
    block_size: int,
    like: Tensor,
) -> Iterator[Block]:
    """Blocks of at most ``block_size`` rows, in order of position.

    Only boundary and native rows are visited, plus the rows inside chunks if ``with_tokens``. Then
    no chunk is cut (a loss may merge its rows), and one that is longer makes a longer block.
    Tensors take the device of ``like``; probabilities its dtype.
    """
    token_positions = payload.token_position if with_tokens else payload.token_position[:0]
    visited = payload.position
    for others in (token_positions, payload.native_position):
        if len(others):
            visited = np.union1d(visited, others)
    bounds = {
        name: _Bounds(array)
        for name, array in (
            ("boundary", payload.position),
            ("token", token_positions),
            ("path", payload.path_position),
            ("native", payload.native_position),
        )
    }
    chunk = np.full(len(visited), -1, dtype=np.int64)
    chunk[np.searchsorted(visited, token_positions)] = payload.token_chunk[: len(token_positions)]
    for begin, end in pairwise(_cuts(chunk, block_size)):
        positions = visited[begin:end]
        low, high = int(positions[0]), int(positions[-1]) + 1
        cuts = {name: bound.cut(low, high) for name, bound in bounds.items()}
        rows = _row_block(payload, positions, cuts, projection=projection, like=like)
        yield Block(positions=positions, rows=rows, tokens=cuts["token"])


def _cuts(chunk: np.ndarray, block_size: int) -> list[int]:
    """Where blocks begin, and the end; rows of one ``chunk`` [n] (-1: of none) stay together."""
    joined = (chunk[1:] == chunk[:-1]) & (chunk[1:] >= 0)
    allowed = np.concatenate([[0], np.flatnonzero(~joined) + 1, [len(chunk)]])
    cuts = [0]
    while cuts[-1] < len(chunk):
        furthest = int(np.searchsorted(allowed, cuts[-1] + block_size, side="right")) - 1
        if allowed[furthest] <= cuts[-1]:
            furthest += 1
        cuts.append(int(allowed[furthest]))
    return cuts


def _row_block(
    payload: TeacherRows,
    positions: np.ndarray,
    cuts: dict[str, slice],
    *,
    projection: ProjectionRows | None,
    like: Tensor,
) -> RowBlock:
    def index(name: str, array: np.ndarray) -> Tensor:
        return _tensor(np.searchsorted(positions, array[cuts[name]]), like)

    boundary, token, native = cuts["boundary"], cuts["token"], cuts["native"]
    path = _path_arrays(payload, positions, cuts["path"], projection)
    return RowBlock(
        boundary=index("boundary", payload.position),
        weight=_tensor(payload.row_weight[boundary], like),
        topk_ids=_listed_ids(payload.topk_ids, boundary, like),
        topk_logprobs=_tensor(payload.topk_logprobs[boundary], like),
        log_tail=_tensor(payload.log_tail[boundary], like),
        token_row=index("token", payload.token_position),
        token_id=_tensor(payload.token_id[token], like),
        token_chunk=_tensor(payload.token_chunk[token], like),
        native=index("native", payload.native_position),
        native_weight=_tensor(payload.native_weight[native], like),
        native_ids=_tensor(payload.native_ids[native], like),
        native_logprobs=_tensor(payload.native_logprobs[native], like),
        native_log_tail=_tensor(payload.native_log_tail[native], like),
        **{name: _tensor(array, like) for name, array in path.items()},
    )


def _listed_ids(ids: np.ndarray | None, boundary: slice, like: Tensor) -> Tensor | None:
    if ids is None:
        return None
    return _tensor(ids if ids.ndim == 1 else ids[boundary], like)


def _path_arrays(
    payload: TeacherRows,
    positions: np.ndarray,
    cut: slice,
    projection: ProjectionRows | None,
) -> dict[str, np.ndarray]:
    count = cut.stop - cut.start
    if projection is None or not count:
        names = ("slot_path", "entry_row", "entry_slot", "entry_token")
        empty: dict[str, np.ndarray] = {name: np.zeros(0, dtype=np.int64) for name in names}
        none = np.zeros(0, dtype=np.float32)
        return empty | {"path_weight": none, "slot_target": none}
    offsets = payload.path_offsets[cut.start : cut.stop + 1]
    low, high = int(offsets[0]), int(offsets[-1])
    begin, end = np.searchsorted(payload.path_entry_slot, [low, high])
    entry, entry_token = projection.fibre_entries(payload.path_entry[begin:end])
    entry_slot = payload.path_entry_slot[begin:end][entry] - low
    slot_path = np.repeat(np.arange(count), np.diff(offsets))
    row_of_path = np.searchsorted(positions, payload.path_position[cut])
    return {
        "path_weight": payload.path_weight[cut],
        "slot_path": slot_path,
        "slot_target": payload.path_target[low:high],
        "entry_row": row_of_path[slot_path[entry_slot]],
        "entry_slot": entry_slot,
        "entry_token": entry_token,
    }


def _tensor(array: np.ndarray, like: Tensor) -> Tensor:
    """On the device of ``like``; integers as int64, the rest in its dtype; not to be written to."""
    if array.dtype.kind in "iu":
        array = array.astype(np.int64, copy=False)
    with warnings.catch_warnings():
        # payloads may be views of read-only buffers, and nothing here writes
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.to(like.device, torch.int64 if array.dtype.kind in "iu" else like.dtype)
