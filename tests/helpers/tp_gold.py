"""What every rank of a tensor-parallel GOLD test runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mopd.config.schema import ParallelSection
from mopd.device import get_device
from mopd.losses.vocab import VocabShard
from mopd.projection import ProjectionShard
from mopd.student.parallel import initialize
from mopd.types import TeacherRows
from tests.helpers.gold_reference import GoldProblem, gold_loss, gold_problem
from tests.helpers.losses import run_head


def tied_problem(sizes: tuple[int, int], common: int, *, ties: bool) -> GoldProblem:
    """``ties``: most probabilities occur several times, also over the borders of shards."""
    case = gold_problem(sizes, common, seed=21)
    if ties:
        case.logits.round_()
        np.round(case.teacher, out=case.teacher)
    return case


def payload(case: GoldProblem, form: str) -> TeacherRows:
    return case.dense() if form == "dense" else case.listed(5)


def gold_shard_results(
    size: int, sizes: tuple[int, int], common: int, options: list[dict[str, Any]]
) -> list[tuple[Tensor, Tensor]]:
    """(value, this rank's gradient columns) for each of ``options``; padded columns hold +50."""
    topology = initialize(
        ParallelSection(tensor_model_parallel_size=size), backend=get_device("cpu"), seed=1
    )
    width = -(-sizes[0] // size)
    start = topology.tp_rank * width
    shard = VocabShard(start=start, size=width, vocab_size=sizes[0], group=topology.tp_group)
    found = []
    for option in options:
        case = tied_problem(sizes, common, ties=option["ties"])
        padded = torch.full((len(case.logits), width * size), 50.0, dtype=case.logits.dtype)
        padded[:, : sizes[0]] = case.logits
        local = ProjectionShard(
            case.projection, start=start, end=start + width, device=topology.device
        )
        found.append(
            run_head(
                gold_loss(local, option),
                padded[:, start : start + width].to(option.get("dtype", torch.float64)),
                payload(case, option["form"]),
                shard=shard,
                projection=local,
                block_size=2,
            )
        )
    return found
