"""The output layer, which can hand out what the logits are the product of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
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
    With ``kept`` (context parallelism) the positions of all context ranks are gathered first, and
    ``kept`` lists the ones that go on: [positions, B, ...] on every rank.
    """

    hands_out_hidden = False
    kept: torch.Tensor | None = None
    cp_group: dist.ProcessGroup | None = None

    def forward(
        self,
        input_: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not self.hands_out_hidden and self.kept is None:
            return super().forward(input_, weight, runtime_gather_output)
        hidden = self._whole(input_)
        if self.kept is not None:
            hidden = gather_from_sequence_parallel_region(hidden, group=self.cp_group)
            hidden = hidden.index_select(0, self.kept)
        if self.hands_out_hidden:
            return hidden, None
        weight = self.weight if weight is None else weight
        assert weight is not None
        return hidden @ weight.t(), None

    def _whole(self, input_: torch.Tensor) -> torch.Tensor:
        """The input on every tensor-parallel rank, whose gradients are summed."""
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(input_, group=self.tp_group)
        hidden = copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        if hidden.requires_grad:
            # Megatron reduces a contiguous copy of what is not contiguous, and drops it; GPTModel
            # transposes behind this layer, so such a gradient is what comes back.
            hidden.register_hook(torch.Tensor.contiguous)
        return hidden


def install(gpt: GPTModel, cp_group: dist.ProcessGroup | None = None) -> None:
    """Make the last stage's output layer an `OutputLayer`: same object, same parameters."""
    if gpt.post_process:
        assert type(gpt.output_layer) is ColumnParallelLinear
        gpt.output_layer.__class__ = OutputLayer
        gpt.output_layer.cp_group = cp_group  # pyright: ignore[reportArgumentType]


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
