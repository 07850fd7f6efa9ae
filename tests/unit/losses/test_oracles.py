"""Numbers worked out by hand (docs/losses.md, oracles): they pin conventions, not only code."""

import numpy as np
import pytest
import torch

from mopd.losses.divergence import Divergence
from mopd.losses.vocab import VocabShard
from mopd.projection import ProjectionShard
from tests.helpers.losses import build_loss, make_projection, make_rows, run_head

CPU = torch.device("cpu")
P = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
Q = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)


def one_row(name, logits, ids, probs, matrix, *, paths=None, nodes=None, **options):
    """Value and gradient of one boundary row; teacher probabilities of the listed ids."""
    projection = make_projection(
        np.asarray(matrix, dtype=float), nodes=nodes, common=options.pop("common", None)
    )
    size = len(logits)
    shard = ProjectionShard(projection, start=0, end=size, device=CPU)
    rows = make_rows([0], np.array([ids]), np.array([probs]), paths=paths)
    value, grad = run_head(
        build_loss(name, shard, **options),
        torch.as_tensor(logits, dtype=torch.float64)[None],
        rows,
        shard=VocabShard(start=0, size=size, vocab_size=size),
        projection=shard,
    )
    return float(value), grad[0].numpy()


def bin_divergence(teacher, student, beta):
    value, slope = Divergence(kind="jsd", beta=beta).bins(teacher[None], student[None])
    return value[0], slope[0]


def identity(size):
    return np.eye(size, size + 1)


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        (0.0, 0.0252672),
        (1.0, 0.0258154),
        (0.1, 0.00227669),
        (0.25, 0.00475327),
        (0.5, 0.00636717),
        (0.75, 0.00480426),
        (0.9, 0.00231601),
    ],
)
def test_divergences_1_2(beta, expected):
    assert float(bin_divergence(P, Q, beta)[0].sum()) == pytest.approx(expected, abs=5e-8)


def test_limits_of_the_jsd_are_not_its_ends_3():
    assert float(bin_divergence(P, Q, 1e-3)[0].sum()) / 1e-3 == pytest.approx(0.02524215, abs=1e-6)
    assert float(bin_divergence(P, Q, 0.999)[0].sum()) / 1e-3 == pytest.approx(0.02578874, abs=1e-6)


def test_jsd_symmetry_and_bound_4():
    for beta in (0.1, 0.4):
        one = bin_divergence(P, Q, beta)[0].sum()
        other = bin_divergence(Q, P, 1 - beta)[0].sum()
        assert float(one) == pytest.approx(float(other), abs=1e-12)
    apart = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert float(bin_divergence(*apart, 0.5)[0].sum()) == pytest.approx(0.693147, abs=1e-6)
    assert float(bin_divergence(*apart, 0.1)[0].sum()) == pytest.approx(0.325083, abs=1e-6)


@pytest.mark.parametrize(
    ("beta", "expected"),
    [(1.0, [-0.0995836, 0.1047467, -0.0051631]), (0.0, [-0.1, 0.1, 0.0])],
)
def test_gradients_5(beta, expected):
    _, grad = one_row("kl", np.log(Q.numpy()), [0, 1, 2], P.numpy(), identity(3), beta=beta)
    assert grad == pytest.approx(expected, abs=5e-8)
    assert grad.sum() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(("tau", "expected"), [(1, 0.245251), (2, 0.227589), (4, 0.212872)])
def test_temperature_squared_7(tau, expected):
    teacher = np.exp(np.array([1.0, 1.5, 0.0]) / tau)
    value, _ = one_row(
        "kl",
        [2.0, 1.0, 0.0],
        [0, 1, 2],
        teacher / teacher.sum(),
        identity(3),
        beta=0.0,
        temperature=float(tau),
    )
    assert value == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(
    ("beta", "full", "tail"), [(0.0, 0.1865415, 0.0937266), (1.0, 0.2602125, 0.1004546)]
)
def test_tail_is_a_lower_bound_9(beta, full, tail):
    teacher, student = np.array([0.6, 0.25, 0.1, 0.05]), np.log([0.4, 0.3, 0.05, 0.25])
    for name in ("kl", "ctkd"):
        whole, _ = one_row(name, student, [0, 1, 2, 3], teacher, identity(4), beta=beta)
        cut, _ = one_row(name, student, [0, 1], teacher[:2], identity(4), beta=beta)
        assert whole == pytest.approx(full, abs=5e-8)
        assert cut == pytest.approx(tail, abs=5e-8)


