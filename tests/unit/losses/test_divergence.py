"""Every divergence and every way to treat the mass outside a top-k: numbers and slopes."""

import pytest
import torch

from mopd.losses.divergence import Divergence
from mopd.losses.vocab import VocabShard
from mopd.projection import ProjectionShard
from tests.helpers.losses import build_loss, run_head
from tests.helpers.random_losses import V_S, problem

KINDS = ("forward_kl", "reverse_kl", "jsd", "mixed", "skew_kl", "skew_reverse_kl", "tvd")
P = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
Q = torch.tensor([[0.4, 0.4, 0.2]], dtype=torch.float64)
WIDE_P = torch.tensor([[0.6, 0.25, 0.1, 0.05]], dtype=torch.float64)
WIDE_Q = torch.tensor([[0.4, 0.3, 0.05, 0.25]], dtype=torch.float64)


def value(divergence, teacher=P, student=Q):
    return float(divergence.bins(teacher, student)[0].sum())


def on_support(divergence, student=WIDE_Q, teacher=WIDE_P):
    """The first two bins listed, the others outside."""
    found, *slopes = divergence.support(
        teacher[:, :2],
        student[:, :2],
        teacher_rest=teacher[:, 2:].sum(1, keepdim=True),
        student_rest=student[:, 2:].sum(1, keepdim=True),
    )
    return float(found), slopes


@pytest.mark.parametrize(
    ("divergence", "expected"),
    [
        (Divergence(kind="forward_kl"), 0.0252672),
        (Divergence(kind="reverse_kl"), 0.0258154),
        (Divergence(kind="mixed", weight=0.25), 0.25 * 0.0252672 + 0.75 * 0.0258154),
        (Divergence(kind="skew_kl", skew=0.1), 0.0205162),
        (Divergence(kind="skew_reverse_kl", skew=0.1), 0.0207806),
        (Divergence(kind="tvd"), 0.1),
    ],
)
def test_numbers_1_6(divergence, expected):
    assert value(divergence) == pytest.approx(expected, abs=5e-8)


def test_skew_tends_to_kl_6():
    assert value(Divergence(kind="skew_kl", skew=1e-9)) == pytest.approx(0.0252672, abs=1e-7)
    found = value(Divergence(kind="skew_reverse_kl", skew=1e-9))
    assert found == pytest.approx(0.0258154, abs=1e-7)


def test_akl_weighs_head_and_tail():
    # ascending .2, .3, .5: the tail up to .5 is the last two bins, gaps .1 there and .1 in the head
    middle = (0.0252672 + 0.0258154) / 2
    assert value(Divergence(kind="akl", alpha=0.5)) == pytest.approx(middle, abs=1e-7)
    # a tail of the smallest bin only: no gap there, so forward KL alone
    assert value(Divergence(kind="akl", alpha=0.2)) == pytest.approx(0.0252672, abs=1e-7)
    assert value(Divergence(kind="akl"), P, P) == 0.0


def test_the_weights_of_akl_are_constants_of_its_slope():
    _, slope = Divergence(kind="akl", alpha=0.5).bins(P, Q)
    _, mixed = Divergence(kind="mixed", weight=0.5).bins(P, Q)
    torch.testing.assert_close(slope, mixed)


@pytest.mark.parametrize(
    ("mode", "forward", "reverse"),
    [
        ("tail", 0.0937266, 0.1004546),
        ("renorm", 0.0384307, 0.0405995),
        ("genkl", 0.0476987, 0.0425104),
    ],
)
def test_modes_9(mode, forward, reverse):
    for kind, expected in (("forward_kl", forward), ("reverse_kl", reverse)):
        found, _ = on_support(Divergence(kind=kind, top_k_mode=mode))
        assert found == pytest.approx(expected, abs=5e-8)


def test_trunc_may_be_negative_10():
    student = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)
    found, _ = on_support(Divergence(kind="forward_kl", top_k_mode="trunc"), student)
    assert found == pytest.approx(0.197699, abs=1e-6)
    found, _ = on_support(Divergence(kind="reverse_kl", top_k_mode="trunc"), student)
    assert found == pytest.approx(-0.107490, abs=1e-6)


def gradient(slopes, student):
    slope = torch.cat([slopes[0], slopes[1].expand(1, 2)], dim=1)
    return student * (slope - (student * slope).sum(1, keepdim=True))


def test_equal_models_ask_for_nothing_except_in_trunc_11():
    for mode in ("tail", "genkl", "renorm"):
        _, slopes = on_support(Divergence(kind="reverse_kl", top_k_mode=mode), WIDE_P)
        assert gradient(slopes, WIDE_P).abs().max() < 1e-15
    _, slopes = on_support(Divergence(kind="reverse_kl", top_k_mode="trunc"), WIDE_P)
    assert gradient(slopes, WIDE_P)[0].tolist() == pytest.approx([0.09, 0.0375, -0.085, -0.0425])


def test_renorm_of_one_token_teaches_nothing_12():
    one = torch.tensor([[0.5]], dtype=torch.float64)
    found, slope, rest = Divergence(kind="forward_kl", top_k_mode="renorm").support(
        one * 1.8, one, teacher_rest=one * 0.2, student_rest=one
    )
    assert float(found) == 0.0 and not slope.any() and not rest.any()


def cases():
    for kind in KINDS:
        for mode in ("tail", "renorm", "trunc"):
            yield Divergence(kind=kind, top_k_mode=mode, beta=0.3, weight=0.3)
    for kind in ("forward_kl", "reverse_kl"):
        yield Divergence(kind=kind, top_k_mode="genkl")


@pytest.mark.parametrize("divergence", list(cases()), ids=lambda d: f"{d.kind}-{d.top_k_mode}")
@pytest.mark.parametrize("name", ["kl", "ctkd", "gold"])
def test_slopes_are_derivatives_13(name, divergence):
    case = problem(31, same_vocabulary=name == "kl")
    projection = ProjectionShard(case.projection, start=0, end=V_S, device=torch.device("cpu"))
    loss = build_loss(name, projection, divergence=divergence, temperature=1.7)

    def run(logits):
        shard = VocabShard(start=0, size=V_S, vocab_size=V_S)
        return run_head(loss, logits, case.rows, shard=shard, projection=projection)

    _, grad = run(case.logits)
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(case.logits.shape, generator=generator, dtype=torch.float64)
    step = 1e-6 * direction
    numeric = (run(case.logits + step)[0] - run(case.logits - step)[0]) / 2e-6
    assert float((grad * direction).sum()) == pytest.approx(float(numeric), rel=2e-5, abs=1e-6)
