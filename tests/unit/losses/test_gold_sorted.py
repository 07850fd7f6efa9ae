"""The sorted L1: numbers, ties, truncation, and what it has in common with nothing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from mopd.losses import sorted as ranks
from mopd.losses.divergence import Divergence
from mopd.losses.sorted import descending, largest, sorted_l1
from mopd.losses.vocab import VocabShard
from tests.helpers.gold_reference import gold_problem, reference, run_gold
from tests.helpers.losses import make_projection, make_rows

DTYPES = [torch.float32, torch.float64]
ULD = {"divergence": Divergence(kind="jsd"), "weights": (0.0, 1.0)}
S = {"a": 0.5, "b": 0.3, "q": 0.2}
T = {"b": 0.2, "a": 0.6, "r": 0.15, "s": 0.05}


def distance(student, teacher, top_u=None):
    student, teacher = (torch.as_tensor(np.array([row])) for row in (student, teacher))
    shard = VocabShard(start=0, size=student.shape[1], vocab_size=student.shape[1])
    teacher = largest(teacher, teacher.shape[1])
    return sorted_l1(student, teacher, top_u=top_u, shard=shard, width=student.shape[1])


def hybrid(beta=0.5, weights=(0.5, 0.5), *, common=True, dense=True, rest_bin=False):
    """S and T of the oracles; a and b are common. The value and the gradient."""
    partners = [list(S).index(t) if common and t in S else -1 for t in T]
    projection = make_projection(np.eye(3, 5), common=np.array(partners))
    rows = make_rows([0], np.arange(4)[None], np.array([list(T.values())]))
    if dense:
        rows = rows_of_logits(np.log(list(T.values())))
    options = {
        "divergence": Divergence(kind="jsd", beta=beta),
        "weights": weights,
        "rest_bin": rest_bin,
    }
    logits = torch.tensor([list(S.values())], dtype=torch.float64).log()
    value, grad = run_gold(logits, rows, projection, options)
    return float(value), grad[0].numpy()


def rows_of_logits(logits):
    case = gold_problem((2, len(logits)), 0, rows=2)
    case.teacher[0] = logits
    return dataclasses.replace(case.dense(), row_weight=np.ones(1))


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize(
    ("beta", "matched", "total"),
    [(0.0, 0.0283000, 0.0641500), (0.5, 0.0073098, 0.0536549), (1.0, 0.0304787, 0.0652394)],
)
def test_hybrid_45(beta, matched, total, dense):
    assert hybrid(beta, (1.0, 0.0), dense=dense)[0] == pytest.approx(matched, abs=1e-7)
    assert hybrid(beta, (0.0, 1.0), dense=dense)[0] == pytest.approx(0.10, abs=1e-12)
    assert hybrid(beta, dense=dense)[0] == pytest.approx(total, abs=1e-7)
    assert hybrid(beta, (0.0, 1.0), common=False, dense=dense)[0] == pytest.approx(0.30, abs=1e-12)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize(
    ("rest_bin", "expected"), [(False, [0.21, -0.22, 0.01]), (True, [0.0, -0.1, 0.1])]
)
def test_suppression_41(rest_bin, expected, dense):
    projection = make_projection(np.eye(3, 5), common=np.array([1, 2, -1]))
    probs = np.array([0.5, 0.2, 0.3])
    rows = (
        rows_of_logits(np.log(probs))
        if dense
        else make_rows([0], np.array([[0, 1]]), probs[None, :2])
    )
    options = {
        "divergence": Divergence(kind="forward_kl"),
        "weights": (1.0, 0.0),
        "rest_bin": rest_bin,
    }
    logits = torch.tensor([[0.3, 0.4, 0.3]], dtype=torch.float64).log()
    _, grad = run_gold(logits, rows, projection, options)
    assert grad[0].numpy() == pytest.approx(expected, abs=1e-12)


def test_permutations_and_range_47():
    generator = np.random.default_rng(0)
    student, teacher = generator.dirichlet(np.ones(9)), generator.dirichlet(np.ones(13))
    value = float(distance(student, teacher).value)
    shuffled = distance(generator.permutation(student), generator.permutation(teacher))
    assert float(shuffled.value) == pytest.approx(value, abs=1e-14)
    assert 0.0 < value <= 2.0
    assert float(distance(student, generator.permutation(student)).value) == 0.0
    one_hot = np.eye(10)[3]
    assert float(distance(one_hot, [0.1] * 10).value) == pytest.approx(1.8, abs=1e-14)
    assert float(distance([0.6, 0.4], [0.6, 0.4, 0.0, 0.0]).value) == 0.0
    padded = distance([0.6, 0.4], [0.5, 0.3, 0.2])
    assert float(padded.value) == pytest.approx(0.4, abs=1e-14)


def test_all_and_none_matched_48():
    case = gold_problem((8, 8), 8, seed=1)
    options = {"divergence": Divergence(kind="jsd"), "weights": (1.0, 1.0)}
    value, _ = run_gold(case.logits, case.dense(), case.projection, options)
    rows = case.dense()
    partners = torch.as_tensor(case.projection.common.astype(np.int64))
    q = torch.softmax(case.logits[case.position], -1)[:, partners]
    p = torch.softmax(torch.as_tensor(case.teacher), -1)
    m = (p + q) / 2
    jsd = 0.5 * (p * (p / m).log() + q * (q / m).log()).sum(-1)
    assert float(value) == pytest.approx(float((jsd * torch.as_tensor(rows.row_weight)).sum()))
    nothing = gold_problem((8, 8), 0, seed=1)
    for weights in ((1.0, 1.0), (0.0, 1.0)):
        found = run_gold(
            nothing.logits, nothing.dense(), nothing.projection, options | {"weights": weights}
        )
        expected = run_gold(nothing.logits, nothing.dense(), nothing.projection, ULD)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("top_u", [1, 4, 16])
def test_truncation_stays_within_its_bound_49(top_u):
    generator = np.random.default_rng(top_u)
    for _ in range(50):
        student, teacher = generator.dirichlet(np.full(20, 0.3)), generator.dirichlet(np.ones(30))
        exact = float(distance(student, teacher).value)
        kept = np.sort(teacher)[::-1][:top_u]
        cut = float(distance(student, kept, top_u).value)
        bound = (1 - np.sort(student)[::-1][:top_u].sum()) + (1 - kept.sum())
        assert -1e-12 <= exact - cut <= bound + 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 3, 7, 9])
def test_of_equal_values_the_smaller_id_comes_first(dtype, count):
    values = torch.tensor([[0.1, 0.3, 0.1, 0.3, 0.0, 0.1, 0.1], [0.0] * 7], dtype=dtype)
    top, index = descending(values, count)
    assert index.tolist() == [[1, 3, 0, 2, 5, 6, 4][:count], list(range(7))[:count]]
    torch.testing.assert_close(top, values.gather(1, index), rtol=0, atol=0)
    torch.testing.assert_close(largest(values, count), top, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 17, 400, 1000])
def test_order_equals_that_of_a_stable_sort(dtype, count):
    generator = torch.Generator().manual_seed(count)
    values = torch.softmax(6 * torch.randn(5, 1000, generator=generator), -1).to(dtype)
    values = (values * 1e4).round() / 1e4  # many ties
    expected = torch.sort(values, dim=-1, descending=True, stable=True)
    top, index = descending(values, count)
    torch.testing.assert_close(index, expected.indices[:, :count], rtol=0, atol=0)
    torch.testing.assert_close(top, expected.values[:, :count], rtol=0, atol=0)
    torch.testing.assert_close(largest(values, count), top, rtol=0, atol=0)


def test_a_device_orders_as_the_cpu_does():
    values = torch.rand(4, 300, generator=torch.Generator().manual_seed(0)).mul_(50).round_()
    for count in (0, 1, 20, 300):
        expected = ranks._order_on_cpu(values, count)
        torch.testing.assert_close(ranks._order(values, count), expected, rtol=0, atol=0)


def test_the_slope_of_a_tie_belongs_to_the_smaller_id():
    found = distance([0.4, 0.4, 0.2], [0.45, 0.3, 0.25])
    assert found.index.tolist() == [[0, 1, 2]]
    assert found.slope.tolist() == [[-1.0, 1.0, -1.0]]
    assert float(found.mean) == pytest.approx(-0.4 + 0.4 - 0.2)


def test_only_one_teacher_column():
    for common in (0, 1):
        case = gold_problem((5, 1), common, seed=3)
        options = {"divergence": Divergence(kind="forward_kl"), "top_u": 2}
        leaf = case.logits.clone().requires_grad_()
        expected = reference(leaf, case.dense(), case.projection, options)
        expected.backward()
        value, grad = run_gold(case.logits, case.dense(), case.projection, options)
        torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad, leaf.grad, rtol=1e-10, atol=1e-12)


def test_listing_the_whole_vocabulary_is_cut_on_both_sides_as_whole_rows_are():
    case = gold_problem((23, 17), 6, seed=4)
    rows = case.dense()
    logs = torch.log_softmax(torch.as_tensor(case.teacher), -1).numpy()
    every = np.arange(case.projection.teacher_size, dtype=np.int32)
    listed = dataclasses.replace(rows, topk_ids=every, topk_logprobs=logs)
    options = {"divergence": Divergence(kind="jsd", beta=0.5), "top_u": 3}
    wanted = run_gold(case.logits, rows, case.projection, options)
    found = run_gold(case.logits, listed, case.projection, options)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