def test_top_1_still_teaches_12():
    value, grad = one_row("kl", np.log([0.5, 0.5]), [0], [0.9], identity(2), beta=0.0)
    assert value == pytest.approx(0.9 * np.log(1.8) + 0.1 * np.log(0.2), abs=1e-12)
    assert abs(grad).max() > 0.1


def test_one_hot_teacher_is_cross_entropy_14():
    logits = np.array([0.3, -1.0, 2.0])
    value, grad = one_row("kl", logits, [1, 0, 2], [1.0, 0.0, 0.0], identity(3), beta=0.0)
    probs = np.exp(logits) / np.exp(logits).sum()
    assert value == pytest.approx(-np.log(probs[1]), abs=1e-12)
    assert grad == pytest.approx(probs - np.eye(3)[1], abs=1e-12)


# students 2, 0, 1, 201, x; teachers 2, 0, 1, y; 201 is spelled 2, 0, 1 with gamma = .1
SMEARED = np.zeros((5, 5))
SMEARED[0, 0] = SMEARED[1, 1] = SMEARED[2, 2] = SMEARED[4, 3] = 1.0
SMEARED[3, :3] = np.array([1.0, 0.1, 0.01]) / 1.11


def test_projected_kl_35():
    student = np.log([0.1, 0.2, 0.1, 0.5, 0.1])
    teacher = [0.6, 0.2, 0.1, 0.1]
    value, grad = one_row("ctkd", student, [0, 1, 2, 3], teacher, SMEARED)
    assert value == pytest.approx(0.00668469, abs=2e-8)
    assert grad == pytest.approx([-0.0090016, 0.0367647, 0.0043103, -0.0320734, 0.0], abs=2e-7)
    reverse, _ = one_row("ctkd", student, [0, 1, 2, 3], teacher, SMEARED, beta=1.0)
    assert reverse == pytest.approx(0.00693435, abs=1e-7)
    top_2, _ = one_row("ctkd", student, [0, 1], teacher[:2], SMEARED)
    assert top_2 == pytest.approx(0.00663616, abs=2e-8)


def test_data_processing_and_the_blind_fibre_36():
    generator = np.random.default_rng(0)
    for _ in range(20):
        weights = generator.dirichlet(np.ones(5), size=6)
        q, p = generator.dirichlet(np.ones(6)), generator.dirichlet(np.ones(6))
        value, _ = one_row("ctkd", np.log(q), [0, 1, 2, 3], (p @ weights)[:4], weights)
        assert -1e-9 <= value <= (p * np.log(p / q)).sum() + 1e-9
    same_rows = np.tile(generator.dirichlet(np.ones(4)), (2, 1))
    values = [
        one_row("ctkd", np.log(q), [0, 1, 2], [0.5, 0.2, 0.1], same_rows)[0]
        for q in ([0.3, 0.7], [0.9, 0.1])
    ]
    assert values[0] == pytest.approx(values[1], abs=1e-9)


def test_fold_moves_mass_to_the_first_piece_38():
    # students 2, 0, 1, x; teachers 2, 201, y: the teacher says 99 % "begins with 2"
    weights = np.zeros((4, 4))
    weights[0, 0] = weights[1:, 3] = 1.0
    student = np.log([0.9, 0.03, 0.03, 0.04])
    rest, grad = one_row("ctkd", student, [0], [0.04], weights)
    assert rest == pytest.approx(2.047, abs=1e-3)
    assert grad[0] == pytest.approx(0.86, abs=1e-6)
    folded, grad = one_row("ctkd", student, [0], [0.99], weights)
    assert folded == pytest.approx(0.071, abs=1e-3)
    assert grad[0] == pytest.approx(-0.09, abs=1e-6)


