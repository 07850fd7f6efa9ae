"""Whether a model can be split over the parallel axes of a recipe."""

from __future__ import annotations

from collections.abc import Iterator

from mopd.config.model_shape import ModelShape
from mopd.config.schema import ParallelSection


def check_layout(shape: ModelShape, parallel: ParallelSection, world_size: int) -> list[str]:
    """What keeps this model from running in this layout; an empty list when nothing does."""
    problems = [
        *_tensor(shape, parallel),
        *_pipeline(shape, parallel),
        *_experts(shape, parallel, world_size),
    ]
    size = _replica_size(parallel)
    if world_size % size:
        problems.append(
            f"tensor x pipeline x context parallel size ({size}) must divide the number of "
            f"processes ({world_size})"
        )
    return [f"student.parallel: {problem}" for problem in problems]


def _replica_size(parallel: ParallelSection) -> int:
    return (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
    )


def _tensor(shape: ModelShape, parallel: ParallelSection) -> Iterator[str]:
    tensor = parallel.tensor_model_parallel_size
    sizes = {
        "attention heads": shape.num_attention_heads,
        "query groups": shape.num_query_groups,
    }
    if len(shape.sparse_layers) < shape.num_layers:
        sizes["feed-forward size"] = shape.ffn_hidden_size
    if shape.moe is not None:
        sizes["experts' feed-forward size"] = shape.moe.ffn_hidden_size
    for what, size in sizes.items():
        if size % tensor:
            yield f"tensor_model_parallel_size={tensor} must divide the model's {what} ({size})"
    if parallel.sequence_parallel and tensor == 1:
        yield (
            "sequence_parallel=true splits over tensor-parallel ranks, and there is one; set "
            "sequence_parallel=false or tensor_model_parallel_size=2"
        )


def _pipeline(shape: ModelShape, parallel: ParallelSection) -> Iterator[str]:
    pipeline = parallel.pipeline_model_parallel_size
    virtual = parallel.virtual_pipeline_model_parallel_size or 1
    if virtual > 1 and pipeline == 1:
        yield (
            f"virtual_pipeline_model_parallel_size={virtual} interleaves the stages of a pipeline; "
            "set it to null or pipeline_model_parallel_size=2"
        )
    elif shape.num_layers % (pipeline * virtual):
        key = (
            f"pipeline_model_parallel_size={pipeline}"
            if virtual == 1
            else "pipeline_model_parallel_size x virtual_pipeline_model_parallel_size "
            f"({pipeline} x {virtual})"
        )
        yield f"{key} must divide the model's layers ({shape.num_layers})"


def _experts(shape: ModelShape, parallel: ParallelSection, world_size: int) -> Iterator[str]:
    expert = parallel.expert_model_parallel_size
    if shape.moe is None:
        if expert > 1:
            yield (
                f"expert_model_parallel_size={expert} needs a mixture of experts, which a "
                f"{shape.architecture} is not; use 1"
            )
        return
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        yield (
            "tensor_model_parallel_size > 1 with a mixture of experts needs "
            "sequence_parallel=true (Megatron's MoE layer demands it)"
        )
    if shape.moe.num_experts % expert:
        yield (
            f"expert_model_parallel_size={expert} must divide the model's experts "
            f"({shape.moe.num_experts})"
        )
    replicas = world_size // _replica_size(parallel)
    holders = replicas * parallel.context_parallel_size
    if replicas and holders % expert:
        yield (
            f"expert_model_parallel_size={expert} must divide data x context parallel size "
            f"({holders})"
        )
