"""The head from hidden states on a weight cut over ranks, and on rows cut over ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mopd.losses.divergence import Divergence
from tests.helpers.dist import run_ranks
from tests.helpers.fused_losses import (
    Result,
    factors,
    fused_shard,
    head_of,
    run_factors,
    shares,
    whole,
)
from tests.helpers.losses import build_loss
from tests.helpers.random_losses import V_S, problem

CASES: list[tuple[str, dict[str, Any]]] = [
    ("kl", {"beta": 1.0}),
    ("kl", {"divergence": Divergence(kind="reverse_kl", top_k_mode="genkl")}),
    ("ctkd", {"lambda_chunk": 0.7, "temperature": 2.0}),
    ("gold", {"lambda_chunk": 0.3, "top_u": 4}),
]


def one_process(name: str, options: dict[str, Any]) -> Result:
    """Through logits that torch multiplies and differentiates."""
    case = problem(11, same_vocabulary=name == "kl")
    shard, projection = whole(case)
    head = head_of(build_loss(name, projection, **options), shard=shard, projection=projection)
    return run_factors(head, *factors(len(case.logits), V_S), case.rows, fused=False)


@pytest.mark.dist
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_tensor_parallel(name, options, size):
    """The gradient of the hidden states is a sum of parts; 23 tokens leave padding on 2 and 4."""
    value, of_hidden, of_weight = one_process(name, options)
    results = run_ranks(fused_shard, size, name, size, options)
    for other, _, _ in results:
        torch.testing.assert_close(other, value, rtol=1e-9, atol=1e-9)
    summed = torch.stack([part for _, part, _ in results]).sum(dim=0)
    torch.testing.assert_close(summed, of_hidden, rtol=1e-8, atol=1e-9)
    joined = torch.cat([part for _, _, part in results])
    assert not joined[V_S:].any()
    torch.testing.assert_close(joined[:V_S], of_weight, rtol=1e-8, atol=1e-9)


CHUNKS = {"lambda_chunk": 0.7, "beta": 0.3}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("size", [2, 3])
def test_shares_of_context_parallel_ranks_add_up(size, fused):
    results = shares(CHUNKS, size, fused)
    expected = one_process("ctkd", CHUNKS)
    for number, alone in enumerate(expected):
        got = torch.stack([result[number] for result in results]).sum(dim=0)
        torch.testing.assert_close(got, alone, rtol=1e-9, atol=1e-10)
        assert all(result[number].any() for result in results)
