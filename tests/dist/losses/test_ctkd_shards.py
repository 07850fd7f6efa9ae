"""Native rows, whole rows, merges and a learned W on a vocabulary cut over ranks."""

from typing import Any

import pytest
import torch

from mopd.losses.divergence import Divergence
from mopd.losses.vocab import VocabShard
from mopd.projection.learned import LearnedShard
from tests.helpers.ctkd_problems import CPU, V_S, ctkd_loss, ctkd_problem, shard_result, whole
from tests.helpers.dist import run_ranks
from tests.helpers.losses import run_head

CASES = [
    ("native", {"temperature": 1.5, "lambda_chunk": 0.3}),
    ("native_only", {"beta": 1.0}),
    ("shared", {"beta": 0.4, "temperature": 2.0}),
    ("whole", {"beta": 1.0}),
    ("whole", {"merge": "nemo", "beta": 0.3}),
    ("lists", {"merge": "mean_prob", "lambda_chunk": 0.7}),
    ("lists", {"merge": "observed", "beta": 0.3, "temperature": 1.5}),
    ("native", {"merge": "bayesian", "divergence": Divergence(kind="tvd")}),
    ("shared", {"merge": "bayesian"}),
]


@pytest.mark.dist
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_loss_and_gradient_equal_one_process(kind, options, size):
    case = ctkd_problem(kind, 11)
    value, grad = whole(case, case.logits, **options)
    results = run_ranks(shard_result, size, kind, size, options, False)
    for other, *_ in results:
        torch.testing.assert_close(other, value, rtol=1e-10, atol=1e-10)
    joined = torch.cat([part for _, part, _ in results], dim=1)
    assert not joined[:, V_S:].any()
    torch.testing.assert_close(joined[:, :V_S], grad, rtol=1e-9, atol=1e-10)


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["lists", "shared"])
@pytest.mark.parametrize("merge", ["boundary", "observed"])
def test_slopes_in_a_learned_projection_equal_one_process(kind, merge):
    case = ctkd_problem(kind, 11)
    projection: Any = LearnedShard(
        case.projection, start=0, end=V_S, device=CPU, dtype=torch.float64
    )
    options = {"merge": merge, "temperature": 1.5}
    run_head(
        ctkd_loss(projection, **options),
        case.logits,
        case.rows,
        shard=VocabShard(start=0, size=V_S, vocab_size=V_S),
        projection=projection,
    )
    results = run_ranks(shard_result, 2, kind, 2, options, True)
    joined = torch.cat([slope for *_, slope in results])
    torch.testing.assert_close(joined, projection.log_gradient(), rtol=1e-10, atol=1e-11)
