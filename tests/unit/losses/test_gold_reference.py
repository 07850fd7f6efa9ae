"""GOLD against its formulas in float64, value and gradient: every form of payload and option."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from mopd.losses.divergence import Divergence
from tests.helpers.gold_reference import gold_problem, reference, run_gold
from tests.helpers.random_losses import V_T, problem

KINDS = [
    Divergence(kind="jsd", beta=0.5),
    Divergence(kind="jsd", beta=0.2),
    Divergence(kind="jsd", beta=0.0),
    Divergence(kind="jsd", beta=1.0),
    Divergence(kind="forward_kl"),
    Divergence(kind="reverse_kl"),
    Divergence(kind="mixed", weight=0.3),
    Divergence(kind="skew_kl"),
    Divergence(kind="skew_reverse_kl"),
    Divergence(kind="akl"),
    Divergence(kind="tvd"),
]
MODES = [
    Divergence(kind="forward_kl", top_k_mode="genkl"),
    Divergence(kind="jsd", top_k_mode="renorm"),
    Divergence(kind="jsd", top_k_mode="trunc"),
]
SHAPES = [
    ((23, 17), 9),  # more without a partner on the student's side
    ((13, 29), 7),  # on the teacher's
    ((11, 11), 11),  # everything common
    ((12, 15), 0),  # nothing
    ((9, 15), 9),  # the student is wholly common
    ((15, 9), 9),  # the teacher
    ((6, 1), 0),
    ((6, 1), 1),
]


def payload(case, form, temperature):
    if form == "dense":
        return case.dense()
    if form == "listed":
        return case.listed(min(5, case.teacher.shape[1]), temperature)
    return case.shared(np.arange(0, case.teacher.shape[1], 2), temperature)


def check(case, rows, options):
    value, grad = run_gold(case.logits, rows, case.projection, options)
    leaf = case.logits.clone().requires_grad_()
    expected = reference(leaf, rows, case.projection, options)
    expected.backward()
    torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grad, leaf.grad, rtol=1e-9, atol=1e-10)
    return value, grad


@pytest.mark.parametrize("form", ["dense", "listed", "shared"])
@pytest.mark.parametrize("divergence", KINDS, ids=lambda d: f"{d.kind}-{d.beta}")
@pytest.mark.parametrize("rest_bin", [True, False])
@pytest.mark.parametrize("top_u", [None, 3])
def test_every_kind(form, divergence, rest_bin, top_u):
    case = gold_problem((23, 17), 9, seed=1)
    options = {"divergence": divergence, "rest_bin": rest_bin, "top_u": top_u}
    _, grad = check(case, payload(case, form, 1.0), options | {"weights": (0.3, 0.7)})
    assert grad.abs().max() > 1e-3


@pytest.mark.parametrize("form", ["dense", "listed", "shared"])
@pytest.mark.parametrize(("sizes", "common"), SHAPES)
@pytest.mark.parametrize("top_u", [None, 2])
@pytest.mark.parametrize("rest_bin", [True, False])
def test_every_share_of_common_tokens(form, sizes, common, top_u, rest_bin):
    case = gold_problem(sizes, common, seed=2)
    options = {"divergence": Divergence(kind="jsd"), "rest_bin": rest_bin, "top_u": top_u}
    check(case, payload(case, form, 1.0), options)


@pytest.mark.parametrize("form", ["dense", "listed", "shared"])
@pytest.mark.parametrize("divergence", KINDS[4:6], ids=lambda d: d.kind)
def test_temperature(form, divergence):
    case = gold_problem((23, 17), 9, seed=3)
    check(case, payload(case, form, 2.5), {"divergence": divergence, "temperature": 2.5})


@pytest.mark.parametrize("divergence", MODES, ids=lambda d: d.top_k_mode)
def test_modes_of_the_mass_outside(divergence):
    case = gold_problem((23, 17), 9, seed=4)
    check(case, case.dense(), {"divergence": divergence})


@pytest.mark.parametrize("form", ["dense", "listed"])
@pytest.mark.parametrize("divergence", [*KINDS[:1], *KINDS[4:6]], ids=lambda d: d.kind)
def test_the_floor_without_a_rest_bin_has_no_slope(form, divergence):
    case = gold_problem((23, 17), 9, seed=5)
    student = int(case.projection.common[case.projection.common >= 0][0])
    case.logits[:, student] = -30.0
    options = {"divergence": divergence, "rest_bin": False, "weights": (1.0, 0.0)}
    check(case, payload(case, form, 1.0), options)


@pytest.mark.parametrize("form", ["dense", "listed", "shared"])
def test_a_constant_per_row_and_blocks_change_nothing(form):
    case = gold_problem((23, 17), 9, seed=6)
    rows = payload(case, form, 1.0)
    options = {"divergence": Divergence(kind="jsd"), "lambda_chunk": 0.0}
    whole = run_gold(case.logits, rows, case.projection, options)
    moved = rows
    if form == "dense":
        moved = dataclasses.replace(rows, topk_logprobs=rows.topk_logprobs + 7.0)
    for block_size in (1, 2, 7):
        cut = run_gold(case.logits, moved, case.projection, options, block_size=block_size)
        for a, b in zip(cut, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_dense_teacher_is_a_list_of_everything():
    case = gold_problem((23, 17), 9, seed=7)
    options = {"divergence": Divergence(kind="jsd"), "top_u": None}
    dense = dataclasses.replace(case.dense(), row_weight=np.ones(4))
    listed = run_gold(case.logits, case.listed(17), case.projection, options)
    for a, b in zip(run_gold(case.logits, dense, case.projection, options), listed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "mixed"])
@pytest.mark.parametrize("rest_bin", [True, False])
def test_finite_differences_with_impossible_teacher_tokens(kind, rest_bin):
    case = gold_problem((9, 8), 5, seed=8, rows=2)
    case.teacher[0, np.flatnonzero(case.projection.common >= 0)[0]] = -np.inf
    case.teacher[0, np.flatnonzero(case.projection.common < 0)[0]] = -np.inf
    options = {"divergence": Divergence(kind=kind), "rest_bin": rest_bin, "weights": (0.6, 0.4)}
    _, grad = run_gold(case.logits, case.dense(), case.projection, options)
    step = 1e-6
    for column in range(9):
        ends = []
        for sign in (1, -1):
            moved = case.logits.clone()
            moved[0, column] += sign * step
            ends.append(run_gold(moved, case.dense(), case.projection, options)[0])
        numeric = float((ends[0] - ends[1]) / (2 * step))
        assert float(grad[0, column]) == pytest.approx(numeric, rel=1e-5, abs=1e-7)


def test_rows_without_a_boundary_and_padded_columns_get_nothing():
    case = gold_problem((23, 17), 9, seed=9)
    options = {"divergence": Divergence(kind="jsd")}
    plain = run_gold(case.logits, case.dense(), case.projection, options)
    padded = torch.cat([case.logits, torch.full((5, 3), 50.0)], dim=1)
    padded[1] = float("inf")  # a row that nobody judges
    value, grad = run_gold(padded, case.dense(), case.projection, options)
    torch.testing.assert_close(value, plain[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad[:, :23], plain[1], rtol=1e-12, atol=1e-12)
    assert not grad[:, 23:].any()
    assert not grad[1].any()


@pytest.mark.parametrize("top_u", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_nan_surfaces(top_u, dtype):
    case = gold_problem((23, 17), 9, seed=10)
    options = {"divergence": Divergence(kind="jsd"), "top_u": top_u}
    case.logits[3, 2] = float("nan")
    value, grad = run_gold(case.logits.to(dtype), case.dense(), case.projection, options)
    assert value.isnan()
    assert grad[3].isnan().all()
    assert not grad[0].isnan().any()


@pytest.mark.parametrize("form", ["dense", "listed"])
@pytest.mark.parametrize("top_u", [None, 40])
@pytest.mark.parametrize("rest_bin", [True, False])
def test_float32_is_close(form, top_u, rest_bin):
    case = gold_problem((300, 400), 180, seed=11, rows=9)
    case.logits[torch.arange(9), torch.arange(9) * 7] += 14.0  # near one-hot
    for divergence in (*KINDS[:1], *KINDS[4:6]):
        options = {"divergence": divergence, "top_u": top_u, "rest_bin": rest_bin}
        rows = payload(case, form, 1.0)
        exact = run_gold(case.logits, rows, case.projection, options)
        single = run_gold(case.logits.float(), rows, case.projection, options)
        torch.testing.assert_close(single[0].double(), exact[0], rtol=1e-5, atol=1e-6)
        gap = (single[1].double() - exact[1]).abs().max()
        assert gap < 1e-6 + 1e-5 * exact[1].abs().max(), divergence


def test_two_teacher_tokens_for_one_student_token_are_refused():
    case = gold_problem((6, 6), 3, seed=12)
    case.projection.common[:] = [2, 2, -1, -1, -1, -1]
    with pytest.raises(ValueError, match="share a student token"):
        run_gold(case.logits, case.dense(), case.projection, {"divergence": KINDS[0]})


def test_the_chunk_term_beside_a_dense_teacher():
    """Blocks of one row: some hold tokens of a chunk and no boundary."""
    case = problem(5)
    count = len(case.rows.position)
    logits = np.random.default_rng(0).normal(size=(count, V_T))
    dense = dataclasses.replace(case.rows, topk_ids=None, topk_logprobs=logits)
    added = []
    for rows in (dense, case.rows):
        plain, with_chunks = (
            run_gold(
                case.logits,
                rows,
                case.projection,
                {"divergence": Divergence(kind="jsd"), "lambda_chunk": weight},
                block_size=1,
            )
            for weight in (0.0, 0.7)
        )
        added.append([b - a for a, b in zip(plain, with_chunks, strict=True)])
    assert added[0][1].abs().max() > 1e-3
    for a, b in zip(*added, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
