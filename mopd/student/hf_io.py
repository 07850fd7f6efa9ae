"""Hugging Face directories in and out of Megatron's shards, one tensor at a time.

A `mopd.config.slots.Slot` pairs one Megatron parameter with the Hugging Face tensors it is made
of.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors import safe_open

from mopd.config.model_shape import ModelShape
from mopd.config.slots import Slot, build_slots, parameter_name
from mopd.errors import ArtifactError
from mopd.serving.hf_experts import in_fused
from mopd.student.parallel import Topology


class ModelView(Protocol):
    """What weights are read from: `mopd.student.model.StudentModel`."""

    @property
    def shape(self) -> ModelShape: ...

    @property
    def topology(self) -> Topology: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]: ...

    def merged(self, name: str, tensor: torch.Tensor | None) -> torch.Tensor | None: ...


class HfReader:
    """Random access to the tensors of a directory of safetensors, single or sharded."""

    def __init__(self, model_dir: str | Path) -> None:
        self._dir = Path(model_dir)

    def expert_part(
        self, name: str, size: tuple[int, ...], index: tuple[slice, ...], *, num_experts: int
    ) -> torch.Tensor:
        """`part`, also where the experts of a layer are one tensor (`mopd.serving.hf_experts`)."""
        fused = in_fused(name, size, index, num_experts=num_experts)
        if fused is None or name in self._files or fused[0] not in self._files:
            return self.part(name, size, index)
        return self.part(*fused)

    def part(self, name: str, size: Sequence[int], index: tuple[int | slice, ...]) -> torch.Tensor:
        """`tensor[index]`, reading no more than that. Raises ArtifactError on another shape."""
        if name not in self._files:
            raise ArtifactError(
                f"{self._dir}: no tensor {name} in its *.safetensors; save the model again with "
                "save_pretrained"
            )
        with safe_open(self._files[name], framework="pt") as file:
            stored = file.get_slice(name)
            if tuple(stored.get_shape()) != tuple(size):
                raise ArtifactError(
                    f"{self._dir}: {name} has shape {tuple(stored.get_shape())} where config.json "
                    f"implies {tuple(size)}; config.json belongs to another model"
                )
            return stored[index]

    @cached_property
    def _files(self) -> dict[str, Path]:
        index = self._dir / "model.safetensors.index.json"
        if index.exists():
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {name: self._dir / file for name, file in weight_map.items()}
        single = self._dir / "model.safetensors"
        if not single.exists():
            raise ArtifactError(
                f"{self._dir}: neither model.safetensors nor model.safetensors.index.json; save "
                "the model in the safetensors format"
            )
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single)


def load_hf(
    chunks: Sequence[torch.nn.Module],
    model_dir: str | Path,
    *,
    shape: ModelShape,
    topology: Topology,
) -> None:
    """Fill this rank's parameters, reading only the rows and columns of its shards."""
    reader = HfReader(model_dir)
    parameters = {
        parameter_name(index, name): parameter
        for index, chunk in enumerate(chunks)
        for name, parameter in chunk.named_parameters()
    }
    for slot in _slots(shape, topology):
        if not is_here(slot, topology):
            continue
        parameter = parameters.pop(slot.parameter)
        local = _read_shard(slot, reader, shape=shape, topology=topology)
        with torch.no_grad():
            if slot.kind == "vocab":  # rows past the vocabulary belong to no token
                parameter.zero_()
                parameter[: local.shape[0]].copy_(local)
            else:
                assert parameter.shape == local.shape, slot.parameter
                parameter.copy_(local)
    assert not parameters, f"parameters that no file fills: {sorted(parameters)}"


