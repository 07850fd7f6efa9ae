"""The policy gradient: a dense reference, the reverse KL it estimates, and numbers by hand."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from mopd.losses.divergence import Divergence
from mopd.losses.head import DistillationHead, TeacherTerm
from mopd.losses.kl import KlLoss
from mopd.losses.opd import BOUNDS, discounted, position_weights
from mopd.losses.vocab import VocabShard
from tests.helpers.losses import make_rows, run_head, step_of
from tests.helpers.random_losses import V_S
from tests.helpers.token_losses import (
    WHOLE,
    Sampled,
    build_opd,
    chunks_of,
    dense_opd,
    joined,
    run_tokens,
    sampled,
    token_rows,
)

P = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
Q = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
SHARES = torch.tensor([0.5, 0.5, 1.0], dtype=torch.float64)
OPTIONS = [
    {},
    {"importance": "icepop"},
    {"importance": "icepop", "max_advantage": 1.5, "discount": 0.7},
    {"importance": "tis", "bounds": (0.0, 1.2), "policy": "old"},
    {"importance": "tis", "discount": 1.0, "iw_gamma": 0.5},
    {"importance": "ppo", "bounds": (0.8, 1.2), "max_advantage": 2.0},
    {"importance": "sequence_mask", "bounds": (0.9, 1.5), "iw_gamma": 1.0},
    {"importance": "icepop", "sampling_temperature": 0.7},
    {"importance": "tis", "sampling_temperature": 1.4, "discount": 0.3, "max_advantage": 3.0},
]


def shard(size):
    return VocabShard(start=0, size=size, vocab_size=size)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("options", OPTIONS)
def test_equals_the_dense_reference(options, seed):
    loss = build_opd(**options)
    case = sampled(seed, temperature=loss.sampling_temperature)
    leaf = case.logits.clone().requires_grad_()
    expected, kl = dense_opd(leaf, case, loss)
    expected.backward()
    for block_size in (1, 7, len(case.logits)):  # chunks of two are cut by blocks of one row
        result, gradient = run_tokens(loss, case, block_size=block_size)
        torch.testing.assert_close(result.loss, expected.detach(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-10, atol=1e-10)
        assert float(result.kl) == pytest.approx(kl, abs=1e-10)


def test_the_options_above_reach_both_sides_of_every_gate():
    for options in OPTIONS:
        loss = build_opd(**options)
        if loss.importance == "none":
            continue
        cases = [sampled(seed, temperature=loss.sampling_temperature) for seed in range(4)]
        gated = sum(float(run_tokens(loss, case)[0].extra["gated"]) for case in cases)
        chunks = sum(len(case.sequence) for case in cases)
        assert 0.0 < gated < chunks


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_gradient_is_the_slope_of_the_surrogate(temperature):
    loss = build_opd(importance="tis", sampling_temperature=temperature)
    case = sampled(1, temperature=temperature)
    result, gradient = run_tokens(loss, case, scale=2.5)
    at, ids = case.rows.token_position, case.rows.token_id

    def surrogate(logits):
        logp = torch.log_softmax(logits / temperature, dim=-1)[at, ids]
        return float((result.token_grad * logp).sum())

    assert surrogate(case.logits) == pytest.approx(float(result.loss), abs=1e-12)
    step = 1e-6
    for row, column in [(0, 4), (0, 7), (3, 22), (5, 9), (8, 0)]:
        bump = torch.zeros_like(case.logits)
        bump[row, column] = step
        slope = (surrogate(case.logits + bump) - surrogate(case.logits - bump)) / (2 * step)
        assert float(gradient[row, column]) == pytest.approx(2.5 * slope, abs=1e-7)


def every_token(teacher, student, *, sampler=None):
    """One row per token of a vocabulary, weighed by the chance to sample it."""
    size, chance = len(student), student if sampler is None else sampler
    rows = token_rows([(y, y, y) for y in range(size)], torch.log(teacher).tolist())
    rows = replace(rows, chunk_weight=chance.numpy(), token_sampling_logprob=chance.log().numpy())
    return Sampled(torch.log(student).expand(size, -1).clone(), rows, np.arange(size))


def test_advantage_21():
    result, gradient = run_tokens(build_opd(), every_token(P, Q), shard=shard(3))
    advantage = -result.token_grad / Q
    assert advantage.tolist() == pytest.approx([0.2231436, -0.2876821, 0.0], abs=5e-8)
    expected = [-0.0995836, 0.1047467, -0.0051631]
    assert gradient.sum(dim=0).tolist() == pytest.approx(expected, abs=5e-8)
    assert float(result.kl) == pytest.approx(0.0258154, abs=5e-8)


@pytest.mark.parametrize("importance", ["none", "tis"])
def test_its_mean_is_the_gradient_of_the_reverse_kl(importance):
    generator = torch.Generator().manual_seed(3)
    teacher, student, other = (
        torch.softmax(torch.randn(6, generator=generator, dtype=torch.float64), dim=0)
        for _ in range(3)
    )
    # sampled by another policy, the ratio corrects for it; without one the policy is the sampler
    case = every_token(teacher, student, sampler=other if importance == "tis" else None)
    loss = build_opd(importance=importance, bounds=(0.0, 1e6))
    _, gradient = run_tokens(loss, case, shard=shard(6))
    kl = KlLoss(divergence=Divergence(kind="reverse_kl"), temperature=1.0, value_scale=1.0)
    rows = make_rows([0], np.arange(6)[None], teacher.numpy()[None])
    _, expected = run_head(kl, student.log()[None], rows, shard=shard(6), projection=None)
    torch.testing.assert_close(gradient.sum(dim=0), expected[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("as_chunks", [True, False])
def test_two_tokens_give_the_gradient_of_the_reverse_kl_of_pairs(as_chunks):
    """As one chunk of two tokens, or as two chunks with ``discount`` 1."""
    generator = torch.Generator().manual_seed(5)
    student, teacher = (
        torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2)
    )

    def pairs(logits):  # row 0 writes the first token, row 1 + y the token after y
        logp = torch.log_softmax(logits, dim=-1)
        return logp[0][:, None] + logp[1:]

    leaf = student.clone().requires_grad_()
    (pairs(leaf).exp() * (pairs(leaf) - pairs(teacher))).sum().backward()

    written = list(itertools.product(range(3), range(3)))
    row_of = torch.tensor([row for y, _ in written for row in (0, 1 + y)])
    tokens = [token for pair in written for token in pair]
    chance = pairs(student).exp().reshape(-1)
    judged = torch.log_softmax(teacher, dim=-1)[row_of, tokens]
    if as_chunks:
        teacher_logprob, chunk, sequence = judged.reshape(-1, 2).sum(1), np.arange(18) // 2, 1
    else:
        teacher_logprob, chunk, sequence = judged, np.arange(18), 2
    rows = token_rows(
        list(zip(range(18), tokens, chunk.tolist(), strict=True)), teacher_logprob.tolist()
    )
    rows = replace(rows, chunk_weight=chance.repeat_interleave(sequence).numpy())
    order = np.arange(9 * sequence) // sequence
    loss = build_opd(discount=0.0 if as_chunks else 1.0)
    _, gradient = run_tokens(loss, Sampled(student[row_of], rows, order), shard=shard(3))
    found = torch.zeros_like(student).index_add_(0, row_of, gradient)
    torch.testing.assert_close(found, leaf.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("importance", ["icepop", "tis", "ppo", "sequence_mask", "none"])
def test_a_teacher_like_the_student_teaches_nothing_22(importance):
    case = sampled(2)
    logp = torch.log_softmax(case.logits, dim=-1)[case.rows.token_position, case.rows.token_id]
    own = np.zeros(len(case.sequence))
    np.add.at(own, case.rows.token_chunk, logp.numpy())
    case = replace(case, rows=replace(case.rows, chunk_logprob=own))
    result, gradient = run_tokens(build_opd(importance=importance, discount=0.9), case)
    assert abs(float(result.loss)) < 1e-12
    assert abs(float(result.kl)) < 1e-12
    assert gradient.abs().max() < 1e-12


def one_by_one(ratios, advantages, **options):
    """The coupled step for 1-1 chunks of one sequence, sampled with log-probability 0."""
    log_pi = torch.log(torch.tensor(ratios, dtype=torch.float64))
    size = len(ratios)
    teacher = (log_pi + torch.tensor(advantages, dtype=torch.float64)).tolist()
    rows = token_rows([(t, 0, t) for t in range(size)], teacher)
    return joined(build_opd(**options), log_pi, rows, np.zeros(size, dtype=np.int64)), log_pi


def test_the_gate_and_the_clip_23():
    result, log_pi = one_by_one(
        [2.01, 2.0, 0.5, 0.49, 1.0],
        [1.0, 1.0, 1.0, 1.0, 9.0],
        importance="icepop",
        bounds=BOUNDS["icepop"],
        max_advantage=5,
    )
    assert (-result.token_grad).tolist() == pytest.approx([0.0, 2.0, 0.5, 0.0, 5.0])
    assert float(result.loss) == pytest.approx(float((result.token_grad * log_pi).sum()))
    assert float(result.extra["gated"]) == 2
    assert float(result.extra["ratio"]) == pytest.approx(6.0)
    assert float(result.extra["log_ratio"]) == pytest.approx(float(log_pi.abs().sum()))
    assert float(result.kl) == pytest.approx(-13.0)  # not clipped


def test_gated_tokens_count_in_the_length_of_a_sequence_23():
    case = sampled(0, noise=1.0)
    rows = case.rows
    lengths = np.bincount(case.sequence[rows.token_chunk])
    rows = replace(rows, chunk_weight=1.0 / lengths[case.sequence])
    loss = build_opd(importance="icepop")
    result, _ = run_tokens(loss, replace(case, rows=rows))
    assert float(result.extra["gated"]) > 0
    expected = 0.0
    for sequence in (0, 4):
        own = replace(rows, chunk_weight=(case.sequence == sequence).astype(float))
        total, _ = dense_opd(case.logits, replace(case, rows=own), loss)
        expected += float(total) / lengths[sequence]
    assert float(result.loss) == pytest.approx(expected, abs=1e-12)


def test_ppo_lets_go_only_in_the_direction_of_the_advantage():
    result, _ = one_by_one(
        [1.3, 1.3, 0.7, 0.7], [1.0, -1.0, 1.0, -1.0], importance="ppo", bounds=BOUNDS["ppo"]
    )
    assert (-result.token_grad).tolist() == pytest.approx([0.0, -1.3, 0.7, 0.0])


def test_sequence_mask_drops_whole_sequences():
    log_pi = torch.log(torch.tensor([2.0, 0.5, 1.01, 1.01], dtype=torch.float64))
    rows = token_rows([(t, 0, t) for t in range(4)], (log_pi + 1.0).tolist())
    loss = build_opd(importance="sequence_mask", bounds=BOUNDS["sequence_mask"])
    result = joined(loss, log_pi, rows, [3, 3, 7, 7])
    assert (-result.token_grad).tolist() == pytest.approx([2.0, 0.5, 0.0, 0.0])


@pytest.mark.parametrize(
    ("discount", "expected"),
    [(0.0, [1.0, -1.0, 2.0]), (1.0, [2.0, 1.0, 2.0]), (0.5, [1.0, 0.0, 2.0])],
)
def test_discount_24(discount, expected):
    result, _ = one_by_one([1.0] * 3, [1.0, -1.0, 2.0], discount=discount)
    assert (-result.token_grad).tolist() == pytest.approx(expected, abs=1e-12)


def test_position_weights_24():
    advantage = torch.tensor([1.0, -1.0, 2.0, 0.0, 0.0])
    run = torch.tensor([0, 0, 0, 1, 1])
    assert position_weights(advantage, run, 1.0).tolist() == [2.0, 1.75, 1.5, 2.0, 2.0]


@pytest.mark.parametrize("size", [1, 2, 3, 8, 21])
def test_discounted_sums_stay_inside_a_sequence(size):
    generator = torch.Generator().manual_seed(size)
    value = torch.randn(size, generator=generator, dtype=torch.float64)
    run = torch.sort(torch.randint(0, 3, (size,), generator=generator)).values
    expected = [
        sum(0.8 ** (j - k) * float(value[j]) for j in range(k, size) if run[j] == run[k])
        for k in range(size)
    ]
    assert discounted(value, run, 0.8).tolist() == pytest.approx(expected, abs=1e-12)


def test_every_token_of_a_chunk_gets_its_whole_advantage_25():
    log_pi = torch.tensor([-0.3, -0.5, -1.0], dtype=torch.float64)
    rows = token_rows([(0, 0, 0), (1, 0, 0), (2, 0, 1)], [-0.4, -1.1])
    result = joined(build_opd(), log_pi, rows, [0, 0])
    assert (-result.token_grad).tolist() == pytest.approx([0.4, 0.4, -0.1], abs=1e-12)
    # what is reported is a mean over the chunk's tokens
    assert float(result.extra["ratio"]) == pytest.approx(float(log_pi.exp() @ SHARES))
    gated = joined(build_opd(importance="icepop", bounds=(0.7, 2.0)), log_pi, rows, [0, 0])
    assert float(gated.extra["gated"]) == pytest.approx(1.5)  # one of two, and one of one
    # the limit grows with the chunk
    clipped = joined(build_opd(max_advantage=0.15), log_pi, rows, [0, 0])
    assert (-clipped.token_grad).tolist() == pytest.approx([0.3, 0.3, -0.1], abs=1e-12)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_head_drives_it(options):
    loss = build_opd(**options)
    case = sampled(3, temperature=loss.sampling_temperature)
    result, gradient = run_tokens(loss, case)
    rows = replace(case.rows, chunk_sequence=case.sequence)
    for block_size in (1, 512):
        value, found = run_head(
            loss, case.logits, rows, shard=WHOLE, projection=None, block_size=block_size
        )
        torch.testing.assert_close(value, result.loss)
        torch.testing.assert_close(found, gradient)


def test_the_head_reports_the_kl_and_what_the_gate_does():
    case = sampled(0, noise=1.0)
    loss = build_opd(importance="icepop")
    result, _ = run_tokens(loss, case)
    micro, batch = step_of(case.rows, len(case.logits))
    term = TeacherTerm(loss=loss, weight=1.0, projection=None)
    metrics = DistillationHead(terms={"t": term}, shard=WHOLE)(case.logits[None], micro, batch)
    found = {name: float(value) for name, value in metrics.metrics.items()}
    assert found == {
        "loss/t": float(result.loss),
        "kl/t": float(result.kl),
        **{f"{name}/t": float(value) for name, value in result.extra.items()},
    }


def test_padded_columns_do_not_count():
    loss = build_opd(importance="icepop", sampling_temperature=0.7)
    case = sampled(3, temperature=0.7)
    result, gradient = run_tokens(loss, case)
    padded = torch.cat([case.logits, torch.full((len(case.logits), 3), 50.0)], dim=1)
    wide = VocabShard(start=0, size=V_S + 3, vocab_size=V_S)
    other, found = run_tokens(loss, case, logits=padded, shard=wide)
    torch.testing.assert_close(other.loss, result.loss)
    torch.testing.assert_close(found[:, :V_S], gradient)
    assert not found[:, V_S:].any()


def test_rows_outside_the_chunks_do_not_count_18():
    case = sampled(0)
    kept = case.rows.token_chunk < 4
    rows = replace(
        case.rows,
        position=case.rows.position[:4],
        row_weight=case.rows.row_weight[:4],
        **{
            name: getattr(case.rows, name)[kept]
            for name in ("token_position", "token_id", "token_chunk", "token_sampling_logprob")
        },
        **{
            name: getattr(case.rows, name)[:4]
            for name in ("chunk_logprob", "chunk_size", "chunk_weight", "chunk_owned")
        },
    )
    case = Sampled(case.logits.clone(), rows, case.sequence[:4])
    case.logits[6:] = torch.inf
    result, gradient = run_tokens(build_opd(importance="icepop", discount=0.5), case)
    assert torch.isfinite(result.loss)
    assert torch.isfinite(gradient).all()
    assert not gradient[6:].any()


@pytest.mark.parametrize("importance", ["icepop", "tis", "ppo", "sequence_mask", "none"])
def test_a_nan_in_a_trained_row_surfaces_18(importance):
    case = sampled(0)
    case.logits[2, 5] = torch.nan
    result, gradient = run_tokens(build_opd(importance=importance), case)
    assert torch.isnan(result.loss)
    assert torch.isnan(gradient[2]).all()


def test_a_chunk_without_tokens_here_counts_for_its_owner_only():
    """A context-parallel rank may hold none of a chunk's tokens."""
    rows = token_rows([(0, 0, 0)], [-1.0])
    rows = replace(
        rows, **{n: getattr(rows, n)[:0] for n in ("token_position", "token_id", "token_chunk")}
    )
    rows = replace(rows, token_sampling_logprob=np.zeros(0), chunk_owned=np.array([False]))
    nothing = torch.zeros(0, dtype=torch.float64)
    result = build_opd(importance="sequence_mask", discount=0.5, iw_gamma=0.5).couple(
        nothing, torch.tensor([-0.5], dtype=torch.float64), chunks_of(rows, np.zeros(1, dtype=int))
    )
    assert (float(result.loss), float(result.kl), len(result.token_grad)) == (0.0, 0.0, 0)
    assert not any(float(value) for value in result.extra.values())


def test_a_ratio_beyond_all_bounds_stays_finite():
    log_pi = torch.tensor([0.0, -2000.0])
    rows = token_rows([(0, 0, 0), (1, 0, 1)], [0.0, 0.0])
    rows = replace(rows, token_sampling_logprob=np.array([-2000.0, 0.0]))
    loss = build_opd(importance="none", max_advantage=5.0)
    result = joined(loss, log_pi.double(), rows, [0, 0])
    assert float(result.extra["ratio"]) == pytest.approx(np.exp(20.0) + np.exp(-20.0))
    assert float(result.extra["log_ratio"]) == 4000.0


def test_old_log_probabilities_must_be_at_temperature_1():
    with pytest.raises(ValueError, match="use policy 'current'"):
        build_opd(policy="old", sampling_temperature=0.7)
