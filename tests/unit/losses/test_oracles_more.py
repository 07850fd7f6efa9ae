"""What must not matter to a loss, and identities between losses (docs/losses.md, oracles)."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mopd.losses.cross_entropy import cross_entropy
from mopd.losses.divergence import Divergence
from mopd.losses.source import LogitsSource
from mopd.losses.vocab import VocabShard
from tests.helpers.losses import build_loss, make_projection, make_rows, run_head, step_of
from tests.helpers.oracles import KINDS, dense, random_rows, run, run_kl, same
from tests.helpers.random_losses import V_S, V_T, N, problem, whole_rows

LOSSES = [
    ("kl", {"beta": 1.0}),
    ("kl", {"divergence": Divergence(kind="forward_kl", top_k_mode="renorm")}),
    ("ctkd", {"beta": 0.3, "lambda_chunk": 0.7}),
    ("gold", {"lambda_chunk": 0.3}),
    ("gold", {"beta": 1.0, "top_u": 4}),
]


def test_jsd_tends_to_both_kls_and_itself_to_nothing_3():
    p, q = torch.tensor([[[0.5, 0.3, 0.2]], [[0.4, 0.4, 0.2]]], dtype=torch.float64)

    def value(beta):
        return float(Divergence(kind="jsd", beta=beta).bins(p, q)[0].sum())

    assert value(1e-3) / 1e-3 == pytest.approx(0.02524215, abs=5e-9)
    assert value(1 - 1e-3) / 1e-3 == pytest.approx(0.02578874, abs=5e-9)
    assert value(1e-7) / 1e-7 == pytest.approx(0.0252672, abs=1e-7)
    assert value(1 - 1e-7) / 1e-7 == pytest.approx(0.0258154, abs=1e-7)
    assert 0.0 < value(1e-7) < 1e-8


def test_jsd_is_symmetric_and_bounded_4():
    generator = np.random.default_rng(0)
    for beta in (0.01, 0.3, 0.5, 0.8):
        p, q = torch.as_tensor(generator.dirichlet(np.full(6, 0.1), size=(2, 200)))
        found = Divergence(kind="jsd", beta=beta).bins(p, q)[0].sum(1)
        other = Divergence(kind="jsd", beta=1 - beta).bins(q, p)[0].sum(1)
        torch.testing.assert_close(found, other, rtol=1e-10, atol=1e-12)
        entropy = -beta * np.log(beta) - (1 - beta) * np.log(1 - beta)
        assert found.min() >= -1e-12 and found.max() <= entropy + 1e-12


@pytest.mark.parametrize(("tau", "expected"), [(1.0, 0.245251), (2.0, 0.0568972), (4.0, 0.0133044)])
def test_temperature_7(tau, expected):
    """Listed rows come tempered, whole rows do not; the square of the temperature is an option."""
    student = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64)
    teacher = np.array([[1.0, 1.5, 0.0]])
    listed = make_rows([0], np.arange(3)[None], np.exp(teacher / tau) / np.exp(teacher / tau).sum())
    whole = replace(listed, topk_ids=None, topk_logprobs=teacher)
    for rows in (listed, whole):
        loss = replace(build_loss("kl", None, beta=0.0, temperature=tau), value_scale=1.0)
        shard = VocabShard(start=0, size=3, vocab_size=3)
        value, _ = run_head(loss, student, rows, shard=shard, projection=None)
        assert float(value) == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize(("name", "options"), LOSSES)
def test_a_constant_in_the_students_logits_8(name, options):
    case = problem(1, same_vocabulary=name == "kl")
    moved = case.logits + torch.linspace(-9.0, 30.0, N, dtype=torch.float64)[:, None]
    expected = run(name, case.logits, case.rows, case.projection, **options)
    same(run(name, moved, case.rows, case.projection, **options), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_in_both_whole_rows_8(kind):
    case = whole_rows(2)
    shift = np.linspace(-5.0, 9.0, len(case.rows.position))[:, None]
    rows = replace(case.rows, topk_logprobs=case.rows.topk_logprobs + shift)
    moved = case.logits + torch.linspace(-9.0, 30.0, N, dtype=torch.float64)[:, None]
    same(run_kl(moved, rows, kind), run_kl(case.logits, case.rows, kind))


def renamed(case, order, *, same_vocabulary):
    """Student token s becomes ``order[s]``."""
    rows, projection = case.rows, case.projection
    logits, weights = torch.empty_like(case.logits), np.empty((V_S, V_T + 1))
    logits[:, order] = case.logits
    weights[order] = dense(projection)
    common = np.where(projection.common >= 0, order[projection.common], -1)
    trie = replace(
        projection.trie,
        member_token=order[projection.trie.member_token].astype(np.int32),
        stop_token=np.where(projection.trie.stop_token >= 0, order[projection.trie.stop_token], -1),
    )
    entry = rows.path_entry
    rows = replace(
        rows,
        token_id=order[rows.token_id],
        path_entry=np.where(entry < 0, -1 - order[np.maximum(-1 - entry, 0)], entry),
    )
    if same_vocabulary:
        rows = replace(rows, topk_ids=np.where(rows.topk_ids >= 0, order[rows.topk_ids], -1))
    projection = replace(make_projection(weights, common=common), trie=trie)
    return logits, rows, projection


@pytest.mark.parametrize(("name", "options"), LOSSES)
def test_another_order_of_the_vocabulary_8(name, options):
    case = problem(3, same_vocabulary=name == "kl")
    order = np.random.default_rng(3).permutation(V_S)
    value, grad = run(name, case.logits, case.rows, case.projection, **options)
    moved = run(name, *renamed(case, order, same_vocabulary=name == "kl"), **options)
    same((moved[0], moved[1][:, order]), (value, grad))


@pytest.mark.parametrize(("name", "options"), LOSSES)
def test_tokens_that_neither_side_writes_8(name, options):
    """Columns of -inf at the end, inside the vocabulary: they map to null and are not common."""
    case = problem(4, same_vocabulary=name == "kl")
    value, grad = run(name, case.logits, case.rows, case.projection, **options)
    wide = torch.cat([case.logits, torch.full((N, 3), -torch.inf)], dim=1)
    null = np.eye(V_T + 1)[[V_T] * 3]
    weights = np.concatenate([dense(case.projection), null])
    projection = replace(
        make_projection(weights, common=case.projection.common), trie=case.projection.trie
    )
    found = run(name, wide, case.rows, projection, **options)
    same((found[0], found[1][:, :V_S]), (value, grad))
    assert not found[1][:, V_S:].any()


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_modes_agree_on_the_whole_vocabulary_9(kind):
    logits, teacher = random_rows(7)
    rows = make_rows([0, 1, 2, 3], np.tile(np.arange(7), (4, 1)), teacher)
    rows = replace(rows, log_tail=np.full(4, -np.inf))
    whole = replace(rows, topk_ids=None)
    expected = run_kl(logits, whole, kind)
    for mode in ("tail", "renorm", "trunc", "genkl"):
        if (kind, mode) != ("jsd", "genkl"):
            same(run_kl(logits, rows, kind, top_k_mode=mode), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_bins_never_say_more_than_rows_9(kind):
    logits, teacher = random_rows(12, 60, seed=1)
    order = np.argsort(-teacher, axis=1)
    at = list(range(60))
    full = make_rows(at, order, np.take_along_axis(teacher, order, axis=1))
    exact = float(run_kl(logits, full, kind)[0])
    before = 0.0
    for k in (1, 3, 8):
        rows = make_rows(at, order[:, :k], np.take_along_axis(teacher, order[:, :k], axis=1))
        value = float(run_kl(logits, rows, kind)[0])
        assert before < value < exact
        before = value


def test_one_renormalised_token_through_the_head_12():
    logits, teacher = random_rows(5)
    rows = make_rows([0, 1, 2, 3], np.zeros((4, 1)), teacher[:, :1])
    value, grad = run_kl(logits, rows, "forward_kl", top_k_mode="renorm")
    assert float(value) == 0.0 and not grad.any()
    p, q = teacher[:, 0], torch.softmax(logits, -1)[:, 0].numpy()
    binary = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    assert float(run_kl(logits, rows, "forward_kl")[0]) == pytest.approx(binary.sum())


def test_the_tails_gradient_13():
    logits, teacher = random_rows(9)
    rows = make_rows([0, 1, 2, 3], np.tile([1, 4, 6], (4, 1)), teacher[:, [1, 4, 6]])
    _, grad = run_kl(logits, rows, "forward_kl")
    q = torch.softmax(logits, -1).numpy()
    outside = [0, 2, 3, 5, 7, 8]
    share = (1 - teacher[:, [1, 4, 6]].sum(1)) / q[:, outside].sum(1)
    expected = q - teacher
    expected[:, outside] = q[:, outside] * (1 - share[:, None])
    assert grad.numpy() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("whole", [True, False])
def test_a_one_hot_teacher_is_the_cross_entropy_14(whole):
    logits, _ = random_rows(8, 6)
    micro, _ = step_of(make_rows([0], np.zeros((1, 1)), np.ones((1, 1))), 6)
    micro.tokens[0], micro.response_mask[0, -1] = [2, 5, 0, 7, 7, 1], False
    shard = VocabShard(start=0, size=8, vocab_size=8)
    source = LogitsSource(logits, shard)
    value = cross_entropy(source, micro, shard, scale=1.0, block_rows=4)
    actual = micro.tokens[0, 1:, None]
    rows = make_rows(list(range(5)), actual, np.ones((5, 1)))
    if whole:
        every = np.full((5, 8), -np.inf)
        np.put_along_axis(every, actual, 0.0, axis=1)
        rows = replace(rows, topk_ids=None, topk_logprobs=every)
    same(run_kl(logits, rows, "forward_kl"), (value, source.finish()), tolerance=1e-12)


@pytest.mark.parametrize(("name", "options"), LOSSES)
@pytest.mark.parametrize("filling", [torch.inf, -torch.inf, torch.nan, 1e4])
def test_masked_rows_may_hold_anything_18(name, options, filling):
    case = problem(5, same_vocabulary=name == "kl")
    judged = np.union1d(case.rows.position, case.rows.token_position)
    logits = torch.cat([case.logits, case.logits[:3]])
    logits[N:] = filling
    expected = run(name, case.logits, case.rows, case.projection, **options)
    value, grad = run(name, logits, case.rows, case.projection, **options)
    same((value, grad[:N]), expected)
    assert len(judged) == N and not grad[N:].any()


@pytest.mark.parametrize(("name", "options"), LOSSES)
def test_bfloat16_logits_19(name, options):
    case = problem(6, same_vocabulary=name == "kl")
    exact = run(name, case.logits.float(), case.rows, case.projection, **options)
    rounded = run(name, case.logits.bfloat16(), case.rows, case.projection, **options)
    assert rounded[0].dtype == torch.float32 and rounded[1].dtype == torch.bfloat16
    assert float(rounded[0]) == pytest.approx(float(exact[0]), rel=0.02)
    gap = (rounded[1].float() - exact[1]).abs().max()
    assert gap < 0.02 * exact[1].abs().max()


@pytest.mark.parametrize("mode", ["tail", "renorm", "trunc", "genkl"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["kl", "ctkd", "gold"])
def test_a_payload_that_adds_up_to_more_than_1_19(name, kind, mode):
    """Rounded log-probabilities may: nothing is left for the tail then."""
    if mode == "genkl" and kind not in ("forward_kl", "reverse_kl"):
        return
    case = problem(7, same_vocabulary=name == "kl")
    probs = np.exp(case.rows.topk_logprobs)
    probs *= 1.0005 / probs.sum(1, keepdims=True)
    with np.errstate(divide="ignore"):
        rows = replace(
            case.rows,
            topk_logprobs=np.log(probs),
            log_tail=np.full(len(probs), -np.inf),
        )
    divergence = Divergence(kind=kind, top_k_mode=mode)
    for logits in (case.logits, case.logits.float(), case.logits.bfloat16()):
        value, grad = run(name, logits, rows, case.projection, divergence=divergence)
        assert torch.isfinite(value) and torch.isfinite(grad).all()


@pytest.mark.parametrize(("name", "options"), LOSSES)
@pytest.mark.parametrize("block_size", [1, 7, N])
def test_block_sizes_20(name, options, block_size):
    case = problem(8, same_vocabulary=name == "kl")
    whole = run(name, case.logits, case.rows, case.projection, **options)
    cut = run(name, case.logits, case.rows, case.projection, block_size=block_size, **options)
    same(cut, whole, tolerance=1e-12)
