"""What must not matter to a loss, and identities between losses (docs/losses.md, oracles)."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mopd.losses.cross_entropy import cross_entropy
from mopd.losses.divergence import Divergence
from mopd.losses.head import DistillationHead, TeacherTerm
from mopd.losses.source import LogitsSource
from mopd.losses.vocab import VocabShard
from mopd.projection import ProjectionShard
from tests.helpers.losses import build_loss, make_projection, make_rows, run_head, step_of
from tests.helpers.random_losses import V_S, V_T, N, problem, whole_rows

CPU = torch.device("cpu")
KINDS = ("forward_kl", "reverse_kl", "jsd", "mixed", "skew_kl", "skew_reverse_kl", "tvd")
LOSSES = [
    ("kl", {"beta": 1.0}),
    ("kl", {"divergence": Divergence(kind="forward_kl", top_k_mode="renorm")}),
    ("ctkd", {"beta": 0.3, "lambda_chunk": 0.7}),
    ("gold", {"lambda_chunk": 0.3}),
    ("gold", {"beta": 1.0, "top_u": 4}),
]


def run(name, logits, rows, projection, *, block_size=512, **options):
    size = logits.shape[1]
    local = ProjectionShard(projection, start=0, end=size, device=CPU)
    return run_head(
        build_loss(name, local, **options),
        logits,
        rows,
        shard=VocabShard(start=0, size=size, vocab_size=size),
        projection=local,
        block_size=block_size,
    )


def run_kl(logits, rows, kind, **options):
    return run(
        "kl", logits, rows, problem().projection, divergence=Divergence(kind=kind, **options)
    )


def same(found, expected, *, tolerance=1e-10):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def dense(projection):
    weights = np.zeros((projection.student_size, projection.teacher_size + 1))
    row = np.repeat(np.arange(projection.student_size), np.diff(projection.crow))
    weights[row, projection.col] = projection.val
    return weights


def random_rows(size, count=4, *, seed=0):
    """Student logits and teacher probabilities [count, size]."""
    generator = np.random.default_rng(seed)
    logits = torch.as_tensor(generator.normal(size=(count, size)) * 2.0)
    return logits, generator.dirichlet(np.ones(size), size=count)


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
