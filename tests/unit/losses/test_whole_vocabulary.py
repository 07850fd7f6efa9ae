"""KL on a teacher's whole rows, on all tokens or on those that the student or both find likely."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mopd.losses.divergence import Divergence
from mopd.losses.vocab import VocabShard
from tests.helpers.losses import build_loss, run_head
from tests.helpers.random_losses import V_S, N, problem, whole_rows

SHARD = VocabShard(start=0, size=V_S, vocab_size=V_S)
KINDS = ("forward_kl", "reverse_kl", "jsd", "mixed", "skew_kl", "skew_reverse_kl", "tvd")
TEMPERATURE = 1.7


def textbook(kind, p, q, *, beta=0.3, weight=0.5, skew=0.1):
    """Rows [r] of a divergence, from its definition; p may hold zeros."""

    def kl(a, b):
        inner = a * (a.clamp_min(1e-30).log() - b.clamp_min(1e-30).log())
        return torch.where(a > 0, inner, 0.0).sum(-1)

    match kind:
        case "forward_kl":
            return kl(p, q)
        case "reverse_kl":
            return kl(q, p)
        case "jsd":
            m = beta * p + (1 - beta) * q
            return beta * kl(p, m) + (1 - beta) * kl(q, m)
        case "mixed":
            return weight * kl(p, q) + (1 - weight) * kl(q, p)
        case "skew_kl":
            return kl(p, skew * p + (1 - skew) * q)
        case "skew_reverse_kl":
            return kl(q, skew * q + (1 - skew) * p)
        case "tvd":
            return 0.5 * (p - q).abs().sum(-1)


def dense(logits, case, kind, choose=None):
    """``choose(p, q)`` -> ids of each row; None: all tokens. The rest is one bin."""
    rows = case.rows
    q = torch.softmax(logits[rows.position] / TEMPERATURE, -1)
    p = torch.softmax(torch.as_tensor(rows.topk_logprobs) / TEMPERATURE, -1)
    weight = torch.as_tensor(rows.row_weight)
    if choose is None:
        return (weight * textbook(kind, p, q)).sum() * TEMPERATURE**2
    total = logits.new_zeros(())
    for r in range(len(p)):
        ids = choose(p[r], q[r].detach())

        def binned(x, ids=ids):
            return torch.cat([x[ids], (1 - x[ids].sum())[None]])

        total = total + weight[r] * textbook(kind, binned(p[r])[None], binned(q[r])[None])[0]
    return total * TEMPERATURE**2


def check(loss, case, function, block_size=512):
    value, grad = run_head(
        loss, case.logits, case.rows, shard=SHARD, projection=None, block_size=block_size
    )
    leaf = case.logits.clone().requires_grad_()
    expected = function(leaf)
    expected.backward()
    torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grad, leaf.grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("block_size", [1, 7, N])
@pytest.mark.parametrize("kind", KINDS)
def test_all_tokens(kind, block_size):
    case = whole_rows(5)
    loss = build_loss("kl", None, divergence=Divergence(kind=kind, beta=0.3), temperature=1.7)
    check(loss, case, lambda z: dense(z, case, kind), block_size)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("support", ["student", "union"])
def test_the_students_likeliest_tokens(support, kind):
    case = whole_rows(6)
    loss = build_loss(
        "kl",
        None,
        divergence=Divergence(kind=kind, beta=0.3),
        temperature=TEMPERATURE,
        support=support,
        support_top_k=4,
    )

    def choose(p, q):
        ids = set(q.topk(4).indices.tolist())
        if support == "union":
            ids |= set(p.topk(4).indices.tolist())
        return torch.tensor(sorted(ids))

    check(loss, case, lambda z: dense(z, case, kind, choose))


def test_listing_every_token_equals_whole_rows():
    case = whole_rows(7)
    logs = torch.log_softmax(torch.as_tensor(case.rows.topk_logprobs), -1).numpy()
    every = np.tile(np.arange(V_S, dtype=np.int32), (len(logs), 1))
    listed = replace(case.rows, topk_ids=every, topk_logprobs=logs)
    shared = replace(case.rows, topk_ids=np.arange(V_S, dtype=np.int32), topk_logprobs=logs)
    loss = build_loss("kl", None, beta=0.4)
    wanted = run_head(loss, case.logits, case.rows, shard=SHARD, projection=None)
    for rows in (listed, shared):
        found = run_head(loss, case.logits, rows, shard=SHARD, projection=None)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_an_equal_teacher_asks_for_nothing():
    case = whole_rows(8)
    own = case.logits[case.rows.position].numpy() + 3.0  # a constant per row says nothing
    rows = replace(case.rows, topk_logprobs=own)
    for kind in KINDS:
        loss = build_loss("kl", None, divergence=Divergence(kind=kind))
        value, grad = run_head(loss, case.logits, rows, shard=SHARD, projection=None)
        assert abs(float(value)) < 1e-12
        if kind != "tvd":  # its slope is a sign, which rounding sets
            assert float(grad.abs().max()) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_that_neither_side_writes_counts_nothing(kind):
    case = whole_rows(10)
    loss = build_loss("kl", None, divergence=Divergence(kind=kind))
    teacher = case.rows.topk_logprobs.copy()
    teacher[:, 6] = -np.inf
    logits = case.logits.clone()
    logits[:, 6] = -torch.inf
    value, grad = run_head(
        loss, logits, replace(case.rows, topk_logprobs=teacher), shard=SHARD, projection=None
    )
    keep = [i for i in range(V_S) if i != 6]
    fewer = replace(case.rows, topk_logprobs=teacher[:, keep])
    without = VocabShard(start=0, size=V_S - 1, vocab_size=V_S - 1)
    wanted, slope = run_head(loss, logits[:, keep], fewer, shard=without, projection=None)
    torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad[:, keep], slope, rtol=1e-12, atol=1e-12)
    assert not grad[:, 6].any()


def test_a_nan_in_a_trained_row_surfaces_and_one_elsewhere_does_not():
    case = whole_rows(9)
    loss = build_loss("kl", None, beta=0.0)
    untouched = [i for i in range(N) if i not in case.rows.position]
    logits = case.logits.clone()
    logits[untouched] = torch.nan
    value, grad = run_head(loss, logits, case.rows, shard=SHARD, projection=None)
    assert torch.isfinite(value)
    assert torch.isfinite(grad).all()
    assert not grad[untouched].any()
    logits[case.rows.position[1], 2] = torch.nan
    value, _ = run_head(loss, logits, case.rows, shard=SHARD, projection=None)
    assert torch.isnan(value)


def test_float32_keeps_five_digits_on_a_large_vocabulary():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 60_000, generator=generator) * 2.0
    logits[torch.arange(4), torch.randint(60_000, (4,), generator=generator)] += 14.0
    teacher = logits + torch.randn(logits.shape, generator=generator)
    case = problem(0, same_vocabulary=True)
    rows = replace(
        case.rows,
        **{
            name: getattr(case.rows, name)[:4]
            for name in ("row_weight", "log_tail", "chunk_logprob", "chunk_size")
        },
        position=np.arange(4),
        topk_ids=None,
        topk_logprobs=teacher.numpy(),
    )
    shard = VocabShard(start=0, size=60_000, vocab_size=60_000)
    for beta in (0.0, 0.5, 1.0):
        loss = build_loss("kl", None, beta=beta)
        value, grad = run_head(loss, logits, rows, shard=shard, projection=None)
        exact, slope = run_head(loss, logits.double(), rows, shard=shard, projection=None)
        assert float(value) == pytest.approx(float(exact), rel=1e-5)
        assert float((grad - slope).abs().max()) < 1e-5 * float(slope.abs().max())


def test_a_listed_teacher_cannot_be_asked_for_the_students_support():
    case = problem(0, same_vocabulary=True)
    loss = build_loss("kl", None, support="student")
    with pytest.raises(ValueError, match="whole vocabulary"):
        run_head(loss, case.logits, case.rows, shard=SHARD, projection=None)
