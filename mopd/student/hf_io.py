"""Hugging Face directories in and out of Megatron's shards, one tensor at a time.

A `Slot` pairs one Megatron parameter with the Hugging Face tensors it is made of. V vocabulary,
H hidden, N query heads, G query groups, D head size, I feed-forward size.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from safetensors import safe_open

from mopd.config.model_shape import ModelShape
from mopd.errors import ArtifactError
from mopd.student.parallel import Topology

# rows: split along axis 0. columns: along axis 1. vocab: rows with padding at the end.
# qkv: query groups, each its queries, key, value. gate_up: every rank's gate rows, then up rows.
Kind = Literal["rows", "columns", "vocab", "whole", "qkv", "gate_up"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One Megatron parameter of one pipeline rank."""

    stage: int  # the pipeline rank
    parameter: str  # `parameter_name`
    tensors: tuple[str, ...]  # Hugging Face names
    sizes: tuple[tuple[int, ...], ...]  # their shapes
    kind: Kind
    exported: bool = True  # False for the last stage's copy of a tied embedding


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


def parameter_name(chunk: int, name: str) -> str:
    """Of a parameter in stage ``chunk`` of its pipeline rank: stages of one rank share names."""
    return f"{chunk}.{name}"


def build_slots(shape: ModelShape, *, pp_size: int, vp_size: int = 1) -> tuple[Slot, ...]:
    """All parameters of all stages, in the order in which weights are exported."""
    hidden = shape.hidden_size
    first, last = (0, 0), (pp_size - 1, vp_size - 1)
    vocab = (shape.vocab_size, hidden)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    slots = [_slot(first, "embedding.word_embeddings.weight", "vocab", {embedding: vocab})]
    per_stage = shape.num_layers // (pp_size * vp_size)
    for layer in range(shape.num_layers):
        stage, local = divmod(layer, per_stage)
        chunk, rank = divmod(stage, pp_size)
        slots += _layer_slots(shape, place=(rank, chunk), layer=layer, local=local)
    slots.append(
        _slot(last, "decoder.final_layernorm.weight", "whole", {"model.norm.weight": (hidden,)})
    )
    if not shape.tied:
        slots.append(_slot(last, "output_layer.weight", "vocab", {head: vocab}))
    elif last != first:
        slots.append(
            _slot(last, "output_layer.weight", "vocab", {embedding: vocab}, exported=False)
        )
    return tuple(slots)


def _slot(
    place: tuple[int, int],
    parameter: str,
    kind: Kind,
    tensors: dict[str, tuple[int, ...]],
    *,
    exported: bool = True,
) -> Slot:
    return Slot(
        stage=place[0],
        parameter=parameter_name(place[1], parameter),
        tensors=tuple(tensors),
        sizes=tuple(tensors.values()),
        kind=kind,
        exported=exported,
    )


def _layer_slots(
    shape: ModelShape, *, place: tuple[int, int], layer: int, local: int
) -> list[Slot]:
    theirs, ours = f"model.layers.{layer}.", f"decoder.layers.{local}."
    hidden, ffn, head = shape.hidden_size, shape.ffn_hidden_size, shape.head_dim
    heads, groups = shape.num_attention_heads * head, shape.num_query_groups * head
    rows = {"q": heads, "k": groups, "v": groups}
    attention, mlp = ours + "self_attention.", ours + "mlp."

    def make(parameter: str, kind: Kind, tensors: dict[str, tuple[int, ...]]) -> Slot:
        return _slot(place, parameter, kind, {theirs + n: size for n, size in tensors.items()})

    weights = {f"self_attn.{n}_proj.weight": (size, hidden) for n, size in rows.items()}
    biases = {f"self_attn.{n}_proj.bias": (size,) for n, size in rows.items()}
    both = {f"mlp.{n}_proj.weight": (ffn, hidden) for n in ("gate", "up")}
    slots = [
        make(
            attention + "linear_qkv.layer_norm_weight",
            "whole",
            {"input_layernorm.weight": (hidden,)},
        ),
        make(attention + "linear_qkv.weight", "qkv", weights),
    ]
    if shape.qkv_bias:
        slots.append(make(attention + "linear_qkv.bias", "qkv", biases))
    if shape.qk_norm:
        slots += [
            make(
                f"{attention}{n}_layernorm.weight", "whole", {f"self_attn.{n}_norm.weight": (head,)}
            )
            for n in ("q", "k")
        ]
    return [
        *slots,
        make(
            attention + "linear_proj.weight",
            "columns",
            {"self_attn.o_proj.weight": (hidden, heads)},
        ),
        make(
            mlp + "linear_fc1.layer_norm_weight",
            "whole",
            {"post_attention_layernorm.weight": (hidden,)},
        ),
        make(mlp + "linear_fc1.weight", "gate_up", both),
        make(mlp + "linear_fc2.weight", "columns", {"mlp.down_proj.weight": (hidden, ffn)}),
    ]


class HfReader:
    """Random access to the tensors of a directory of safetensors, single or sharded."""

    def __init__(self, model_dir: str | Path) -> None:
        self._dir = Path(model_dir)

    def part(self, name: str, size: Sequence[int], index: tuple[slice, ...]) -> torch.Tensor:
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
    for slot in build_slots(shape, pp_size=topology.pp_size, vp_size=topology.vp_size):
        if slot.stage != topology.pp_rank:
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
        parts.append(reader.part(name, size, index))
    if slot.kind == "qkv":
        groups = shape.num_query_groups // ranks
        return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def iter_hf_weights(model: ModelView) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Stream the model as Hugging Face tensors: `(name, full tensor)` on the lead, else None.

    Adapters are added to their weights. Collective over the replica: every rank runs it to the end.
    One parameter is whole at a time.
    """
    topology, shape = model.topology, model.shape
    parameters = dict(model.named_parameters())
    for slot in build_slots(shape, pp_size=topology.pp_size, vp_size=topology.vp_size):
        if not slot.exported:
            continue
        shards = None
        if slot.stage == topology.pp_rank:
            shards = gather_shards(parameters[slot.parameter].detach(), topology)
        for position, (name, size) in enumerate(zip(slot.tensors, slot.sizes, strict=True)):
            tensor = None
            if shards is not None:
                tensor = _assemble(slot, shards, position=position, size=size, shape=shape)
            if slot.stage == topology.pp_rank:
                tensor = model.merged(name, tensor)
            yield name, to_lead(tensor, size, slot.stage, model=model)


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
    topology = model.topology
    slots = build_slots(model.shape, pp_size=topology.pp_size, vp_size=topology.vp_size)
    return {
        name: size
        for slot in slots
        if slot.exported
        for name, size in zip(slot.tensors, slot.sizes, strict=True)
    }