def _read_shard(
    slot: Slot, reader: HfReader, *, shape: ModelShape, topology: Topology
) -> torch.Tensor:
    rank, ranks = topology.tp_rank, topology.tp_size
    parts = []
    for name, size in zip(slot.tensors, slot.sizes, strict=True):
        if slot.kind == "whole":
            index = tuple(slice(None) for _ in size)
        elif slot.kind == "columns":
            width = size[1] // ranks
            index = (slice(None), slice(rank * width, (rank + 1) * width))
        else:
            height = -(-size[0] // ranks)  # vocab pads up; the others divide
            start, stop = min(rank * height, size[0]), min((rank + 1) * height, size[0])
            index = (slice(start, stop), *(slice(None) for _ in size[1:]))
        experts = shape.moe.num_experts if shape.moe is not None else 0
        parts.append(reader.expert_part(name, size, index, num_experts=experts))
    if slot.kind == "qkv":
        groups = shape.num_query_groups // ranks
        return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def iter_hf_weights(model: ModelView) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Stream the model as Hugging Face tensors: `(name, full tensor)` on the lead, else None.

    Adapters are added to their weights. Collective over the replica: every rank runs it to the end.
    With expert parallelism the experts lie on several replicas, so all ranks of the job run it, at
    the same time; every replica's lead gets the whole model. One parameter is whole at a time.
    """
    topology, shape = model.topology, model.shape
    parameters = dict(model.named_parameters())
    for slot in _slots(shape, topology):
        if not slot.exported:
            continue
        shards = None
        if is_here(slot, topology):
            shards = gather_shards(parameters[slot.parameter].detach(), topology)
        for position, (name, size) in enumerate(zip(slot.tensors, slot.sizes, strict=True)):
            tensor = None
            if shards is not None:
                tensor = _assemble(slot, shards, position=position, size=size, shape=shape)
            if slot.stage == topology.pp_rank:
                tensor = model.merged(name, tensor)
            if slot.ep_rank is not None:
                tensor = _from_expert_rank(tensor, size, slot, model=model)
            yield name, to_lead(tensor, size, slot.stage, model=model)


def _slots(shape: ModelShape, topology: Topology) -> tuple[Slot, ...]:
    return build_slots(
        shape, pp_size=topology.pp_size, vp_size=topology.vp_size, ep_size=topology.ep_size
    )


def is_here(slot: Slot, topology: Topology) -> bool:
    """Whether this rank holds the slot's parameter, or its own shard of it."""
    return slot.stage == topology.pp_rank and slot.ep_rank in (None, topology.ep_rank)


def _from_expert_rank(
    tensor: torch.Tensor | None, size: tuple[int, ...], slot: Slot, *, model: ModelView
) -> torch.Tensor | None:
    """An expert's tensor on every rank of its stage that could be a replica's first."""
    topology = model.topology
    if topology.ep_group is None or slot.stage != topology.pp_rank or topology.tp_rank > 0:
        return tensor
    if tensor is None:
        tensor = torch.empty(size, dtype=model.dtype, device=topology.device)
    tensor = tensor.contiguous()
    dist.broadcast(tensor, group=topology.ep_group, group_src=slot.ep_rank)
    return tensor


def gather_shards(local: torch.Tensor, topology: Topology) -> list[torch.Tensor] | None:
    """All tensor-parallel shards on tensor-parallel rank 0, None on the others."""
    if topology.tp_group is None:
        return [local]
    is_target = topology.tp_rank == 0
    shards = [torch.empty_like(local) for _ in range(topology.tp_size)] if is_target else None
    dist.gather(local.contiguous(), shards, group=topology.tp_group, group_dst=0)
    return shards


def _assemble(
    slot: Slot,
    shards: list[torch.Tensor],
    *,
    position: int,
    size: tuple[int, ...],
    shape: ModelShape,
) -> torch.Tensor:
    """The full tensor at `position` of the slot, from all shards."""
    if slot.kind == "whole":
        return shards[0]
    if slot.kind == "columns":
        return torch.cat(shards, dim=1)
    if slot.kind in ("rows", "vocab"):
        return torch.cat(shards)[: size[0]]
    if slot.kind == "gate_up":
        return torch.cat([shard.chunk(2)[position] for shard in shards])
    heads_per_group = shape.num_attention_heads // shape.num_query_groups
    widths = [width * shape.head_dim for width in (heads_per_group, 1, 1)]
    groups = shape.num_query_groups // len(shards)
    return torch.cat(
        [shard.unflatten(0, (groups, -1)).split(widths, dim=1)[position] for shard in shards]
    ).flatten(0, 1)


def to_lead(
    tensor: torch.Tensor | None, size: tuple[int, ...], stage: int, *, model: ModelView
) -> torch.Tensor | None:
    """Hand a tensor of `stage` to the replica's lead, which is the stage's own rank for stage 0."""
    topology = model.topology
    if stage == 0:
        return tensor if topology.is_lead else None
    if topology.is_lead:
        received = torch.empty(size, dtype=model.dtype, device=topology.device)
        # The sender is the only rank of that stage with a tensor: its tensor-parallel rank 0.
        dist.recv(received, src=topology.stage_ranks[stage], group=topology.replica_group)
        return received
    if tensor is not None and topology.rank == topology.stage_ranks[stage]:
        dist.send(tensor.contiguous(), dst=topology.lead_rank, group=topology.replica_group)
    return None


def describe(model: ModelView) -> dict[str, Any]:
    """Names and shapes of the exported tensors, in export order."""
    slots = _slots(model.shape, model.topology)
    return {
        name: size
        for slot in slots
        if slot.exported
        for name, size in zip(slot.tensors, slot.sizes, strict=True)
    }
