"""The output layer, which can hand out what the logits are the product of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)


class OutputLayer(ColumnParallelLinear):
    """Megatron's column-parallel layer with the same parameters under the same names.

    While ``hands_out_hidden``, its result is its input [L, B, H], whole on every tensor-parallel
    rank; in backward the ranks' parts of the gradient are summed, as the layer itself would do.
    """

    hands_out_hidden = False

    def forward(
        self,
        input_: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not self.hands_out_hidden:
            return super().forward(input_, weight, runtime_gather_output)
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(input_, group=self.tp_group), None
        hidden = copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        if hidden.requires_grad:
            # Megatron reduces a contiguous copy of what is not contiguous, and drops it; GPTModel
            # transposes behind this layer, so such a gradient is what comes back.
            hidden.register_hook(torch.Tensor.contiguous)
        return hidden, None


def install(gpt: GPTModel) -> None:
    """Make the last stage's output layer an `OutputLayer`: same object, same parameters."""
    if gpt.post_process:
        assert type(gpt.output_layer) is ColumnParallelLinear
        gpt.output_layer.__class__ = OutputLayer


@contextmanager
def hidden_output(gpt: GPTModel) -> Iterator[None]:
    """Within it the last stage returns hidden states [B, L, H]; other stages are as ever."""
    if not gpt.post_process:
        yield
        return
    layer = gpt.output_layer
    assert isinstance(layer, OutputLayer)
    layer.hands_out_hidden = True
    try:
        yield
    finally:
        layer.hands_out_hidden = False


def output_weight(gpt: GPTModel) -> torch.nn.Parameter:
    """The last stage's output weight [V_local, H]: the embedding's own where both are one."""
    if gpt.output_layer.weight is not None:
        return gpt.output_layer.weight
    return gpt.embedding.word_embeddings.weight
