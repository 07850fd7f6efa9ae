"""Megatron's schedule over micro-batches: one process, pipelines, interleaved pipelines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

from mopd.student.attention import PackedTexts
from mopd.student.layout import Layout, lay_out, packed_length
from mopd.student.model import StudentModel
from mopd.student.moe import padding_mask
from mopd.types import MicroBatch


def run_schedule(
    model: StudentModel,
    micro_batches: Sequence[MicroBatch],
    make_loss: Callable[[MicroBatch], Callable[..., Any]],
    *,
    forward_only: bool = False,
) -> list[Any]:
    """What the loss closures return, on ranks of the last stage; elsewhere an empty list.

    Whatever the parallel axes do to the micro-batches, a closure gets the output of the micro-batch
    as it was given, [B, L, ...], whole on every context-parallel rank.

    Args:
        make_loss: gives Megatron's loss function of a micro-batch, which gets the model's output
            (logits, or hidden states within `mopd.student.output.hidden_output`). With
            ``forward_only`` it is called with ``non_loss_data=True`` and may return anything.
    Raises:
        ValueError: no micro-batches.
    """
    if not micro_batches:
        raise ValueError("a step without micro-batches; give an idle replica an empty one")
    count = len(micro_batches)
    every, at_least = _agreed(model, micro_batches)
    layouts = [_lay_out(model, micro, at_least) for micro in every]

    def forward_step(
        iterator: Iterator[tuple[MicroBatch, Layout]], module: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable[..., Any]]:
        micro, layout = next(iterator)
        compute = make_loss(micro)

        def restored(output: torch.Tensor, **options: Any) -> Any:
            return compute(layout.restore(output), **options)

        return _forward(model, module, layout), restored

    chunks: list[torch.nn.Module] = list(model.ddp or model.chunks)
    rows, length = layouts[0].tokens.shape
    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        # each stage of an interleaved pipeline reads the micro-batches itself
        data_iterator=[iter(list(zip(every, layouts, strict=True))) for _ in chunks],
        model=chunks,
        num_microbatches=len(every),
        seq_length=length * model.topology.cp_size,
        micro_batch_size=rows,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
    return outputs[:count]


def _agreed(
    model: StudentModel, micro_batches: Sequence[MicroBatch]
) -> tuple[list[MicroBatch], tuple[int, int]]:
    """Micro-batches, with empty ones behind them, and the least shape of their rows.

    Stages of an interleaved pipeline take micro-batches of one shape, in groups of the pipeline's
    size. Ranks that share experts exchange tokens in every layer: they need the same number and
    shapes.
    """
    topology = model.topology
    count, at_least = len(micro_batches), (0, 0)
    if topology.vp_size > 1:
        count = -(-count // topology.pp_size) * topology.pp_size
    if topology.vp_size > 1 or topology.ep_group is not None:
        at_least = _largest(model, micro_batches)
    if topology.ep_group is not None:
        wanted = torch.tensor([count, *at_least], device=topology.device)
        dist.all_reduce(wanted, op=dist.ReduceOp.MAX, group=topology.ep_group)
        count, *shape = wanted.tolist()
        at_least = (shape[0], shape[1])
    return [*micro_batches, *[_idle(micro_batches[0])] * (count - len(micro_batches))], at_least


def _largest(model: StudentModel, micro_batches: Sequence[MicroBatch]) -> tuple[int, int]:
    """Rows and length that hold every micro-batch, before context ranks split them."""
    cp_size, multiple = model.topology.cp_size, _multiple(model)
    if cp_size > 1 or micro_batches[0].offsets is not None:
        return 1, max(packed_length(m, multiple=multiple, cp_size=cp_size) for m in micro_batches)
    return max(len(m.tokens) for m in micro_batches), max(m.tokens.shape[1] for m in micro_batches)


def _idle(like: MicroBatch) -> MicroBatch:
    """A micro-batch without a real token."""
    return MicroBatch(
        tokens=np.zeros_like(like.tokens),
        lengths=np.zeros_like(like.lengths),
        response_mask=np.zeros_like(like.response_mask),
        offsets=like.offsets,
    )


def _multiple(model: StudentModel) -> int:
    return model.topology.tp_size if model.config.sequence_parallel else 1


def _lay_out(model: StudentModel, micro: MicroBatch, at_least: tuple[int, int]) -> Layout:
    topology = model.topology
    return lay_out(
        micro,
        multiple=_multiple(model),
        context=(topology.cp_rank, topology.cp_size),
        at_least=at_least,
    )


def _forward(model: StudentModel, module: torch.nn.Module, layout: Layout) -> torch.Tensor:
    device = model.topology.device
    tokens = torch.tensor(layout.tokens, dtype=torch.int64, device=device)
    positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
    if model.head.post_process:
        kept = None if layout.kept is None else torch.tensor(layout.kept, device=device)
        model.head.output_layer.kept = kept  # type: ignore[assignment]
    return module(
        input_ids=tokens,
        position_ids=positions,  # for learned positions; rotary ones follow from the texts
        attention_mask=None,
        packed_seq_params=packed_texts(layout, device),
        padding_mask=padding_mask(model, module, layout),
    )


def calculates_per_token_loss(model: torch.nn.Module) -> bool:
    """Whether Megatron divides this model's gradient by the tokens of a step."""
    return bool(get_model_config(model).calculate_per_token_loss)


def packed_texts(layout: Layout, device: torch.device) -> PackedTexts | None:
    """Megatron's ``packed_seq_params``; None where texts have rows of their own."""
    if layout.offsets is None:
        return None
    offsets = torch.tensor(layout.offsets, dtype=torch.int32, device=device)
    longest = int(np.diff(layout.offsets).max())
    natural = None
    if layout.natural is not None:
        natural = torch.tensor(layout.natural, device=device)
    return PackedTexts(
        qkv_format="thd",
        cu_seqlens_q=offsets,
        cu_seqlens_kv=offsets,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        offsets=tuple(layout.offsets.tolist()),
        natural=natural,
    )
