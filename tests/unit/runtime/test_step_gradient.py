"""One step's gradient does not depend on how its answers are dealt (losses.md, oracles 17, 51)."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mopd.align.batch import Batching, Sample
from mopd.losses.head import DistillationHead, TeacherTerm
from mopd.losses.vocab import VocabShard
from mopd.projection import ProjectionShard
from mopd.runtime.collate import Objective, collate
from mopd.runtime.weights import Normalizer
from mopd.types import Prompt, Rollout, StepBatch, TeacherRows
from tests.helpers.losses import build_loss, make_rows
from tests.helpers.random_losses import V_S, V_T, problem
from tests.helpers.token_losses import build_opd

WEIGHTS = {"a": 0.3, "b": 0.7}
K, WIDTH = 4, 6
Result = tuple[Tensor, Tensor, Tensor]  # loss, gradients of the two matrices


def rows_of(name: str, sizes: list[int], tokens: np.ndarray, seed: int) -> TeacherRows:
    """A chunk for each of ``sizes``, a path on the first one."""
    generator = np.random.default_rng(seed)
    starts, count = np.cumsum([0, *sizes[:-1]]).tolist(), len(sizes)
    chunk = np.repeat(np.arange(count), sizes).tolist()
    ids = np.stack([generator.choice(V_T, size=K, replace=False) for _ in sizes])
    rows = make_rows(
        starts,
        ids,
        generator.dirichlet(np.ones(K + 1), size=count)[:, :K],
        paths=[(0, [0, 1, 2, -2], generator.dirichlet(np.ones(4)).tolist(), 0.8)],
        tokens=[(p, int(t), c) for p, (t, c) in enumerate(zip(tokens, chunk, strict=False))],
        chunk_logprob=(-3.0 * generator.random(count)).tolist(),
        chunk_size=[(size, 2) for size in sizes],
    )
    sampled = -2.0 * generator.random(len(chunk))
    return replace(rows, teacher=name, token_sampling_logprob=sampled)


def nothing(name: str) -> TeacherRows:
    rows = make_rows([], np.zeros((0, K)), np.zeros((0, K)))
    sizes = np.zeros((0, 2), dtype=np.int32)
    return replace(rows, teacher=name, position=rows.position.astype(np.int64), chunk_size=sizes)


def sample(seed: int) -> Sample:
    """Prompts of 1 to 5 tokens, 1 to 5 chunks; some answers have one teacher, some a failed one."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, 4, size=1 + seed % 5).tolist()
    tokens = generator.integers(0, V_S, size=sum(sizes) + seed % 2)  # a token that nobody judges
    size, domain = len(tokens), "xy"[seed % 2]
    rows = {name: rows_of(name, sizes, tokens, 10 * seed + n) for n, name in enumerate(WEIGHTS)}
    if seed % 4 == 1:
        del rows["a"]
    elif seed % 4 == 2:
        rows["b"] = nothing("b")
    rollout = Rollout(
        prompt=Prompt(id=str(seed), messages=(), domain=domain),
        sample_index=0,
        prompt_ids=generator.integers(0, V_S, size=1 + seed % 5).astype(np.int32),
        token_ids=tokens.astype(np.int32),
        loss_mask=np.ones(size, dtype=bool),
        logprobs=np.zeros(size, dtype=np.float32),
        byte_ends=np.arange(1, size + 1),
        response=b"x" * size,
        policy_version=0,
        finish_reason="stop",
    )
    return Sample(rollout=rollout, rows=rows)


SAMPLES = [sample(seed) for seed in range(8)]


def head(kind: str) -> DistillationHead:
    projection = ProjectionShard(problem().projection, start=0, end=V_S, device=torch.device("cpu"))
    options: dict[str, Any] = {"lambda_chunk": 0.6}
    loss = {
        "ctkd": lambda: build_loss("ctkd", projection, **options),
        "gold": lambda: build_loss("gold", projection, **options),
        "opd": lambda: build_opd(importance="sequence_mask", bounds=(0.1, 0.3), discount=0.7),
    }[kind]()
    terms = {
        name: TeacherTerm(loss=loss, weight=weight, projection=projection)
        for name, weight in WEIGHTS.items()
    }
    return DistillationHead(terms=terms, shard=VocabShard(start=0, size=V_S, vocab_size=V_S))


