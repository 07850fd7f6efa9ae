"""Low-rank adapters (LoRA, 2106.09685) inside Megatron's parallel linear layers.

A linear layer W [O, I] of Hugging Face becomes W + alpha / rank * B A with A [R, I] and B [O, R];
only A and B learn. Megatron's fused layers hold several such layers, and each has an A and a B of
its own, as in PEFT. S sequence, b batch, R rank; `_local` is the part of this tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import nn

from mopd.config.schema import LoraSection
from mopd.errors import ConfigError
from mopd.student.hf_io import Slot, gather_shards
from mopd.student.parallel import Topology
from mopd.student.spec import NormColumnParallelLinear

ParallelLinear = ColumnParallelLinear | RowParallelLinear
# Layers whose rows are sharded; those of kind `columns` are sharded along their input.
_ROW_SHARDED = ("qkv", "gate_up", "rows")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One Hugging Face linear layer that gets an adapter, on whichever stage it lives."""

    slot: Slot  # the Megatron weight it is a part of
    name: str  # of its weight, `model.layers.0.self_attn.q_proj.weight`
    size: tuple[int, int]  # [O, I]

    @property
    def module(self) -> str:
        """`q_proj`."""
        return self.name.split(".")[-2]


@dataclass(slots=True, kw_only=True)
class Adapters:
    """All adapters of one pipeline rank. While not ``enabled`` the model is its base."""

    section: LoraSection
    targets: tuple[Target, ...]  # of every stage, in the order in which weights are exported
    pairs: dict[str, LowRank] = field(default_factory=dict)  # of this rank, by `Target.name`
    enabled: bool = True

    @property
    def rank(self) -> int:
        assert self.section.rank is not None
        return self.section.rank

    @property
    def scale(self) -> float:
        return self.section.alpha / self.rank


class Adapted(Protocol):
    """`mopd.student.model.StudentModel`."""

    @property
    def adapters(self) -> Adapters | None: ...


@contextmanager
def adapter_off(model: Adapted) -> Iterator[None]:
    """Within it ``model`` computes, and exports, what its base does; without gradients.

    Without them nothing from within is computed again in a backward pass outside, where the
    adapters are on. Raises ValueError for a model without adapters.
    """
    adapters = model.adapters
    if adapters is None:
        raise ValueError("the model has no adapters; set student.lora.rank")
    before, adapters.enabled = adapters.enabled, False
    try:
        with torch.no_grad():
            yield
    finally:
        adapters.enabled = before


def find_targets(section: LoraSection, slots: Sequence[Slot]) -> tuple[Target, ...]:
    """The linear layers that ``target_modules`` names."""
    return tuple(
        target
        for slot in slots
        for name, size in zip(slot.tensors, slot.sizes, strict=True)
        if name.endswith(".weight") and len(size) == 2
        if (target := Target(slot=slot, name=name, size=size)).module in section.target_modules
    )


def install(
    chunks: Sequence[nn.Module], adapters: Adapters, *, num_query_groups: int, topology: Topology
) -> None:
    """Freeze ``chunks`` and give their layers adapters whose values are not set yet.

    Raises ConfigError for a target that is an expert of a mixture.
    """
    for chunk in chunks:
        chunk.requires_grad_(False)
    by_layer: dict[str, list[Target]] = {}
    for target in adapters.targets:
        if target.slot.stage == topology.pp_rank:
            by_layer.setdefault(target.slot.parameter, []).append(target)
    for parameter, targets in by_layer.items():
        index, _, path = parameter.removesuffix(".weight").partition(".")
        layer = chunks[int(index)].get_submodule(path)
        if type(layer) not in _ADAPTED or layer.is_expert:
            raise ConfigError(
                f"student.lora.target_modules: {targets[0].name} is not a dense linear layer; name "
                "q_proj, k_proj, v_proj and o_proj only"
            )
        assert isinstance(layer, ParallelLinear)
        groups = num_query_groups // topology.tp_size if targets[0].slot.kind == "qkv" else 1
        layer.__class__ = _ADAPTED[type(layer)]  # the same parameters under the same names
        layer.adapter = Adapter(layer, adapters, targets, groups=groups)


