"""Losses on tokens with a vocabulary cut over ranks equal those of one process."""

import pytest
import torch

from mopd.losses.cross_entropy import cross_entropy
from mopd.losses.source import LogitsSource
from tests.helpers.dist import run_ranks
from tests.helpers.random_losses import V_S
from tests.helpers.token_losses import WHOLE, build_opd, run_tokens, sampled, sft_micro
from tests.helpers.tp_token_losses import cross_entropy_result, megatron_result, opd_result

CASES = [
    {"importance": "icepop", "max_advantage": 3.0},
    {"importance": "tis", "sampling_temperature": 0.7, "discount": 0.5},
    {"importance": "sequence_mask", "bounds": (0.9, 1.5), "iw_gamma": 1.0},
    {"importance": "ppo", "bounds": (0.8, 1.2), "policy": "old"},
]


def joined(results, value, gradient, *, tolerance):
    for other, _ in results:
        torch.testing.assert_close(other, value, rtol=tolerance, atol=tolerance)
    found = torch.cat([part for _, part in results], dim=1)
    assert not found[:, V_S:].any()
    torch.testing.assert_close(found[:, :V_S], gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.dist
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("options", CASES)
def test_policy_gradient(options, size):
    loss = build_opd(**options)
    case = sampled(7, temperature=loss.sampling_temperature)
    result, gradient = run_tokens(loss, case)
    scalars = {"loss": result.loss, "kl": result.kl, **result.extra}
    joined(run_ranks(opd_result, size, size, options), scalars, gradient, tolerance=1e-10)


def whole_cross_entropy():
    logits, micro = sft_micro(0)
    source = LogitsSource(logits.flatten(0, 1), WHOLE)
    value = cross_entropy(source, micro, WHOLE, scale=1.3, block_rows=100)
    return value, source.finish()


@pytest.mark.dist
@pytest.mark.parametrize("size", [2, 4])
def test_cross_entropy(size):
    value, gradient = whole_cross_entropy()
    joined(run_ranks(cross_entropy_result, size, size), value, gradient, tolerance=1e-11)


@pytest.mark.dist
@pytest.mark.parametrize("size", [1, 2])
def test_cross_entropy_equals_megatrons(size):
    value, gradient = whole_cross_entropy()
    results = run_ranks(megatron_result, size, size)
    joined(results, value.float(), gradient.float(), tolerance=1e-5)
