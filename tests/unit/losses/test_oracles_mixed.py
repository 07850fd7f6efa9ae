"""What a projection and several teachers must come to (docs/losses.md, oracles)."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mopd.losses.divergence import Divergence
from mopd.losses.head import DistillationHead, TeacherTerm
from mopd.losses.vocab import VocabShard
from tests.helpers.losses import build_loss, make_projection, make_rows, step_of
from tests.helpers.oracles import KINDS, random_rows, run, run_kl, same
from tests.helpers.random_losses import V_S, problem


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tokens_make_ctkd_a_plain_kl_27_34(kind, permuted):
    case = problem(9, same_vocabulary=True)
    order = np.random.default_rng(9).permutation(V_S) if permuted else np.arange(V_S)
    ids = case.rows.topk_ids
    rows = replace(case.rows, topk_ids=np.where(ids >= 0, order[ids], -1))
    projection = make_projection(np.eye(V_S, V_S + 1)[:, [*np.argsort(order), V_S]])
    rows = replace(rows, path_position=rows.path_position[:0], path_weight=rows.path_weight[:0])
    found = run("ctkd", case.logits, rows, projection, divergence=Divergence(kind=kind))
    same(found, run_kl(case.logits, case.rows, kind), tolerance=1e-9)


# students 2, 0, 1, 201, x; teachers 2, 0, 1, y; 201 is spelled 2, 0, 1 with gamma = .1
SMEARED = np.zeros((5, 5))
SMEARED[0, 0] = SMEARED[1, 1] = SMEARED[2, 2] = SMEARED[4, 3] = 1.0
SMEARED[3, :3] = np.array([1.0, 0.1, 0.01]) / 1.11


def test_the_projected_row_35():
    student = torch.tensor([[0.1, 0.2, 0.1, 0.5, 0.1]], dtype=torch.float64).log()
    projection = make_projection(SMEARED)
    expected = np.array([0.5504505, 0.2450450, 0.1045045, 0.1])
    value, grad = run(
        "ctkd", student, make_rows([0], np.arange(4)[None], expected[None]), projection, beta=0.0
    )
    assert abs(float(value)) < 1e-7 and grad.abs().max() < 1e-6
    rows = make_rows([0], np.array([[0, 1]]), np.array([[0.6, 0.2]]))
    renormalised = Divergence(kind="forward_kl", top_k_mode="renorm")
    value, _ = run("ctkd", student, rows, projection, divergence=renormalised)
    assert float(value) == pytest.approx(0.00821682, abs=2e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_with_equal_rows_of_w_are_one_36(kind):
    """Mass may move between them: the value stays, and the slope per mass is the same."""
    generator = np.random.default_rng(10)
    weights = generator.dirichlet(np.ones(5), size=6)
    weights[4] = weights[1]
    q = generator.dirichlet(np.ones(6), size=3)
    moved = q.copy()
    moved[:, 1], moved[:, 4] = 0.1 * (q[:, 1] + q[:, 4]), 0.9 * (q[:, 1] + q[:, 4])
    rows = make_rows(
        [0, 1, 2], np.tile([0, 2, 3], (3, 1)), generator.dirichlet(np.ones(5), 3)[:, :3]
    )
    options = {"divergence": Divergence(kind=kind)}
    found = [
        run("ctkd", torch.as_tensor(x).log(), rows, make_projection(weights), **options)
        for x in (q, moved)
    ]
    (value, grad), (other, slope) = found
    torch.testing.assert_close(other, value, rtol=1e-9, atol=1e-12)
    per_mass = grad.numpy() / q
    assert per_mass[:, 1] == pytest.approx(per_mass[:, 4], abs=1e-9)
    assert (slope.numpy() / moved)[:, 4] == pytest.approx(per_mass[:, 1], abs=1e-9)


def mixed(teachers, weights, kind, logits):
    """(value, gradient) of several teachers [r, V] through one head."""
    at = list(range(len(logits)))
    rows = make_rows(at, np.zeros((len(at), 1)), np.ones((len(at), 1)))
    payloads = {
        f"t{m}": replace(rows, topk_ids=None, topk_logprobs=np.log(probs))
        for m, probs in enumerate(teachers)
    }
    loss = build_loss("kl", None, divergence=Divergence(kind=kind))
    head = DistillationHead(
        terms={
            name: TeacherTerm(loss=loss, weight=weight, projection=None)
            for name, weight in zip(payloads, weights, strict=True)
        },
        shard=VocabShard(start=0, size=logits.shape[1], vocab_size=logits.shape[1]),
    )
    micro, batch = step_of(rows, len(at))
    leaf = logits.clone().requires_grad_()
    output = head(
        leaf[None],
        replace(micro, rows=payloads),
        replace(batch, denominators=dict.fromkeys(payloads, 1.0)),
    )
    output.total.backward()
    return output.total.detach(), leaf.grad


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_of_weight_0_is_none_50(kind):
    logits, one = random_rows(11)
    _, other = random_rows(11, seed=5)
    same(mixed([one, other], [1.0, 0.0], kind, logits), mixed([one], [1.0], kind, logits))


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_two_teachers_are_one_mixture_50(kind):
    """Arithmetic for forward KL, geometric for reverse KL; the values differ by a constant."""
    logits, one = random_rows(11)
    other_logits, other = random_rows(11, seed=5)
    if kind == "forward_kl":
        mixture = 0.3 * one + 0.7 * other
    else:
        mixture = one**0.3 * other**0.7
        mixture /= mixture.sum(1, keepdims=True)
    gaps = []
    for student in (logits, other_logits):
        value, grad = mixed([one, other], [0.3, 0.7], kind, student)
        single, slope = mixed([mixture], [1.0], kind, student)
        torch.testing.assert_close(grad, slope, rtol=1e-9, atol=1e-12)
        gaps.append(float(value - single))
    assert gaps[0] == pytest.approx(gaps[1], abs=1e-10) and gaps[0] > 0.1
    wrong = mixed([one if kind == "reverse_kl" else other], [1.0], kind, logits)[1]
    assert (wrong - mixed([one, other], [0.3, 0.7], kind, logits)[1]).abs().max() > 1e-2


def test_a_path_without_a_stop_token_53():
    # students 3, 13, 12, x; the row behind 1 says 3: .9, 2: .08, else .02, which nothing stands for
    weights = np.zeros((4, 5))  # teachers 1, 2, 3, x
    weights[0, 2] = weights[1, 0] = weights[2, 0] = weights[3, 3] = 1.0
    student = torch.tensor([[0.1, 0.3, 0.5, 0.1]], dtype=torch.float64).log()
    projection = make_projection(weights, nodes={(0,): ({1: [2], 2: [1]}, -1)})
    target = np.array([0.08, 0.9]) / 0.98
    rows = make_rows(
        [0],
        np.array([[0, 2, 3]]),
        np.array([[0.8, 0.1, 0.1]]),
        paths=[(0, [0, 1], target.tolist(), 0.98)],
    )
    value, grad = run("ctkd", student, rows, projection, beta=0.0)
    conditional = np.array([0.625, 0.375])
    expected = 0.98 * (target * np.log(target / conditional)).sum()
    assert float(value) == pytest.approx(expected, abs=1e-6)
    slope = 0.98 * (conditional - target)
    assert grad[0].numpy() == pytest.approx([0.0, slope[1], slope[0], 0.0], abs=1e-6)