class LowRank(nn.Module):
    """This rank's shards of one layer's A and B.

    A row-sharded layer has a whole A and a shard of B; a layer sharded along its input a shard of A
    and a whole B.
    """

    def __init__(self, target: Target, *, rank: int, layer: ParallelLinear) -> None:
        super().__init__()
        assert isinstance(layer.tp_group, dist.ProcessGroup) and layer.weight is not None
        ranks = layer.tp_group.size()
        self.target = target
        self.by_rows = target.slot.kind in _ROW_SHARDED
        rows, columns = target.size
        rows, columns = (rows // ranks, columns) if self.by_rows else (rows, columns // ranks)
        like = layer.weight
        self.lora_A = nn.Parameter(like.new_empty((rank, columns)))
        self.lora_B = nn.Parameter(like.new_zeros((rows, rank)))
        shard, whole = (self.lora_B, self.lora_A) if self.by_rows else (self.lora_A, self.lora_B)
        set_tensor_model_parallel_attributes(shard, True, self.axis, 1)
        # Under sequence parallelism the whole one meets a part of the sequence on each rank;
        # Megatron sums the gradients of parameters that carry this mark.
        whole.sequence_parallel = layer.config.sequence_parallel  # type: ignore[attr-defined]

    @property
    def axis(self) -> int:
        """Along which the one that is sharded is."""
        return 0 if self.by_rows else 1

    @torch.no_grad()
    def fill(self, a: torch.Tensor, b: torch.Tensor, topology: Topology) -> None:
        """Take this rank's part of the whole A [R, I] and B [O, R]."""
        rank, ranks = topology.tp_rank, topology.tp_size
        self.lora_A.copy_(a if self.by_rows else a.chunk(ranks, 1)[rank])
        self.lora_B.copy_(b.chunk(ranks)[rank] if self.by_rows else b)

    def gather(self, topology: Topology) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The whole A [R, I] and B [O, R] on tensor-parallel rank 0, None on the others."""
        a, b = self.lora_A.detach(), self.lora_B.detach()
        shards = gather_shards(b if self.by_rows else a, topology)
        if shards is None:
            return None
        joined = torch.cat(shards, dim=self.axis)
        return (a, joined) if self.by_rows else (joined, b)

    def merge(
        self, weight: torch.Tensor | None, *, scale: float, topology: Topology
    ) -> torch.Tensor | None:
        """``weight`` [O, I] + scale * B A, added in float32; None where ``weight`` is None."""
        whole = self.gather(topology)
        if whole is None or weight is None:
            return weight
        a, b = (part.float() for part in whole)
        return torch.addmm(weight.float(), b, a, alpha=scale).to(weight.dtype)


class Adapter(nn.Module):
    """What the adapters of one Megatron layer add to its output."""

    def __init__(
        self, layer: ParallelLinear, adapters: Adapters, targets: Sequence[Target], *, groups: int
    ) -> None:
        super().__init__()
        assert isinstance(layer.tp_group, dist.ProcessGroup)
        ranks, slot = layer.tp_group.size(), targets[0].slot
        # [O_local] of every part of the layer, also of those without an adapter
        modules = [name.split(".")[-2] for name in slot.tensors]
        heights = [size[0] // ranks for size in slot.sizes]
        self._heights = dict(zip(modules, heights, strict=True))
        self._groups = groups
        self._adapters = adapters
        self._group = layer.tp_group
        self._sequence_parallel = layer.config.sequence_parallel
        for target in targets:
            pair = LowRank(target, rank=adapters.rank, layer=layer)
            self.add_module(target.module, pair)
            adapters.pairs[target.name] = pair

    @property
    def enabled(self) -> bool:
        return self._adapters.enabled

    @property
    def pairs(self) -> dict[str, LowRank]:
        return {name: pair for name, pair in self.named_children() if isinstance(pair, LowRank)}

    def of_rows(self, input_: torch.Tensor) -> torch.Tensor:
        """[S, b, O_local] of a row-sharded layer, from [S, b, I], or [S / tp, b, I] of a sequence.

        A is whole on every rank and B is not, so the gradient between the two is a sum of ranks.
        """
        pairs = self.pairs
        low = F.linear(input_, torch.cat([pair.lora_A for pair in pairs.values()]))
        if self._sequence_parallel:
            low = gather_from_sequence_parallel_region(low, group=self._group)
        else:
            low = copy_to_tensor_model_parallel_region(low, group=self._group)
        cut = (self._adapters.scale * low).split(self._adapters.rank, dim=-1)
        found = {
            name: F.linear(part, pair.lora_B)
            for (name, pair), part in zip(pairs.items(), cut, strict=True)
        }
        return self._arrange(found)

    def of_columns(self, input_: torch.Tensor) -> torch.Tensor:
        """[S, b, O], or [S / tp, b, O] of a sequence, from [S, b, I_local].

        What A gives is summed over ranks, then B is the same everywhere.
        """
        (pair,) = self.pairs.values()
        low = F.linear(input_, pair.lora_A)
        if self._sequence_parallel:
            low = reduce_scatter_to_sequence_parallel_region(low, group=self._group)
        else:
            low = reduce_from_tensor_model_parallel_region(low, group=self._group)
        return F.linear(self._adapters.scale * low, pair.lora_B)

    def _arrange(self, found: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Rows in the order of the fused layer: by query group, and in it query, key, value."""
        like = next(iter(found.values()))
        parts = [
            found[name] if name in found else like.new_zeros((*like.shape[:-1], height))
            for name, height in self._heights.items()
        ]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([p.unflatten(-1, (self._groups, -1)) for p in parts], dim=-1).flatten(-2)

    def sharded_axes(self) -> dict[str, int]:
        """Of the parameters that are sharded over tensor-parallel ranks."""
        return {
            f"{name}.{'lora_B' if pair.by_rows else 'lora_A'}": pair.axis
            for name, pair in self.pairs.items()
        }


class LoraColumnParallelLinear(ColumnParallelLinear):
    """Megatron's row-sharded layer with an `adapter` on its input."""

    adapter: Adapter

    def forward(
        self, input_: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, bias = super().forward(input_, *args, **kwargs)
        return output + self.adapter.of_rows(input_) if self.adapter.enabled else output, bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """The layer's own, and its adapter's."""
        own = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return own | _sharded(self, prefix, sharded_offsets, metadata)


class LoraNormColumnParallelLinear(NormColumnParallelLinear, LoraColumnParallelLinear):
    """The same behind a norm: the adapter's input is what the norm gives, as in PEFT."""


class LoraRowParallelLinear(RowParallelLinear):
    """Megatron's layer sharded along its input, with an `adapter`."""

    adapter: Adapter

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, bias = super().forward(input_)
        return output + self.adapter.of_columns(input_) if self.adapter.enabled else output, bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """The layer's own, and its adapter's."""
        own = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return own | _sharded(self, prefix, sharded_offsets, metadata)


_ADAPTED: dict[type, type] = {
    ColumnParallelLinear: LoraColumnParallelLinear,
    NormColumnParallelLinear: LoraNormColumnParallelLinear,
    RowParallelLinear: LoraRowParallelLinear,
}


def _sharded(layer: Any, prefix: str, offsets: Any, metadata: Any) -> dict[str, Any]:
    """Megatron's description of an adapter: sharded along its axes, the rest replicated."""
    return make_sharded_tensors_for_checkpoint(
        layer.adapter.state_dict(prefix="", keep_vars=True),
        f"{prefix}adapter.",
        layer.adapter.sharded_axes(),
        offsets,
        tp_group=layer.tp_group,
        dp_cp_group=metadata["dp_cp_group"],
    )
