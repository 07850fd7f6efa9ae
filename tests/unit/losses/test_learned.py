"""A learned W: slopes in its log-weights, rows that stay stochastic, its file, and learning."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from mopd.errors import ArtifactError
from mopd.losses.vocab import VocabShard
from mopd.projection import ProjectionShard
from mopd.projection.learned import LearnedShard, joined, load_learned, save_learned
from tests.helpers.ctkd_problems import CPU, V_S, V_T, N, ctkd_loss, ctkd_problem
from tests.helpers.losses import run_head

SHARD = VocabShard(start=0, size=V_S, vocab_size=V_S)
KINDS = ("lists", "shared", "whole")
MERGES = ("boundary", "mean_prob", "observed", "bayesian")


def learned_shard(case, start=0, end=V_S, dtype=torch.float64):
    return LearnedShard(case.projection, start=start, end=end, device=CPU, dtype=dtype)


def run(case, projection, block_size=4, **options):
    return run_head(
        ctkd_loss(projection, **options),
        case.logits,
        case.rows,
        shard=SHARD,
        projection=projection,
        block_size=block_size,
    )


def moved(projection, entry, step):
    """The same log-weights with one of them changed."""
    state = projection.state()
    state["log_weight"][entry] += step
    projection.load(state)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("merge", MERGES)
def test_slopes_in_the_log_weights_are_derivatives(kind, merge):
    case = ctkd_problem(kind, 1)
    options = {"beta": 0.3, "temperature": 1.7, "merge": merge}
    projection = learned_shard(case)
    run(case, projection, **options)
    slope = projection.log_gradient()
    assert slope.abs().max() > 1e-3
    generator = np.random.default_rng(0)
    for entry in generator.choice(len(slope), size=8, replace=False):
        values = []
        for step in (1e-5, -1e-5):
            other = learned_shard(case)
            moved(other, entry, step)
            values.append(float(run(case, other, **options)[0]))
        numeric = (values[0] - values[1]) / 2e-5
        assert float(slope[entry]) == pytest.approx(numeric, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_one_is_the_fixed_projection(kind):
    case = ctkd_problem(kind, 2)
    fixed = ProjectionShard(case.projection, start=0, end=V_S, device=CPU)
    for a, b in zip(run(case, learned_shard(case)), run(case, fixed), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_add_up_over_blocks_and_micro_batches(kind):
    case = ctkd_problem(kind, 3)
    whole, cut = learned_shard(case), learned_shard(case)
    run(case, whole, block_size=N)
    run(case, cut, block_size=1)
    torch.testing.assert_close(whole.gradient, cut.gradient, rtol=1e-12, atol=1e-12)
    once = whole.gradient.clone()
    run(case, whole, block_size=N)
    torch.testing.assert_close(whole.gradient, 2.0 * once)


def test_rows_stay_stochastic_and_the_artefact_stays_as_it_was():
    case = ctkd_problem("lists", 4)
    before = case.projection.val.copy()
    projection = learned_shard(case, dtype=torch.float32)
    for _ in range(30):
        run(case, projection)
        projection.step(0.1)
    row, column, weight = projection.columns(torch.arange(V_T + 1))
    matrix = torch.zeros(V_S, V_T + 1).index_put_((row, column), weight)
    torch.testing.assert_close(matrix.sum(1), torch.ones(V_S), rtol=0, atol=1e-6)
    fixed = ProjectionShard(case.projection, start=0, end=V_S, device=CPU)
    row, column, weight = fixed.columns(torch.arange(V_T + 1))
    built = torch.zeros(V_S, V_T + 1).index_put_((row, column), weight)
    assert torch.equal(matrix > 0, built > 0)  # entries come and go nowhere
    assert (matrix - built).abs().max() > 0.1
    assert np.array_equal(case.projection.val, before)


@pytest.mark.parametrize("kind", KINDS)
def test_learning_lowers_the_loss(kind):
    case = ctkd_problem(kind, 5)
    projection: Any = learned_shard(case)
    loss = ctkd_loss(projection)
    values = []
    for _ in range(100):
        value, _ = run_head(loss, case.logits, case.rows, shard=SHARD, projection=projection)
        projection.step(1e-2)
        values.append(float(value))
    assert values[-1] < 0.8 * values[0]
    assert values[1] < values[0]  # the weights of the step before are forgotten at once


def test_one_step_is_adams():
    case = ctkd_problem("lists", 6)
    projection = learned_shard(case)
    leaf = torch.as_tensor(projection.state()["log_weight"]).clone().requires_grad_()
    adam = torch.optim.Adam([leaf], lr=1e-2)
    for _ in range(3):
        run(case, projection)
        leaf.grad = projection.log_gradient().clone()
        projection.step(1e-2)
        adam.step()
        assert not projection.gradient.any()
        found = torch.as_tensor(projection.state()["log_weight"])
        torch.testing.assert_close(found, leaf.detach(), rtol=1e-12, atol=1e-12)


def test_save_and_load_are_exact_in_another_layout(tmp_path):
    case = ctkd_problem("lists", 7)
    projection = learned_shard(case)
    for _ in range(3):
        run(case, projection)
        projection.step(1e-2)
    path = tmp_path / "learned.safetensors"
    save_learned(path, case.projection, projection.state())
    state = load_learned(path, case.projection)
    halves = [learned_shard(case, a, b) for a, b in ((0, 12), (12, 24))]
    for half in halves:
        half.load(state)
    again = joined([half.state() for half in halves])
    for name, array in projection.state().items():
        assert np.array_equal(again[name], array), name
    other = learned_shard(case)
    other.load(again)
    for shard in (projection, other):
        run(case, shard)
        shard.step(1e-2)
    assert np.array_equal(projection.state()["log_weight"], other.state()["log_weight"])


def test_a_file_of_another_projection_is_refused(tmp_path):
    case = ctkd_problem("lists", 8)
    path = tmp_path / "learned.safetensors"
    save_learned(path, case.projection, learned_shard(case).state())
    other = dataclasses.replace(case.projection, student_fingerprint="another")
    with pytest.raises(ArtifactError, match="student"):
        load_learned(path, other)
    with pytest.raises(ArtifactError, match="entries"):
        load_learned(path, ctkd_problem("lists", 9).projection)
    path.write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="not a readable"):
        load_learned(path, case.projection)


def test_a_state_that_is_too_short_is_refused():
    case = ctkd_problem("lists", 10)
    half = learned_shard(case, 0, 12)
    with pytest.raises(ArtifactError, match="entries"):
        learned_shard(case, 12, 24).load(half.state())