def test_suppression_is_balanced_by_the_rest_bin_41():
    # students a, m1, m2 with the last two common; teacher (.5, .2) on them, .3 elsewhere
    common = np.array([1, 2])
    _, grad = one_row(
        "gold",
        np.log([0.3, 0.4, 0.3]),
        [0, 1],
        [0.5, 0.2],
        np.array([[0, 0, 1.0], [1.0, 0, 0], [0, 1.0, 0]]),
        common=common,
        beta=0.0,
        weights=(1.0, 0.0),
    )
    assert grad == pytest.approx([0.0, -0.1, 0.1], abs=1e-9)


def test_sorted_l1_45_47():
    # students a, b, q; teachers b, a, r, s; nothing is common: pure ULD
    student, teacher = np.log([0.5, 0.3, 0.2]), [0.2, 0.6, 0.15, 0.05]
    weights = np.eye(3, 5)
    options = {"weights": (0.0, 1.0), "beta": 0.0}
    value, _ = one_row("gold", student, [0, 1, 2, 3], teacher, weights, **options)
    assert value == pytest.approx(0.30, abs=1e-9)
    shuffled, _ = one_row(
        "gold", student[::-1].copy(), [3, 1, 0, 2], [0.05, 0.6, 0.2, 0.15], weights, **options
    )
    assert shuffled == pytest.approx(value, abs=1e-9)
    # with a and b common: unmatched 0.10 for every beta
    common = np.array([1, 0, -1, -1])
    value, _ = one_row("gold", student, [0, 1, 2, 3], teacher, weights, common=common, **options)
    assert value == pytest.approx(0.10, abs=1e-9)


def test_uld_range_and_identity_47():
    # one-hot against uniform over 10 tokens: 2 (1 - 1/10)
    student = np.full(10, -60.0)
    student[3] = 0.0
    options = {"weights": (0.0, 1.0), "beta": 0.0}
    value, _ = one_row("gold", student, list(range(10)), [0.1] * 10, identity(10), **options)
    assert value == pytest.approx(1.8, abs=1e-9)


def test_all_common_gold_is_the_divergence_48():
    common = np.arange(3)
    value, _ = one_row(
        "gold",
        np.log(Q.numpy()),
        [0, 1, 2],
        P.numpy(),
        identity(3),
        common=common,
        weights=(1.0, 0.0),
    )
    assert value == pytest.approx(0.00636717, abs=5e-8)


def test_path_term_52_53():
    # students 1, 3, 13, x; teachers 1, 3, x. Node (1,): 13 goes on with 3; token 1 stops.
    weights = np.zeros((4, 4))
    weights[0, 0] = weights[1, 1] = weights[2, 0] = weights[3, 2] = 1.0
    student = np.log([0.5, 0.1, 0.3, 0.1])
    boundary, _ = one_row("ctkd", student, [0, 1, 2], [0.8, 0.1, 0.1], weights)
    assert boundary == pytest.approx(0.0, abs=1e-7)
    value, grad = one_row(
        "ctkd",
        student,
        [0, 1, 2],
        [0.8, 0.1, 0.1],
        weights,
        nodes={(0,): ({1: [2]}, 0)},
        paths=[(0, [0, -1], [0.9, 0.1], 1.0)],
    )
    assert value == pytest.approx(0.6046637, abs=1e-6)
    assert grad == pytest.approx([0.525, 0.0, -0.525, 0.0], abs=1e-6)


def test_path_term_vanishes_for_equal_models_53():
    # the teacher is the student written in pieces: R equals the student's own conditional
    student = np.array([0.1, 0.3, 0.5, 0.1])  # 3, 13, 12, x; no token 1 to stop at
    weights = np.zeros((4, 5))  # teachers 1, 2, 3, x
    weights[0, 2] = weights[1, 0] = weights[2, 0] = weights[3, 3] = 1.0
    value, grad = one_row(
        "ctkd",
        np.log(student),
        [0, 2, 3],
        [0.8, 0.1, 0.1],
        weights,
        nodes={(0,): ({1: [2], 2: [1]}, -1)},
        paths=[(0, [0, 1], [0.625, 0.375], 1.0)],
    )
    assert value == pytest.approx(0.0, abs=1e-7)
    assert grad == pytest.approx(np.zeros(4), abs=1e-7)
