"""Merged student rows: formulas under autograd, chain scalars, blocks, and peers' numbers."""

import dataclasses

import numpy as np
import pytest
import torch

from mopd.losses.divergence import Divergence
from mopd.losses.merge import SCALAR_FLOOR
from mopd.losses.rows import blocks
from tests.helpers.ctkd_problems import CHUNKS, V_S, N, autograd, ctkd_problem, whole
from tests.helpers.losses import make_projection, make_rows

MERGES = ("mean_prob", "nemo", "observed", "bayesian")
KINDS = ("lists", "shared", "whole", "native")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize(("beta", "temperature"), [(0.0, 1.0), (0.3, 2.0), (1.0, 1.0)])
def test_value_and_gradient_equal_the_formulas(kind, merge, beta, temperature):
    case = ctkd_problem(kind, 1)
    options = {"beta": beta, "temperature": temperature, "merge": merge}
    value, grad = whole(case, case.logits, **options)
    expected, slope = autograd(case, **options)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grad, slope, rtol=1e-9, atol=1e-10)
    assert abs(float(value) - float(whole(case, case.logits)[0])) > 1e-3


@pytest.mark.parametrize("merge", MERGES)
def test_rows_of_no_chunk_get_nothing_and_all_others_something(merge):
    case = ctkd_problem("lists", 2)
    _, grad = whole(case, case.logits, merge=merge)
    assert not grad[7].any()
    assert all(grad[row].any() for chunk in CHUNKS for row in chunk)


