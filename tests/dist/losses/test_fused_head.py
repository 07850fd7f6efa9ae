"""The head from hidden states on a weight cut over ranks, and on rows cut over ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mopd.losses.divergence import Divergence
from tests.helpers.dist import run_ranks
from tests.helpers.fused_losses import (
    Result,
    context_shard,
    factors,
    fused_shard,
    head_of,
    run_factors,
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


# Zig-zag: the first and the last quarter here, the middle there. Chunks of tokens (1, 2) and (6, 7)
# are cut. Then a rank of one chunk token without a boundary, and a rank without any row.
PARTS = {
    "zig-zag": [[0, 1, 7, 8], [2, 3, 4, 5, 6]],
    "no boundary": [[0, 1, 2, 3, 4, 5, 6, 8], [7]],
    "nothing": [[], list(range(9))],
}
CHUNKS = {"lambda_chunk": 0.7, "beta": 0.3}


def sum_of(results: list[Result], parts: list[list[int]]) -> Result:
    """Values and weight gradients added up, rows put back in their places."""
    of_hidden = torch.zeros(9, results[0][1].shape[1], dtype=torch.float64)
    for (_, part, _), rows in zip(results, parts, strict=True):
        of_hidden[np.array(rows, dtype=np.int64)] = part
    return (
        torch.stack([value for value, _, _ in results]).sum(),
        of_hidden,
        torch.stack([part for _, _, part in results]).sum(dim=0),
    )


@pytest.mark.dist
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_context_parallel(parts, fused):
    expected = one_process("ctkd", CHUNKS)
    got = sum_of(run_ranks(context_shard, 2, parts, CHUNKS, True, fused), parts)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.dist
def test_cut_chunks_need_the_other_ranks_sums():
    parts = PARTS["zig-zag"]
    apart = sum_of(run_ranks(context_shard, 2, parts, CHUNKS, False, True), parts)
    assert abs(float(apart[0] - one_process("ctkd", CHUNKS)[0])) > 1e-3