def batches(
    parts: list[list[Sample]], micro_batch_size: int, normalization: Any
) -> list[StepBatch]:
    """Every replica's share; the sums over replicas are those of all ``parts``."""
    objective = Objective(
        weights=WEIGHTS,
        normalizer=Normalizer(
            teachers=tuple(WEIGHTS), domains=("x", "y"), normalization=normalization, by_domain=True
        ),
    )
    local: list[np.ndarray] = []

    def share(samples: list[Sample], total: np.ndarray | None) -> StepBatch:
        def add(values: np.ndarray) -> np.ndarray:
            local.append(values)
            return values if total is None else total

        batch, _ = collate(
            0,
            samples,
            scores=[{} for _ in samples],
            masked=(0.0, 1.0),
            objective=objective,
            batching=Batching(size=micro_batch_size),
            pad_id=0,
            sum_over_replicas=add,
        )
        return batch

    for part in parts:
        share(part, None)
    total = np.sum(local, axis=0)
    return [share(part, total) for part in parts]


def step(
    kind: str, parts: list[list[Sample]], micro_batch_size: int, normalization: str = "chunk"
) -> Result:
    """Of a small causal model: row i is a matrix times the sum of its tokens so far."""
    generator = torch.Generator().manual_seed(0)
    embed = torch.randn(V_S, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
    out = 0.1 * torch.randn(WIDTH, V_S, generator=generator, dtype=torch.float64)
    out = out.requires_grad_()
    loss = torch.zeros((), dtype=torch.float64)
    driver = head(kind)
    for batch in batches(parts, micro_batch_size, normalization):
        for micro in batch.micro_batches:
            hidden = torch.cumsum(embed[torch.as_tensor(micro.tokens)], dim=1)
            loss = loss + driver(hidden @ out, micro, batch).total / batch.num_tokens
    of_embed, of_out = torch.autograd.grad(loss, [embed, out])
    return loss.detach(), of_embed, of_out


@cache
def whole(kind: str, normalization: str) -> Result:
    return step(kind, [SAMPLES], 8, normalization)


def check(found: Result, kind: str, normalization: str) -> None:
    expected = whole(kind, normalization)
    assert all(x.abs().max() > 1e-3 for x in expected)
    for a, b in zip(found, expected, strict=True):  # weights of rows are float32
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("normalization", ["chunk", "token", "sequence"])
@pytest.mark.parametrize("kind", ["ctkd", "gold", "opd"])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 4])
def test_micro_batches_17(kind: str, normalization: str, micro_batch_size: int) -> None:
    check(step(kind, [SAMPLES], micro_batch_size, normalization), kind, normalization)


@pytest.mark.parametrize("normalization", ["chunk", "token", "sequence"])
@pytest.mark.parametrize("kind", ["ctkd", "gold", "opd"])
@pytest.mark.parametrize("cut", [1, 4, 6])
def test_replicas_of_unequal_lengths_17(kind: str, normalization: str, cut: int) -> None:
    found = step(kind, [SAMPLES[:cut], SAMPLES[cut:]], 2, normalization)
    check(found, kind, normalization)


@pytest.mark.parametrize("kind", ["ctkd", "gold", "opd"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_order_of_answers_51(kind: str, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(SAMPLES))
    found = step(kind, [[SAMPLES[i] for i in order]], 3, "chunk")
    check(found, kind, "chunk")


def test_a_failed_teacher_leaves_its_share_to_the_other_51() -> None:
    """Alone on an answer that both should judge, a teacher counts with the weight of both."""
    both = [sample(0), sample(4)]
    failed = [replace(s, rows={"a": s.rows["a"], "b": nothing("b")}) for s in both]
    alone = [replace(s, rows={"a": s.rows["a"]}) for s in both]
    expected = step("ctkd", [alone], 2)
    for a, b in zip(step("ctkd", [failed], 2), expected, strict=True):
        torch.testing.assert_close(a, b / WEIGHTS["a"], rtol=1e-6, atol=1e-7)
