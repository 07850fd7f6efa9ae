"""Losses from hidden states, and from the rows of one context-parallel rank, as ranks run them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mopd.config.schema import ParallelSection
from mopd.device import get_device
from mopd.losses.head import DistillationHead, TeacherTerm
from mopd.losses.vocab import ProcessGroup, VocabShard
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
    context_group: ProcessGroup | None = None,
) -> DistillationHead:
    return DistillationHead(
        terms={"t": TeacherTerm(loss=loss, weight=1.0, projection=projection)},
        shard=shard,
        block_size=block_size,
        context_group=context_group,
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


def context_shard(
    parts: list[list[int]], options: dict[str, Any], joined: bool, fused: bool
) -> Result:
    """This rank's results for the rows ``parts[rank]`` of one micro-batch."""
    topology = initialize(ParallelSection(), backend=get_device("cpu"), seed=1)
    case = problem(11)
    hidden, weight = factors(len(case.logits), V_S)
    shard, projection = whole(case)
    head = head_of(
        build_loss("ctkd", projection, **options),
        shard=shard,
        projection=projection,
        context_group=topology.dp_group if joined else None,
    )
    mine = np.array(parts[topology.rank], dtype=np.int64)
    rows = rows_at(case.rows, mine)
    return run_factors(head, hidden[torch.from_numpy(mine)], weight, rows, fused=fused)


def rows_at(rows: TeacherRows, mine: np.ndarray) -> TeacherRows:
    """What ``rows`` say of the positions ``mine``, which become 0, 1, ...; all chunks are kept."""
    keep = np.isin(rows.position, mine)
    token, path = np.isin(rows.token_position, mine), np.isin(rows.path_position, mine)
    slots = np.diff(rows.path_offsets)
    slot = np.repeat(path, slots)
    entry = slot[rows.path_entry_slot]
    first = [rows.token_position[rows.token_chunk == c][0] for c in range(len(rows.chunk_size))]
    assert rows.topk_ids is not None
    return replace(
        rows,
        position=np.searchsorted(mine, rows.position[keep]),
        row_weight=rows.row_weight[keep],
        topk_ids=rows.topk_ids[keep],
        topk_logprobs=rows.topk_logprobs[keep],
        log_tail=rows.log_tail[keep],
        chunk_owned=np.isin(first, mine),
        token_position=np.searchsorted(mine, rows.token_position[token]),
        token_id=rows.token_id[token],
        token_chunk=rows.token_chunk[token],
        token_sampling_logprob=rows.token_sampling_logprob[token],
        path_position=np.searchsorted(mine, rows.path_position[path]),
        path_weight=rows.path_weight[path],
        path_offsets=np.concatenate([[0], np.cumsum(slots[path])]).astype(np.int64),
        path_target=rows.path_target[slot],
        path_entry_slot=(np.cumsum(slot) - 1)[rows.path_entry_slot[entry]],
        path_entry=rows.path_entry[entry],
    )
