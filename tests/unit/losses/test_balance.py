"""The weights of distillation and cross-entropy over the steps of a run."""

import json
import math

import pytest

from mopd.losses.balance import Balance


def dynamic(**options):
    given = {"mode": "dynamic", "lambda_kd": 1.0, "lambda_ce": 1.0, "decay": 0.9}
    return Balance(**given | options)


def after(balance, *means):
    for kd, ce in means:
        balance = balance.update(kd, ce)
    return balance


def test_fixed_weights_stay():
    fixed = dynamic(mode="fixed", lambda_kd=0.7, lambda_ce=0.1)
    assert after(fixed, (1.0, 5.0), (2.0, 8.0)).scales() == (0.7, 0.1)


def test_nothing_is_scaled_before_the_first_step():
    assert dynamic(lambda_ce=0.3).scales() == (1.0, 0.3)


def test_both_terms_are_brought_to_one_size():
    balance = after(dynamic(), (0.2, 3.0))
    kd, ce = balance.scales()
    assert (kd * 0.2, ce * 3.0) == pytest.approx((3.0, 3.0))


def test_lambda_kd_still_counts():
    assert after(dynamic(lambda_kd=0.5, lambda_ce=2.0), (0.2, 3.0)).scales() == (7.5, 2.0)


def test_averages_over_steps():
    balance = after(dynamic(), (1.0, 2.0), (3.0, 2.0), (1.0, 6.0))
    kd = 0.9 * (0.9 * 1.0 + 0.1 * 3.0) + 0.1 * 1.0
    ce = 0.9 * 2.0 + 0.1 * 6.0
    assert balance.scales()[0] == pytest.approx(ce / kd)


@pytest.mark.parametrize(("means", "scale"), [((1e-6, 3.0), 100.0), ((3.0, 1e-6), 0.01)])
def test_limits(means, scale):
    assert after(dynamic(), means).scales()[0] == scale


@pytest.mark.parametrize("bad", [(math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0)])
def test_a_step_that_is_not_finite_changes_nothing(bad):
    before = after(dynamic(), (0.5, 1.0))
    assert before.update(*bad) == before
    assert dynamic().update(*bad).scales() == (1.0, 1.0)


@pytest.mark.parametrize("means", [(0.0, 1.0), (-1e-9, 1.0), (0.0, 0.0)])
def test_a_step_without_a_distillation_loss_changes_nothing(means):
    assert after(dynamic(), means).scales()[0] == 1.0
    assert after(dynamic(), (0.5, 1.0), means).scales()[0] == 2.0
    assert after(dynamic(), (1e-9, 1.0)).scales()[0] == 100.0


def test_no_cross_entropy():
    assert after(dynamic(), (1.0, 0.0)).scales()[0] == 0.01


def test_a_step_leaves_the_object_before_it_alone():
    first = after(dynamic(), (0.5, 1.0))
    first.update(4.0, 4.0)
    assert first.scales()[0] == 2.0


@pytest.mark.parametrize("means", [[], [(0.5, 1.25), (0.1, 3.0)]])
def test_a_checkpoint_keeps_it_exactly(means):
    balance = after(dynamic(), *means)
    state = json.loads(json.dumps(balance.state()))
    assert dynamic().from_state(state) == balance