@pytest.mark.parametrize("merge", ["observed", "bayesian"])
def test_a_scalar_below_the_floor_is_a_constant(merge):
    case = ctkd_problem("lists", 3)
    row = 2  # the middle of a chunk of three
    token = int(case.rows.token_id[case.rows.token_position == row][0])
    case.logits[row, token] = -40.0
    value, grad = whole(case, case.logits, merge=merge)
    expected, slope = autograd(case, merge=merge)
    assert float(torch.softmax(case.logits[row], -1)[token]) < SCALAR_FLOOR
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grad, slope, rtol=1e-9, atol=1e-10)
    assert not grad[row].any()


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize(
    "divergence",
    [
        Divergence(kind="tvd"),
        Divergence(kind="skew_reverse_kl"),
        Divergence(kind="forward_kl", top_k_mode="genkl"),
        Divergence(kind="reverse_kl", top_k_mode="genkl"),
        Divergence(kind="forward_kl", top_k_mode="renorm"),
        Divergence(kind="reverse_kl", top_k_mode="trunc"),
    ],
    ids=lambda d: f"{d.kind}-{d.top_k_mode}",
)
def test_slopes_are_derivatives_where_masses_do_not_add_up_to_1(merge, divergence):
    case = ctkd_problem("lists", 4)
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(case.logits.shape, generator=generator, dtype=torch.float64)
    options = {"merge": merge, "divergence": divergence, "temperature": 1.4}
    _, grad = whole(case, case.logits, **options)
    up, down = (
        whole(case, case.logits + sign * 1e-6 * direction, **options)[0] for sign in (1, -1)
    )
    numeric = float(up - down) / 2e-6
    assert float((grad * direction).sum()) == pytest.approx(numeric, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("block_size", [1, 7, N])
def test_block_size_changes_nothing(merge, block_size):
    case = ctkd_problem("lists", 5)
    options = {"merge": merge, "lambda_chunk": 0.6}
    for a, b in zip(
        whole(case, case.logits, **options),
        whole(case, case.logits, block_size, **options),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("merge", MERGES)
def test_the_chunk_term_is_added_to_a_merge(merge):
    case = ctkd_problem("lists", 6)
    plain, chunks = whole(case, case.logits), whole(case, case.logits, lambda_chunk=0.6)
    merged = whole(case, case.logits, merge=merge)
    both = whole(case, case.logits, merge=merge, lambda_chunk=0.6)
    for a, b, c, d in zip(plain, chunks, merged, both, strict=True):
        torch.testing.assert_close(d - c, b - a, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("merge", MERGES)
def test_chunks_of_one_row_are_boundary_rows(merge):
    case = ctkd_problem("lists", 7)
    single = np.isin(case.rows.token_position, case.rows.position)
    rows = dataclasses.replace(
        case.rows,
        token_position=case.rows.token_position[single],
        token_id=case.rows.token_id[single],
        token_chunk=case.rows.token_chunk[single],
    )
    case = dataclasses.replace(case, rows=rows)
    for a, b in zip(whole(case, case.logits, merge=merge), whole(case, case.logits), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("merge", MERGES)
def test_tokens_of_a_chunk_without_a_boundary_row_count_nothing(merge):
    case = ctkd_problem("lists", 9)
    weight = case.rows.row_weight.copy()
    weight[1] = 0.0
    silent = dataclasses.replace(case.rows, row_weight=weight)
    kept = np.array([0, 2, 3, 4])
    names = ("position", "row_weight", "topk_ids", "topk_logprobs", "log_tail")
    gone = {name: getattr(case.rows, name)[kept] for name in names}
    found = [
        whole(dataclasses.replace(case, rows=rows), case.logits, merge=merge)
        for rows in (silent, dataclasses.replace(case.rows, **gone))
    ]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert not found[1][1][2].any()


def test_no_chunk_is_cut_by_a_block():
    rows = ctkd_problem("lists", 8).rows

    def cut(block_size, with_tokens):
        like = torch.zeros((), dtype=torch.float64)
        found = blocks(
            rows, projection=None, with_tokens=with_tokens, block_size=block_size, like=like
        )
        return [block.positions.tolist() for block in found]

    assert cut(1, True) == [[0], [1, 2, 3], [4], [5, 6], [8, 9]]
    assert cut(4, True) == [[0, 1, 2, 3], [4, 5, 6], [8, 9]]
    assert cut(5, True) == [[0, 1, 2, 3, 4], [5, 6, 8, 9]]
    assert cut(9, True) == [[0, 1, 2, 3, 4, 5, 6, 8, 9]]
    assert cut(2, False) == [[0, 1], [4, 5], [8]]


# students 2, 0, 1, 201, x; teachers 2, 0, 1, y; 201 is spelled 2, 0, 1 with gamma = .1
SMEARED = np.zeros((5, 5))
SMEARED[0, 0] = SMEARED[1, 1] = SMEARED[2, 2] = SMEARED[4, 3] = 1.0
SMEARED[3, :3] = np.array([1.0, 0.1, 0.01]) / 1.11


def case_of(student, tokens, ids, teacher, matrix):
    """One chunk: the student's rows and sampled tokens, and the teacher's merged row."""
    case = ctkd_problem("lists")
    rows = make_rows(
        [0], np.array([ids]), np.ones((1, len(ids))), tokens=[(i, t, 0) for i, t in tokens]
    )
    rows = dataclasses.replace(
        rows, topk_logprobs=np.log(np.array([teacher])), log_tail=np.array([-np.inf])
    )
    logits = torch.full((len(student), V_S), -torch.inf, dtype=torch.float64)
    logits[:, : len(student[0])] = torch.log(torch.tensor(student, dtype=torch.float64))
    weights = np.zeros((V_S, matrix.shape[1]))
    weights[:, -1] = 1.0
    weights[: len(matrix)] = matrix
    return dataclasses.replace(case, rows=rows, projection=make_projection(weights)), logits


def test_nemo_on_one_student_and_three_teacher_tokens_37():
    # NeMo-RL: teacher rows averaged as logarithms and left so; both sides on the same columns,
    # where the student's row adds up to 1 already
    teacher = np.array([[0.6, 0.2, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1]])
    geometric = np.exp(np.log(teacher).mean(axis=0))
    student = [[0.1, 0.2, 0.1, 0.5, 0.1]]
    case, logits = case_of(student, [(0, 3)], [0, 1, 2, 3], geometric.tolist(), SMEARED)
    divergence = Divergence(kind="forward_kl", top_k_mode="trunc")
    value, _ = whole(case, logits, merge="nemo", divergence=divergence)
    assert float(value) == pytest.approx(-0.0897400, abs=1e-7)


@pytest.mark.parametrize(
    ("merge", "expected"),
    [
        ("mean_prob", [0.4, 0.4, 0.2]),
        ("nemo", [0.4, 0.4, 0.2]),
        ("observed", [0.30, 0.15, 0.05]),
        ("bayesian", [0.12, 0.30, 0.18]),
    ],
)
def test_merged_rows_37_46(merge, expected):
    # a teacher that says exactly this is at distance 0, and at none from anything else
    student = [[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]]
    tokens = [(0, 0), (1, 1)]
    divergence = Divergence(kind="forward_kl", top_k_mode="genkl")
    for shift, equal in ((0.0, True), (0.02, False)):
        teacher = [expected[0] + shift, *expected[1:]]
        case, logits = case_of(student, tokens, [0, 1, 2], teacher, np.eye(3, 4))
        value, grad = whole(case, logits, merge=merge, divergence=divergence)
        assert (abs(float(value)) < 1e-7) == equal
        assert (float(grad.nan_to_num().abs().max()) < 1e-6) == equal
