"""Megatron's schedule over micro-batches: one process, pipelines, interleaved pipelines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from mopd.student.model import StudentModel
from mopd.types import MicroBatch


def run_schedule(
    model: StudentModel,
    micro_batches: Sequence[MicroBatch],
    make_loss: Callable[[MicroBatch], Callable[..., Any]],
    *,
    forward_only: bool = False,
) -> list[Any]:
    """What the loss closures return, on ranks of the last stage; elsewhere an empty list.

    Args:
        make_loss: gives Megatron's loss function of a micro-batch, which gets the model's output
            (logits, or hidden states within `mopd.student.output.hidden_output`). With
            ``forward_only`` it is called with ``non_loss_data=True`` and may return anything.
    Raises:
        ValueError: no micro-batches.
    """
    if not micro_batches:
        raise ValueError("a step without micro-batches; give an idle replica an empty one")
    rows, length = micro_batches[0].tokens.shape

    def forward_step(
        iterator: Iterator[MicroBatch], module: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable[..., Any]]:
        micro_batch = next(iterator)
        return _forward(model, module, micro_batch), make_loss(micro_batch)

    chunks: list[torch.nn.Module] = list(model.ddp)
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        # each stage of an interleaved pipeline reads the micro-batches itself
        data_iterator=[iter(micro_batches) for _ in chunks],
        model=chunks,
        num_microbatches=len(micro_batches),
        seq_length=length,
        micro_batch_size=rows,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


def _forward(model: StudentModel, module: torch.nn.Module, micro_batch: MicroBatch) -> torch.Tensor:
    device = model.topology.device
    tokens = torch.tensor(micro_batch.tokens, dtype=torch.int64, device=device)
    positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
    return module(input_ids=tokens, position_ids=positions, attention_mask=None)
