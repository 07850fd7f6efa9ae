"""Model and optimizer as parts of whole tensors, whatever layout holds them.

Megatron's `sharded_state_dict` says which part of which whole tensor a parameter is (layers and
experts have their global numbers, gate and up projections are taken apart). The
optimizer's tensors have their parameter's shape. The distributed optimizer holds a range of the
flattened parameter per replica, which is a handful of boxes of the whole tensor.

Names: `model.<key>`; `optimizer.<what>.<key>` with exp_avg, exp_avg_sq and, where the model is not
float32, the main weights as `param`. Rows that pad the vocabulary to the tensor-parallel size are
no part of the whole: they are zero, in the optimizer too, and stay so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from mopd.student.model import StudentModel
from mopd.student.optim import inner_optimizers

Described = ShardedTensor | ShardedTensorFactory

MODEL = "model."  # how names of weights begin
MAIN_WEIGHTS = "optimizer.param."  # and those of their float32 main weights, where there are any


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """This rank's box of a whole tensor. ``data`` is live memory: what is written to it counts."""

    key: str
    data: torch.Tensor  # as many axes as `whole`, one at least
    whole: tuple[int, ...]  # shape of the whole tensor
    offset: tuple[int, ...]
    is_main: bool  # of the ranks that hold it, the one that saves it


def describe(model: StudentModel, optimizer: MegatronOptimizer) -> list[Shard]:
    """Everything of this rank that training changes but the generators and companions.

    Creates the optimizer's state where no step has done so yet.
    """
    described = _describe_model(model)
    vocab = (model.padded_vocab_size, model.vocab_size)
    shards = _model_shards(described, vocab)
    by_parameter = {id(base.data): base for base in described}
    for held in _held_by(optimizer, model):
        base = by_parameter[id(held.parameter)]
        for what, tensor in held.tensors.items():
            prefix = f"optimizer.{what}."
            if held.span is None:
                parts = [(part, _shard(part, prefix)) for part in _parts(base, tensor)]
            else:
                parts = _flat_parts(base, tensor, held.span, prefix)
            shards += [found for part, shard in parts for found in _clipped(shard, part, vocab)]
    return shards


def describe_model(model: StudentModel) -> list[Shard]:
    """`describe` for a model without an optimizer."""
    return _model_shards(_describe_model(model), (model.padded_vocab_size, model.vocab_size))


def optimizer_step(optimizer: MegatronOptimizer) -> int:
    """Updates so far; 0 on a rank where nothing learns."""
    groups = [
        group for inner in inner_optimizers(optimizer) for group in inner.optimizer.param_groups
    ]
    # Fused Adams do not count in groups without parameters.
    return max((int(group.get("step", 0)) for group in groups), default=0)


def set_optimizer_step(optimizer: MegatronOptimizer, step: int) -> None:
    for inner in inner_optimizers(optimizer):
        for group in inner.optimizer.param_groups:
            group["step"] = step


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """What the optimizer keeps of one parameter on this rank."""

    parameter: torch.nn.Parameter
    tensors: dict[str, torch.Tensor]
    span: range | None  # of the flattened parameter; None: all of it, in its shape


def _describe_model(model: StudentModel) -> list[Described]:
    metadata = {"non_homogeneous_layers": True}  # a key per layer, not a stack of all layers
    found: list[Described] = []
    for chunk in model.chunks:
        for base in chunk.sharded_state_dict(metadata=dict(metadata)).values():
            if isinstance(base, ShardedObject):  # Transformer Engine's place for FP8 scales
                continue
            found.append(base)
    parts = {id(base.data): base for base in found}
    for name, parameter in model.named_parameters():
        base = parts.get(id(parameter))
        assert base is not None, f"{name}: no sharded_state_dict describes it"
        _check_split(name, parameter, base, model)
    return found


def _model_shards(described: list[Described], vocab: tuple[int, int]) -> list[Shard]:
    return [
        shard
        for base in described
        for part in _parts(base)
        for shard in _clipped(_shard(part, MODEL), part, vocab)
    ]


def _check_split(
    name: str, parameter: torch.nn.Parameter, base: Described, model: StudentModel
) -> None:
    """A layer that adds a split parameter must say so, or its parts would pass for copies."""
    is_split = getattr(parameter, "tensor_model_parallel", False)
    is_expert = ".experts." in base.key  # split over a group of their own, or not at all
    if model.topology.tp_size == 1 or not is_split or is_expert:
        return
    if isinstance(base, ShardedTensor):
        axis = base.prepend_axis_num + parameter.partition_dim  # type: ignore[attr-defined]
        is_whole = base.local_shape == base.global_shape[base.prepend_axis_num :]
        assert not is_whole, f"{name}: its sharded_state_dict leaves out the split of axis {axis}"


def _parts(base: Described, data: torch.Tensor | None = None) -> list[ShardedTensor]:
    """The whole tensors' parts in ``data``, of the shape of the parameter that it replaces."""
    if isinstance(base, ShardedTensorFactory):
        parts = (base if data is None else replace(base, data=data)).build()
        return list(parts.values() if isinstance(parts, dict) else parts)
    return [base if data is None else replace(base, data=data, dtype=data.dtype)]


