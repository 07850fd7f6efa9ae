"""Adapters in PEFT's format: how they start, where they come from, how they are written."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from mopd.config.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from mopd.errors import ArtifactError
from mopd.storage.files import fsync_directory, fsync_file, replace_directory
from mopd.student.hf_io import ModelView, to_lead
from mopd.student.lora import Adapters, Target
from mopd.student.parallel import Topology


class AdaptedModel(ModelView, Protocol):
    """`mopd.student.model.StudentModel`."""

    @property
    def adapters(self) -> Adapters | None: ...


def fill(adapters: Adapters, *, seed: int, topology: Topology) -> None:
    """Give this rank's adapters their values: those of `lora.path`, or PEFT's fresh ones.

    Raises ArtifactError where the file of `lora.path` lacks a tensor or has one of another shape.
    """
    path = adapters.section.path
    for pair in adapters.pairs.values():
        target, rank = pair.target, adapters.rank
        if path is None:
            a, b = initial(target, rank=rank, seed=seed)
        else:
            a, b = read(Path(path), target, rank=rank)
        pair.fill(a, b, topology)


def initial(target: Target, *, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A [R, I] and B [O, R] as PEFT starts them: A uniform in +-1 / sqrt(I), B zero.

    They depend on the seed and the layer's name alone, so every layout draws the same.
    """
    rows, columns = target.size
    digest = hashlib.sha256(f"{seed} {target.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    a = torch.empty((rank, columns))
    nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
    return a, torch.zeros((rows, rank))


def read(directory: Path, target: Target, *, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A [R, I] and B [O, R] of one layer from a PEFT directory. Raises ArtifactError."""
    path = directory / ADAPTER_WEIGHTS
    rows, columns = target.size
    found = []
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for letter, size in (("A", (rank, columns)), ("B", (rows, rank))):
                name = peft_name(target, letter)
                if name not in names:
                    raise ArtifactError(
                        f"student.lora.path: {path} has no tensor {name}; give an adapter of "
                        "student.model"
                    )
                tensor = file.get_tensor(name)
                if tuple(tensor.shape) != size:
                    raise ArtifactError(
                        f"student.lora.path: {path}: {name} has shape {tuple(tensor.shape)}, not "
                        f"{size}; give an adapter of student.model"
                    )
                found.append(tensor)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"student.lora.path: {path} cannot be read: {error}") from error
    return found[0], found[1]


def peft_name(target: Target, letter: str) -> str:
    """PEFT's name of a layer's A or B."""
    return f"base_model.model.{target.name.removesuffix('.weight')}.lora_{letter}.weight"


def iter_adapter(model: AdaptedModel) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Stream A [R, I] and B [O, R] of every layer: `(PEFT's name, tensor)` on the lead, else None.

    Collective over the replica: every rank runs it to the end.
    """
    adapters = model.adapters
    assert adapters is not None
    for target in adapters.targets:
        rows, columns = target.size
        whole = None
        if target.name in adapters.pairs:
            whole = adapters.pairs[target.name].gather(model.topology)
        a, b = whole or (None, None)
        stage = target.slot.stage
        yield (
            peft_name(target, "A"),
            to_lead(a, (adapters.rank, columns), stage, model=model),
        )
        yield peft_name(target, "B"), to_lead(b, (rows, adapters.rank), stage, model=model)


def save_peft(
    model: AdaptedModel,
    out_dir: str | Path,
    *,
    base_dir: str | Path,
    dtype: torch.dtype | None = None,
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`; `out_dir` appears whole.

    ``base_dir`` is the model that the adapter belongs to, ``dtype`` that of the file; None: the
    model's. Collective over the replica, and over that replica only: call it on the ranks of one
    replica.
    """
    out_dir, adapters = Path(out_dir), model.adapters
    if adapters is None:
        raise ValueError("the model has no adapters; set student.lora.rank")
    tensors = {
        name: tensor.to(dtype or model.dtype).contiguous().cpu()
        for name, tensor in iter_adapter(model)
        if tensor is not None
    }
    if model.topology.is_lead:
        part = out_dir.with_name(out_dir.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        text = json.dumps(describe_adapter(adapters, base_dir), indent=2, sort_keys=True)
        (part / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")
        save_file(tensors, part / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            fsync_file(part / name)
        fsync_directory(part)
        replace_directory(part, out_dir)
    dist.barrier(group=model.topology.replica_group)


def describe_adapter(adapters: Adapters, base_dir: str | Path) -> dict[str, Any]:
    """PEFT's `adapter_config.json`, where alpha is an integer if it can be."""
    alpha = adapters.section.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_dir),
        "r": adapters.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "target_modules": sorted(adapters.section.target_modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
