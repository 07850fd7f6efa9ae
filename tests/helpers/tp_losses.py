"""What every rank of a tensor-parallel loss test runs."""

from __future__ import annotations

from typing import Any

import torch

from mopd.config.schema import ParallelSection
from mopd.device import get_device
from mopd.losses.vocab import VocabShard
from mopd.projection import ProjectionShard
from mopd.student.parallel import initialize
from tests.helpers.losses import build_loss, run_head
from tests.helpers.random_losses import V_S, problem, whole_rows


def shard_result(name: str, size: int, options: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """(value, this rank's gradient columns) on ``size`` ranks; padded columns hold +50."""
    topology = initialize(
        ParallelSection(tensor_model_parallel_size=size), backend=get_device("cpu"), seed=1
    )
    options = dict(options)
    whole = options.pop("whole_rows", False)
    case = whole_rows(11) if whole else problem(11, same_vocabulary=name == "kl")
    width = -(-V_S // size)
    start = topology.tp_rank * width
    padded = torch.full((len(case.logits), width * size), 50.0, dtype=case.logits.dtype)
    padded[:, :V_S] = case.logits
    projection = ProjectionShard(
        case.projection, start=start, end=start + width, device=topology.device
    )
    shard = VocabShard(start=start, size=width, vocab_size=V_S, group=topology.tp_group)
    rows = case.rows
    return run_head(
        build_loss(name, projection, **options),
        padded[:, start : start + width],
        rows,
        shard=shard,
        projection=projection,
        block_size=4,
    )