def _shard(part: ShardedTensor, prefix: str) -> Shard:
    assert part.data is not None
    data, lead = part.data.detach(), part.prepend_axis_num
    whole, offset = tuple(part.global_shape)[lead:], tuple(part.global_offset)[lead:]
    if not whole:  # safetensors has no slices of a scalar
        data, whole, offset = data.view(1), (1,), (0,)
    return Shard(
        key=prefix + _key(part),
        data=data,
        whole=whole,
        offset=offset,
        is_main=is_main_replica(part.replica_id),
    )


def _key(part: ShardedTensor) -> str:
    """With the number of an expert, which Megatron puts on an axis in front: experts are tensors of
    their own, so that some may be frozen, and have no moments, while others learn."""
    numbers = tuple(part.global_offset)[: part.prepend_axis_num]
    return ".".join([part.key, *map(str, numbers)])


def _flat_parts(
    base: Described, flat: torch.Tensor, span: range, prefix: str
) -> Iterator[tuple[ShardedTensor, Shard]]:
    """Boxes of ``flat``, which is the range ``span`` of the flattened parameter."""
    assert base.data is not None
    # Without memory: a part's place in it is its place in the flattened parameter.
    outline = torch.empty(base.data.shape, device="meta")
    for part in _parts(base, outline):
        assert part.data is not None and part.data.is_contiguous(), part.key
        first = int(part.data.storage_offset())
        start, stop = max(span.start, first), min(span.stop, first + part.data.numel())
        for begin, place, shape in boxes(tuple(part.local_shape), start - first, stop - first):
            begin += first - span.start
            where = tuple(part.global_offset)[part.prepend_axis_num :]
            yield (
                part,
                Shard(
                    key=prefix + _key(part),
                    data=flat[begin : begin + math.prod(shape)].view(shape),
                    whole=tuple(part.global_shape)[part.prepend_axis_num :],
                    offset=tuple(a + b for a, b in zip(where, place, strict=True)),
                    # Each replica has a range of its own: the last number, its rank, is no copy's.
                    is_main=is_main_replica(_without_replica(part.replica_id)),
                ),
            )


def boxes(
    shape: tuple[int, ...], start: int, stop: int
) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """The elements start to stop of a flattened tensor as (first element, offset, shape) of boxes.

    A range of rows is one box; what it has of its first and of its last row is cut likewise.
    """
    if start >= stop:
        return
    if len(shape) == 1:
        yield start, (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # within one row
        yield from _boxes_of_row(shape, last, start, stop)
        return
    yield from _boxes_of_row(shape, first - 1, start, first * row)
    if first < last:
        rest = shape[1:]
        yield first * row, (first, *[0 for _ in rest]), (last - first, *rest)
    yield from _boxes_of_row(shape, last, last * row, stop)


def _boxes_of_row(
    shape: tuple[int, ...], row: int, start: int, stop: int
) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    base = row * math.prod(shape[1:])
    for begin, offset, size in boxes(shape[1:], start - base, stop - base):
        yield base + begin, (row, *offset), (1, *size)


def _without_replica(replica_id: int | tuple[int, ...]) -> tuple[int, ...]:
    assert isinstance(replica_id, tuple)
    return replica_id[:-1]


def _clipped(shard: Shard, part: ShardedTensor, vocab: tuple[int, int]) -> list[Shard]:
    """The shard without rows past the vocabulary; nothing where none are left."""
    padded, size = vocab
    if not part.allow_shape_mismatch or shard.whole[0] != padded:
        return [shard]
    rows = min(shard.data.shape[0], size - shard.offset[0])
    if rows <= 0:
        return []
    return [replace(shard, data=shard.data[:rows], whole=(size, *shard.whole[1:]))]


def _held_by(optimizer: MegatronOptimizer, model: StudentModel) -> Iterator[_Held]:
    for inner in inner_optimizers(optimizer):
        inner.init_state_fn(inner.optimizer, inner.config)
        if isinstance(inner, DistributedOptimizer):
            yield from _held_by_distributed(inner)
            continue
        trained = {id(p) for group in inner.optimizer.param_groups for p in group["params"]}
        for _, parameter in model.named_parameters():
            main = getattr(parameter, "main_param", parameter)
            if id(main) in trained:
                tensors = dict(inner.optimizer.state[main])
                if main is not parameter:
                    tensors["param"] = main
                yield _Held(parameter=parameter, tensors=tensors, span=None)


def _held_by_distributed(inner: DistributedOptimizer) -> Iterator[_Held]:
    groups = inner.optimizer.param_groups
    for parameter, (group, order) in inner.model_param_group_index_map.items():
        main = groups[group]["params"][order]
        buffer, dtype, bucket = inner.model_param_gbuf_map[parameter]
        ranges = inner.gbuf_ranges[buffer][dtype][bucket]["param_map"][parameter]
        tensors = dict(inner.optimizer.state[main])
        if parameter.dtype != torch.float32:
            tensors["param"] = main.detach()
        yield _Held(
            parameter=parameter,
            tensors=tensors,
            span=range(ranges["param"].start, ranges["param"].end),
        )
