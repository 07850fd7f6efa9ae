"""Losses from hidden states, and from the rows of one context-parallel rank, as ranks run them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mopd.align.share import share_micro_batch
from mopd.config.schema import ParallelSection
from mopd.device import get_device
from mopd.losses.head import DistillationHead, TeacherTerm
from mopd.losses.vocab import VocabShard
from mopd.projection import ProjectionShard
from mopd.student.parallel import initialize
from mopd.types import TeacherRows
from tests.helpers.losses import build_loss, step_of
from tests.helpers.random_losses import V_S, Problem, problem

WIDTH = 6
Result = tuple[Tensor, Tensor, Tensor]  # value, gradient of hidden, gradient of weight


def factors(count: int, vocab: int, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Random hidden states [count, WIDTH] and output weight [vocab, WIDTH]."""
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, WIDTH, generator=generator, dtype=torch.float64)
    return hidden.to(dtype), weight.to(dtype)


def head_of(
    loss: Any,
    *,
    shard: VocabShard,
    projection: ProjectionShard | None = None,
    block_size: int = 4,
) -> DistillationHead:
    return DistillationHead(
        terms={"t": TeacherTerm(loss=loss, weight=1.0, projection=projection)},
        shard=shard,
        block_size=block_size,
    )


def run_factors(
    head: DistillationHead,
    hidden: Tensor,
    weight: Tensor,
    rows: TeacherRows,
    *,
    fused: bool,
    upstream: float = 1.0,
    crossentropy_weight: float = 0.0,
) -> Result:
    """Through `from_hidden`, or through logits that torch multiplies and differentiates."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    micro, batch = step_of(rows, len(hidden))
    micro.response_mask[:, -1:] = False  # nothing follows the last token
    batch = replace(batch, crossentropy_weight=crossentropy_weight, num_response_tokens=3)
    if fused:
        output = head.from_hidden(hidden[None], weight, micro, batch)
    else:
        output = head((hidden @ weight.t())[None], micro, batch)
    (output.total * upstream).backward()
    assert hidden.grad is not None and weight.grad is not None
    return output.total.detach(), hidden.grad, weight.grad


def whole(case: Problem) -> tuple[VocabShard, ProjectionShard]:
    """The vocabulary and the projection of one process."""
    cpu = torch.device("cpu")
    return (
        VocabShard(start=0, size=V_S, vocab_size=V_S),
        ProjectionShard(case.projection, start=0, end=V_S, device=cpu),
    )


def fused_shard(name: str, size: int, options: dict[str, Any]) -> Result:
    """This rank's results on ``size`` tensor-parallel ranks; padded rows of the weight hold 50."""
    topology = initialize(
        ParallelSection(tensor_model_parallel_size=size), backend=get_device("cpu"), seed=1
    )
    case = problem(11, same_vocabulary=name == "kl")
    hidden, weight = factors(len(case.logits), V_S)
    width = -(-V_S // size)
    start = topology.tp_rank * width
    padded = torch.cat([weight, weight.new_full((width * size - V_S, WIDTH), 50.0)])
    projection = ProjectionShard(
        case.projection, start=start, end=start + width, device=topology.device
    )
    shard = VocabShard(start=start, size=width, vocab_size=V_S, group=topology.tp_group)
    head = head_of(build_loss(name, projection, **options), shard=shard, projection=projection)
    return run_factors(head, hidden, padded[start : start + width], case.rows, fused=True)


def shares(options: dict[str, Any], size: int, fused: bool) -> list[Result]:
    """Results of ranks that all see the hidden states and share the loss's rows."""
    case = problem(11)
    hidden, weight = factors(len(case.logits), V_S)
    shard, projection = whole(case)
    head = head_of(build_loss("ctkd", projection, **options), shard=shard, projection=projection)
    micro, _ = step_of(case.rows, len(hidden))
    parts = [share_micro_batch(micro, rank, size) for rank in range(size)]
    return [run_factors(head, hidden, weight, part.rows["t"], fused=fused) for part in parts]
