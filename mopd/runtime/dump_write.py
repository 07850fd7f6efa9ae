"""Writes one step's tensors (`debug.dump_step`); `mopd.runtime.dump` computes the step from them.

A rank of the last pipeline stage keeps what its loss reads while the step runs: the rows of hidden
states (or logits) and its part of the payload. Nothing is pickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

import mopd
from mopd.config.load import dump_config
from mopd.metrics.text import json_safe
from mopd.projection.store import projection_arrays
from mopd.runtime.build import Run
from mopd.runtime.replica import from_all
from mopd.runtime.report import loss_values
from mopd.storage.files import fsync_file, replace_directory, sha256, write_bytes
from mopd.storage.manifest import to_json
from mopd.student.step import StepResult
from mopd.types import MicroBatch, StepBatch, TeacherRows

FORMAT = "mopd-step-1"
MANIFEST, DIGEST, CONFIG = "manifest.json", "manifest.sha256", "config.yaml"
PROJECTIONS = "projections.safetensors"
LIBRARIES = ("torch", "numpy", "megatron-core", "transformers", "safetensors")


class StepDump:
    """Give `capture` to `Student.train_step`, then call `write`. One step each."""

    def __init__(self, run: Run, step: int) -> None:
        self._run = run
        self._step = step
        self._names = tuple(run.pairs)
        self._arrays: dict[str, Any] = {}
        self._micro_batches: list[dict[str, Any]] = []

    def capture(self, last: Tensor, weight: Tensor | None, micro: MicroBatch) -> None:
        """What the loss reads of one micro-batch: hidden states [B, L, H] and the output weight,
        or logits [B, L, V_local] without one."""
        topology, place = self._run.topology, len(self._micro_batches)
        first_column = topology.tp_rank == 0
        positions = _positions(micro)
        rows = last.detach().reshape(-1, last.shape[-1])
        rows = rows[torch.as_tensor(positions, device=rows.device)]
        if weight is None:
            self._arrays[f"{place}.logits"] = rows
        elif first_column:  # whole on every tensor-parallel rank
            self._arrays[f"{place}.hidden"] = rows
        if place == 0 and topology.dp_rank == 0 and topology.cp_rank == 0:
            self._keep_weights(weight)
        if first_column:
            self._arrays |= _micro_arrays(f"{place}.", micro, self._names)
            self._arrays[f"{place}.positions"] = positions
        teachers = [self._names.index(name) for name in micro.rows]
        self._micro_batches.append({"domains": list(micro.domains), "teachers": teachers})

    def write(self, batch: StepBatch, result: StepResult) -> Path:
        """``<run>/dump-<step>``, whole or not at all. Collective over all ranks."""
        topology = self._run.topology
        target = self._run.directory / f"dump-{self._step}"
        part = target.with_name(target.name + ".part")
        is_main = dist.get_rank() == 0
        if is_main:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        dist.barrier()
        files: dict[str, dict[str, Any]] = {}
        own: dict[str, Any] | None = None
        if topology.is_last_stage:
            name = f"rank-{dist.get_rank()}.safetensors"
            files[name] = _write(part / name, self._arrays)
            own = {
                "file": name,
                "place": [topology.dp_rank, topology.cp_rank, topology.tp_rank],
                "micro_batches": self._micro_batches,
            }
        told = from_all((own, files))
        if is_main:
            for _, theirs in told:
                files |= theirs
            files |= self._write_shared(part)
            ranks = [each for each, _ in told if each is not None]
            content = to_json(self._manifest(batch, result, ranks, files))
            write_bytes(part / MANIFEST, content)
            write_bytes(part / DIGEST, f"{hashlib.sha256(content).hexdigest()}\n".encode())
            replace_directory(part, target)
        dist.barrier()
        return target

    def _keep_weights(self, weight: Tensor | None) -> None:
        """Before the step changes them."""
        if weight is not None:
            self._arrays["weight"] = weight.detach().clone()
        companions = self._run.student.companions
        for name, companion in companions.members.items() if companions else ():
            for key, array in companion.state().items():
                self._arrays[f"learned.{self._names.index(name)}.{key}"] = array

    def _write_shared(self, part: Path) -> dict[str, dict[str, Any]]:
        arrays: dict[str, np.ndarray] = {}
        for i, pair in enumerate(self._run.pairs.values()):
            if pair.projection is not None:
                found = projection_arrays(pair.projection)
                arrays |= {f"{i}.{name}": array for name, array in found.items()}
        write_bytes(part / CONFIG, dump_config(self._run.config).encode())
        return {
            PROJECTIONS: _write(part / PROJECTIONS, arrays),
            CONFIG: _described(part / CONFIG),
        }

    def _manifest(
        self,
        batch: StepBatch,
        result: StepResult,
        ranks: list[dict[str, Any]],
        files: Mapping[str, dict[str, Any]],
    ) -> dict[str, Any]:
        run, topology = self._run, self._run.topology
        sizes = ("dp_size", "tp_size", "pp_size", "cp_size", "ep_size")
        return {
            "format": FORMAT,
            "step": self._step,
            "versions": _versions(),
            "layout": {size: getattr(topology, size) for size in sizes},
            "device": topology.device.type,
            "vocab_size": run.tokenizer.vocabulary.size,
            "padded_vocab_size": run.student.model.padded_vocab_size,
            "teachers": [_teacher(name, pair) for name, pair in run.pairs.items()],
            "batch": {
                "denominators": sorted(batch.denominators.items()),
                "weights": sorted(batch.weights.items()),
                "num_tokens": batch.num_tokens,
                "num_response_tokens": batch.num_response_tokens,
                "distillation_weight": batch.distillation_weight,
                "crossentropy_weight": batch.crossentropy_weight,
            },
            "recorded": json_safe(step_values(result.loss, result.metrics, batch)),
            "not_computed_again": json_safe({"grad_norm": result.grad_norm, "lr": result.lr}),
            "ranks": ranks,
            "files": files,
        }


def step_values(loss: float, metrics: Mapping[str, float], batch: StepBatch) -> dict[str, float]:
    """What a replay must find again: everything that comes from the losses."""
    values = loss_values(metrics, batch)
    return {"loss": loss, **{k: v for k, v in values.items() if not k.startswith("moe/")}}


def _teacher(name: str, pair: Any) -> dict[str, Any]:
    projection = pair.projection
    told = None
    if projection is not None:
        told = {
            "student": projection.student_fingerprint,
            "teacher": projection.teacher_fingerprint,
        }
    return {"name": name, "loss": pair.loss, "projection": told}


def _positions(micro: MicroBatch) -> np.ndarray:
    """Of the flattened rows that any loss may visit."""
    read = [np.flatnonzero(micro.response_mask)]
    for rows in micro.rows.values():
        read += [rows.position, rows.token_position, rows.native_position]
    return np.unique(np.concatenate(read)).astype(np.int64)


def _micro_arrays(
    prefix: str, micro: MicroBatch, teachers: tuple[str, ...]
) -> dict[str, np.ndarray]:
    arrays = {
        f"{prefix}{name}": getattr(micro, name)
        for name in ("tokens", "lengths", "response_mask", "offsets")
        if getattr(micro, name) is not None
    }
    for teacher, rows in micro.rows.items():
        for field in dataclasses.fields(TeacherRows):
            value = getattr(rows, field.name)
            if isinstance(value, np.ndarray):
                arrays[f"{prefix}{teachers.index(teacher)}.{field.name}"] = value
    return arrays


def _write(path: Path, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """A safetensors file on the disk; its size and SHA-256."""
    save_file(_tensors(arrays), path)
    fsync_file(path)
    return _described(path)


def _described(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def _tensors(arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    """Contiguous, in host memory."""
    return {
        name: (value if torch.is_tensor(value) else torch.from_numpy(np.array(value)))
        .cpu()
        .contiguous()
        for name, value in arrays.items()
    }


def _versions() -> dict[str, str]:
    found = {"mopd": mopd.__version__, "python": platform.python_version()}
    return found | {name: importlib.metadata.version(name) for name in LIBRARIES}
