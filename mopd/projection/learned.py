"""A projection that is trained: log-weights on W's entries, each row a softmax.

Source: X-Token 2605.21699, where P-KL learns W at a learning rate of 1e-2. The artefact on the host
never changes. What is learned is kept beside it, in a file of its own that names the artefact.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from mopd.errors import ArtifactError
from mopd.projection.shard import ProjectionShard
from mopd.types import Projection, ragged_arange

FORMAT = "mopd-learned-projection-1"
BETAS, EPSILON = (0.9, 0.999), 1e-8  # Adam's own defaults

State = Mapping[str, np.ndarray]
_PER_ENTRY = ("log_weight", "first_moment", "second_moment")


class LearnedShard:
    """The rows ``start:end`` of a learned W, in place of a `ProjectionShard`.

    Losses call `accumulate`; the caller adds `gradient` over the data-parallel replicas, which then
    all take the same `step`. Shards of one W are independent: a row of W lives on one rank.
    """

    def __init__(
        self,
        projection: Projection,
        *,
        start: int,
        end: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._fixed = ProjectionShard(projection, start=start, end=end, device=device)
        self.teacher_size: int = projection.teacher_size
        self.common: Tensor = self._fixed.common
        end = min(end, projection.student_size)
        start = min(start, end)
        low, high = int(projection.crow[start]), int(projection.crow[end])
        self._entries = (low, high)
        col = projection.col[low:high].astype(np.int64)
        lengths = np.diff(projection.crow[start : end + 1].astype(np.int64))
        order = np.argsort(col, kind="stable")  # entries column by column
        counts = np.bincount(col, minlength=projection.teacher_size + 1)
        self._column_ptr = torch.as_tensor(_offsets(counts), device=device)
        self._order = torch.as_tensor(order, device=device)
        self._row = torch.as_tensor(np.repeat(np.arange(end - start), lengths), device=device)
        # rows padded to the longest one: sums over a row have one order on every device
        place = ragged_arange(np.zeros(end - start, dtype=np.int64), lengths)
        self._place = torch.as_tensor(place, device=device)
        self._padded = (end - start, int(lengths.max(initial=0)))
        with np.errstate(divide="ignore"):
            logs = np.log(projection.val[low:high].astype(np.float64))
        self._log_weight = torch.as_tensor(logs, device=device).to(dtype)
        self._moments = (torch.zeros_like(self._log_weight), torch.zeros_like(self._log_weight))
        self._steps = 0
        self.gradient: Tensor = torch.zeros_like(self._log_weight)
        self._weight = self._softmax()

    @property
    def device(self) -> torch.device:
        return self._log_weight.device

    def columns(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Entries of columns ``ids`` [G]: (local student row, index into ids, weight), each [E]."""
        entry, index = self._entries_of(ids)
        return self._row[entry], index, self._weight[entry]

    def fibre_entries(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `ProjectionShard.fibre_entries`: fibres are spelling, which nobody learns."""
        return self._fixed.fibre_entries(slots)

    def accumulate(self, ids: Tensor, gradient: Tensor) -> None:
        """Adds d(objective)/dW [E] of the entries that ``columns(ids)`` lists, ids all different.

        A constant per row of W may be missing: rows add up to 1.
        """
        entry, _ = self._entries_of(ids)
        self.gradient[entry] += gradient.to(self.gradient.dtype)

    def log_gradient(self) -> Tensor:
        """[entries] of `gradient` taken through the softmax of each row."""
        mean = self._row_sum(self._weight * self.gradient)
        return self._weight * (self.gradient - mean[self._row])

    def step(self, lr: float) -> None:
        """One step of Adam down `gradient`, which is 0 again afterwards."""
        slope = self.log_gradient()
        first, second = self._moments
        self._steps += 1
        first.lerp_(slope, 1.0 - BETAS[0])
        second.lerp_(slope * slope, 1.0 - BETAS[1])
        corrected = torch.sqrt(second / (1.0 - BETAS[1] ** self._steps)) + EPSILON
        self._log_weight -= lr * (first / (1.0 - BETAS[0] ** self._steps)) / corrected
        self.gradient.zero_()
        self._weight = self._softmax()

    def state(self) -> dict[str, np.ndarray]:
        """This shard's rows; `joined` puts the shards of one W together."""
        tensors = (self._log_weight, *self._moments)
        arrays = {k: v.cpu().numpy().copy() for k, v in zip(_PER_ENTRY, tensors, strict=True)}
        return arrays | {"steps": np.array([self._steps], dtype=np.int64)}

    def load(self, state: State) -> None:
        """Takes its own rows out of the state of a whole W, saved in whatever layout.

        Raises:
            ArtifactError: entries of another W.
        """
        low, high = self._entries
        for name in _PER_ENTRY:
            if len(state[name]) < high:
                raise ArtifactError(
                    f"learned projection: {len(state[name])} entries, wanted {high}"
                )
        self.restore({k: v if k == "steps" else v[low:high] for k, v in state.items()})

    def restore(self, state: State) -> None:
        """Takes back what `state` of the same shard gave."""
        tensors = (self._log_weight, *self._moments)
        for name, tensor in zip(_PER_ENTRY, tensors, strict=True):
            tensor.copy_(torch.as_tensor(state[name]))
        self._steps = int(state["steps"][0])
        self.gradient.zero_()
        self._weight = self._softmax()

    def _entries_of(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        begin, count = self._column_ptr[ids], self._column_ptr[ids + 1] - self._column_ptr[ids]
        total = int(count.sum())
        index = torch.repeat_interleave(
            torch.arange(len(ids), device=ids.device), count, output_size=total
        )
        before = torch.cumsum(count, 0) - count
        offset = torch.arange(total, device=ids.device) - before[index]
        return self._order[begin[index] + offset], index

    def _softmax(self) -> Tensor:
        padded = self._log_weight.new_full(self._padded, -torch.inf)
        padded[self._row, self._place] = self._log_weight
        return torch.softmax(padded, dim=1)[self._row, self._place]

    def _row_sum(self, values: Tensor) -> Tensor:
        padded = values.new_zeros(self._padded)
        padded[self._row, self._place] = values
        return padded.sum(dim=1)


def joined(states: Sequence[State]) -> dict[str, np.ndarray]:
    """The state of a whole W from those of its shards, in the order of their rows."""
    arrays = {name: np.concatenate([state[name] for state in states]) for name in _PER_ENTRY}
    return arrays | {"steps": states[0]["steps"]}


def save_learned(path: Path, projection: Projection, state: State) -> None:
    """One safetensors file; readers see the old file or the whole new one."""
    metadata = _metadata(projection)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    os.close(handle)
    save_file({k: np.ascontiguousarray(v) for k, v in state.items()}, temporary, metadata)
    os.replace(temporary, path)


def load_learned(path: Path, projection: Projection) -> dict[str, np.ndarray]:
    """The state of a whole W, learned from ``projection``.

    Raises:
        ArtifactError: not such a file, or one of other tokenizers or other entries.
    """
    try:
        with safe_open(str(path), framework="np") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path}: not a readable learned projection ({error})") from error
    for key, wanted in _metadata(projection).items():
        if metadata.get(key) != wanted:
            raise ArtifactError(
                f"{path}: {key} {metadata.get(key)}, wanted {wanted}; it belongs to another "
                "projection, delete it to start from the built weights"
            )
    return state


def _metadata(projection: Projection) -> dict[str, str]:
    shape = projection.crow.astype("<i8").tobytes() + projection.col.astype("<i8").tobytes()
    return {
        "format": FORMAT,
        "student": projection.student_fingerprint,
        "teacher": projection.teacher_fingerprint,
        "entries": hashlib.sha256(shape).hexdigest(),
    }


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
