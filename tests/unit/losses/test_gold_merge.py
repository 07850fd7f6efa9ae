"""GOLD on merged rows: the formulas under autograd, blocks, and chunks of one token."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mopd.losses.divergence import Divergence
from tests.helpers.ctkd_problems import V_S, V_T, N, ctkd_problem
from tests.helpers.gold_reference import reference, run_gold

MERGES = ("mean_prob", "observed", "bayesian")
JSD = Divergence(kind="jsd", beta=0.3)


def problem(seed: int):
    """Chunks of several tokens, and nine of the teacher's tokens with a partner."""
    case = ctkd_problem("lists", seed)
    generator = np.random.default_rng(seed)
    common = np.full(V_T, -1, dtype=np.int32)
    common[generator.permutation(V_T)[:9]] = generator.permutation(V_S)[:9]
    return case.logits, case.rows, replace(case.projection, common=common)


@pytest.mark.parametrize("rest_bin", [True, False])
@pytest.mark.parametrize("merge", MERGES)
def test_value_and_gradient_equal_the_formulas(merge, rest_bin):
    logits, rows, projection = problem(1)
    options = {"divergence": JSD, "merge": merge, "rest_bin": rest_bin, "temperature": 1.5}
    value, grad = run_gold(logits, rows, projection, options)
    leaf = logits.clone().requires_grad_()
    expected = reference(leaf, rows, projection, options)
    expected.backward()
    torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grad, leaf.grad, rtol=1e-9, atol=1e-10)
    alone, _ = run_gold(logits, rows, projection, {**options, "merge": "boundary"})
    assert abs(float(value) - float(alone)) > 1e-3


@pytest.mark.parametrize("block_size", [1, 3, N])
@pytest.mark.parametrize("merge", MERGES)
def test_block_size_changes_nothing(merge, block_size):
    logits, rows, projection = problem(2)
    options = {"divergence": JSD, "merge": merge, "lambda_chunk": 0.4}
    wanted = run_gold(logits, rows, projection, options)
    found = run_gold(logits, rows, projection, options, block_size=block_size)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
