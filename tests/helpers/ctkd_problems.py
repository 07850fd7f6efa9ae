"""Payloads that ctkd knows besides per-row lists, and dense references of them in fp64.

W has weights in eighths, exact in float32, so that both sides agree to fp64's rounding.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mopd.config.schema import ParallelSection
from mopd.device import get_device
from mopd.losses.ctkd import CtkdLoss
from mopd.losses.vocab import VocabShard
from mopd.projection import ProjectionShard
from mopd.projection.learned import LearnedShard
from mopd.student.parallel import initialize
from mopd.types import Projection, TeacherRows
from tests.helpers.losses import divergence, divergence_of, make_projection, make_rows, run_head
from tests.helpers.random_losses import V_S, V_T

CPU = torch.device("cpu")
N = 10
CHUNKS = ((0,), (1, 2, 3), (4,), (5, 6), (8, 9))  # row 7 belongs to no chunk


@dataclasses.dataclass(frozen=True)
class CtkdProblem:
    """``logits`` [N, V_S] fp64; ``weights`` [V_S, V_T] is W without its null column."""

    logits: Tensor
    rows: TeacherRows
    projection: Projection
    weights: Tensor


def ctkd_problem(kind: str, seed: int = 0) -> CtkdProblem:
    """``kind``: lists | shared | whole (W's columns), native | native_only (the student's)."""
    generator = np.random.default_rng(seed)
    weights = np.zeros((V_S, V_T + 1))
    for s in range(V_S):
        for column in generator.choice(V_T + 1, size=8):
            weights[s, column] += 1.0 / 8.0
    width = {"lists": 5, "shared": 6, "whole": V_T, "native": 5, "native_only": 0}[kind]
    count = len(CHUNKS)
    ids = np.stack([generator.choice(V_T, size=width, replace=False) for _ in CHUNKS])
    probs = np.stack([generator.dirichlet(np.ones(width + 1))[:width] for _ in CHUNKS])
    if kind == "lists":
        ids[2, -1], probs[2, -1] = -1, 0.0
    sampled = generator.integers(V_S, size=N)
    rows = make_rows(
        [chunk[0] for chunk in CHUNKS],
        ids,
        probs,
        tokens=[(row, int(sampled[row]), c) for c, chunk in enumerate(CHUNKS) for row in chunk],
        chunk_logprob=(-generator.uniform(0.2, 3.0, count)).tolist(),
        chunk_size=[(len(chunk), 1) for chunk in CHUNKS],
    )
    rows = dataclasses.replace(rows, row_weight=generator.uniform(0.5, 2.0, count))
    if kind == "shared":
        rows = dataclasses.replace(rows, topk_ids=np.sort(ids[0]))
    if kind == "whole":
        constant = generator.normal(size=count)
        rows = dataclasses.replace(
            rows,
            topk_ids=None,
            topk_logprobs=rows.topk_logprobs + constant[:, None],
            log_tail=np.full(count, np.nan),  # not read
        )
    if kind.startswith("native"):
        rows = dataclasses.replace(rows, **_native(generator))
    logits = torch.as_tensor(generator.normal(size=(N, V_S)) * 2.0)
    return CtkdProblem(
        logits=logits,
        rows=rows,
        projection=make_projection(weights),
        weights=torch.as_tensor(weights[:, :V_T]),
    )


def _native(generator: np.random.Generator) -> dict[str, Any]:
    """Four rows, one of them also a boundary; the second is padded, the third has no tail."""
    ids = np.stack([generator.choice(V_S, size=4, replace=False) for _ in range(4)])
    probs = np.stack([generator.dirichlet(np.ones(5)) for _ in range(4)])
    ids[1, 2:], probs[1, 2:4] = -1, 0.0
    probs[2, :4] /= probs[2, :4].sum()
    probs[2, 4] = 0.0
    with np.errstate(divide="ignore"):
        return {
            "native_position": np.array([1, 2, 6, 7]),
            "native_weight": generator.uniform(0.5, 2.0, 4),
            "native_ids": ids.astype(np.int32),
            "native_logprobs": np.log(probs[:, :4]),
            "native_log_tail": np.log(probs[:, 4]),
        }


def ctkd_loss(projection: Any, **options: Any) -> CtkdLoss:
    temperature = options.get("temperature", 1.0)
    return CtkdLoss(
        projection=projection,
        divergence=divergence_of(options, 0.0),
        temperature=temperature,
        value_scale=temperature**2,
        lambda_chunk=options.get("lambda_chunk", 0.0),
        merge=options.get("merge", "boundary"),
    )


def whole(case: CtkdProblem, logits: Tensor, block_size: int = 512, **options: Any) -> Any:
    """(value, gradient) on one process."""
    projection = ProjectionShard(case.projection, start=0, end=V_S, device=CPU)
    return run_head(
        ctkd_loss(projection, **options),
        logits,
        case.rows,
        shard=VocabShard(start=0, size=V_S, vocab_size=V_S),
        projection=projection,
        block_size=block_size,
    )


def autograd(case: CtkdProblem, **options: Any) -> tuple[Tensor, Tensor]:
    """Value and gradient of `dense`."""
    leaf = case.logits.clone().requires_grad_()
    value = dense(leaf, case, **options)
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def dense(
    logits: Tensor,
    case: CtkdProblem,
    *,
    beta: float = 0.0,
    temperature: float = 1.0,
    merge: str = "boundary",
) -> Tensor:
    """Boundary and native rows by loops over dense matrices."""
    probs = torch.softmax(logits / temperature, dim=-1)
    rows, total = case.rows, logits.new_zeros(())
    for r in range(len(rows.position)):
        if not rows.topk_logprobs.shape[1]:
            continue
        listed, tail, ids = _teacher(rows, r, temperature)
        kept = torch.as_tensor(ids >= 0)
        columns = torch.as_tensor(ids[ids >= 0].astype(np.int64))
        row = merged(probs, rows, r, merge)
        value = _bins(row, case.weights[:, columns], listed[kept], tail, beta)
        total = total + float(rows.row_weight[r]) * value
    for o, at in enumerate(rows.native_position):
        ids = rows.native_ids[o]
        kept = torch.as_tensor(ids >= 0)
        columns = torch.as_tensor(ids[ids >= 0].astype(np.int64))
        listed = torch.exp(torch.as_tensor(rows.native_logprobs[o]))[kept]
        tail = torch.exp(torch.as_tensor(rows.native_log_tail[o]))
        identity = torch.eye(V_S, dtype=logits.dtype)[:, columns]
        value = _bins(probs[at], identity, listed, tail, beta)
        total = total + float(rows.native_weight[o]) * value
    return total * temperature**2


def merged(probs: Tensor, rows: TeacherRows, r: int, merge: str) -> Tensor:
    """The formulas of docs/losses.md, merges, for the chunk of boundary row r."""
    at = torch.as_tensor(rows.token_position[rows.token_chunk == r])
    tokens = torch.as_tensor(rows.token_id[rows.token_chunk == r])
    scalars = probs[at, tokens].clamp_min(1e-8)
    if merge == "observed":
        return probs[at[0]] * scalars[1:].prod()
    if merge == "bayesian":
        return probs[at[-1]] * scalars[:-1].prod()
    return probs[at[0]] if merge == "boundary" else probs[at].mean(dim=0)


def _teacher(rows: TeacherRows, r: int, temperature: float) -> tuple[Tensor, Tensor, np.ndarray]:
    logs = torch.as_tensor(rows.topk_logprobs[r])
    if rows.topk_ids is None:
        return torch.softmax(logs / temperature, 0), logs.new_zeros(()), np.arange(V_T)
    masses, tail = torch.exp(logs), torch.exp(torch.as_tensor(rows.log_tail[r]))
    return masses, tail, rows.topk_ids if rows.topk_ids.ndim == 1 else rows.topk_ids[r]


def _bins(row: Tensor, weights: Tensor, listed: Tensor, tail: Tensor, beta: float) -> Tensor:
    inside, rest = row @ weights, row @ (1.0 - weights.sum(dim=1))
    teacher = torch.cat([listed, tail[None]])
    return divergence(teacher, torch.cat([inside, rest[None]]), beta)


def shard_result(
    kind: str, size: int, options: dict[str, Any], learned: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(value, this rank's gradient columns, d(value)/d(log-weights) here); padding holds +50."""
    topology = initialize(
        ParallelSection(tensor_model_parallel_size=size), backend=get_device("cpu"), seed=1
    )
    case = ctkd_problem(kind, 11)
    width = -(-V_S // size)
    start = topology.tp_rank * width
    padded = torch.full((N, width * size), 50.0, dtype=case.logits.dtype)
    padded[:, :V_S] = case.logits
    projection: Any = ProjectionShard(
        case.projection, start=start, end=start + width, device=topology.device
    )
    if learned:
        projection = LearnedShard(
            case.projection, start=start, end=start + width, device=CPU, dtype=torch.float64
        )
    value, grad = run_head(
        ctkd_loss(projection, **options),
        padded[:, start : start + width],
        case.rows,
        shard=VocabShard(start=start, size=width, vocab_size=V_S, group=topology.tp_group),
        projection=projection,
        block_size=4,
    )
    slope = projection.log_gradient() if learned else grad.new_zeros(0)
    return value, grad, slope
