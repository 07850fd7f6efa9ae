"""Shards that hold all of a support or nothing of it, and steps without rows (oracle 16)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mopd.config.schema import ParallelSection
from mopd.device import get_device
from mopd.losses.divergence import Divergence
from mopd.losses.vocab import VocabShard
from mopd.projection import ProjectionShard
from mopd.student.parallel import initialize
from tests.helpers.dist import run_ranks
from tests.helpers.losses import build_loss, make_projection, run_head
from tests.helpers.random_losses import V_S, V_T, Problem, problem

CASES = [
    ("kl", {"beta": 1.0}),
    ("kl", {"divergence": Divergence(kind="forward_kl", top_k_mode="renorm")}),
    ("ctkd", {"lambda_chunk": 0.7}),
    ("gold", {"beta": 0.4, "top_u": 3}),
]


def problem_of(name: str, rows: str) -> Problem:
    """``rows``: "none", or whatever the teacher lists lies in the "first" or the "last" shard."""
    case = problem(12, same_vocabulary=name == "kl")
    if rows == "none":
        found = {
            f: getattr(case.rows, f)[:0]
            for f in case.rows.__dataclass_fields__
            if f not in ("teacher", "path_offsets")
        }
        return replace(
            case, rows=replace(case.rows, path_offsets=np.zeros(1, dtype=np.int64), **found)
        )
    generator = np.random.default_rng(12)
    low = 0 if rows == "first" else 18  # four shards of six columns, the last one padded
    ids = np.stack([low + generator.permutation(5) for _ in case.rows.position])
    if name == "kl":
        return replace(case, rows=replace(case.rows, topk_ids=ids.astype(np.int32)))
    # five teacher tokens that only the five student tokens of that shard map to
    weights = np.zeros((V_S, V_T + 1))
    weights[:, V_T] = 1.0
    weights[low : low + 5] = np.eye(5, V_T + 1)
    common = np.full(V_T, -1)
    common[:3] = low + np.arange(3)
    projection = replace(make_projection(weights, common=common), trie=case.projection.trie)
    rows_of = replace(case.rows, topk_ids=(ids - low).astype(np.int32))
    return replace(case, rows=rows_of, projection=projection)


def result(name: str, options: dict, rows: str, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(value, gradient of this rank's columns) on ``size`` ranks; padded columns hold +50."""
    topology = initialize(
        ParallelSection(tensor_model_parallel_size=size), backend=get_device("cpu"), seed=1
    )
    case = problem_of(name, rows)
    width = -(-V_S // size)
    start = topology.tp_rank * width
    padded = torch.full((len(case.logits), width * size), 50.0, dtype=torch.float64)
    padded[:, :V_S] = case.logits
    projection = ProjectionShard(
        case.projection, start=start, end=start + width, device=topology.device
    )
    return run_head(
        build_loss(name, projection, **options),
        padded[:, start : start + width],
        case.rows,
        shard=VocabShard(start=start, size=width, vocab_size=V_S, group=topology.tp_group),
        projection=projection,
    )


@pytest.mark.dist
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("rows", ["none", "first", "last"])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_one_shard_or_none_has_the_support_16(name: str, options: dict, rows: str, size: int):
    (expected, gradient), *_ = run_ranks(result, 1, name, options, rows, 1)
    results = run_ranks(result, size, name, options, rows, size)
    joined = torch.cat([part for _, part in results], dim=1)
    assert not joined[:, V_S:].any()
    torch.testing.assert_close(joined[:, :V_S], gradient, rtol=1e-9, atol=1e-10)
    for value, _ in results:
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-10)
    assert (float(expected) == 0.0) == (rows == "none") == (not gradient.any())
