"""Every loss against a dense reference in fp64, value and gradient, and a gradient check."""

import dataclasses

import numpy as np
import pytest
import torch

from mopd.losses.chunk import binary_chunk_kl
from mopd.losses.vocab import VocabShard
from mopd.projection import ProjectionShard
from mopd.types import TeacherRows
from tests.helpers.losses import build_loss, dense_ctkd, divergence, run_head
from tests.helpers.random_losses import V_S, V_T, problem

CPU = torch.device("cpu")
SHARD = VocabShard(start=0, size=V_S, vocab_size=V_S)


def shard_of(case):
    return ProjectionShard(case.projection, start=0, end=V_S, device=CPU)


def autograd(function, logits):
    leaf = logits.clone().requires_grad_()
    value = function(leaf)
    value.backward()
    return value.detach(), leaf.grad


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_ctkd_equals_the_dense_reference(beta, temperature, seed):
    case = problem(seed)
    projection = shard_of(case)
    loss = build_loss("ctkd", projection, beta=beta, temperature=temperature)
    value, grad = run_head(loss, case.logits, case.rows, shard=SHARD, projection=projection)
    expected, slope = autograd(
        lambda z: dense_ctkd(z, case.rows, case.projection, beta=beta, temperature=temperature),
        case.logits,
    )
    # the projection is stored in float32: weights agree to 1e-7
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grad, slope, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_kl_equals_the_dense_reference(beta):
    case = problem(3, same_vocabulary=True)
    loss = build_loss("kl", shard_of(case), beta=beta, temperature=1.5)
    value, grad = run_head(loss, case.logits, case.rows, shard=SHARD, projection=None)

    def dense(logits):
        probs = torch.softmax(logits / 1.5, -1)
        total = logits.new_zeros(())
        for r, at in enumerate(case.rows.position):
            kept = case.rows.topk_ids[r] >= 0
            ids = torch.as_tensor(case.rows.topk_ids[r][kept].astype(np.int64))
            listed = torch.exp(torch.as_tensor(case.rows.topk_logprobs[r][kept]))
            tail = torch.exp(torch.as_tensor(case.rows.log_tail[r : r + 1]))
            inside = probs[at][ids]
            student = torch.cat([inside, (1 - inside.sum())[None]])
            total = total + divergence(torch.cat([listed, tail]), student, beta)
        return total * 1.5**2

    expected, slope = autograd(dense, case.logits)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grad, slope, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_gold_equals_the_dense_reference(beta, temperature):
    case = problem(4)
    projection = shard_of(case)
    loss = build_loss("gold", projection, beta=beta, temperature=temperature, weights=(0.4, 0.6))
    value, grad = run_head(loss, case.logits, case.rows, shard=SHARD, projection=None)

    def dense(logits):
        probs = torch.softmax(logits / temperature, -1)
        common = torch.as_tensor(case.projection.common.astype(np.int64))
        uncommon = torch.tensor([s for s in range(V_S) if s not in set(common.tolist())])
        total = logits.new_zeros(())
        for r, at in enumerate(case.rows.position):
            pairs = [
                (int(t), float(np.exp(p)))
                for t, p in zip(case.rows.topk_ids[r], case.rows.topk_logprobs[r], strict=True)
                if t >= 0
            ]
            tail = float(np.exp(case.rows.log_tail[r]))
            matched = [(int(common[t]), p) for t, p in pairs if common[t] >= 0]
            listed = [p for t, p in pairs if common[t] < 0]
            inside = probs[at][[s for s, _ in matched]]
            student = torch.cat([inside, (1 - inside.sum())[None]])
            bins = [*(p for _, p in matched), sum(listed) + tail]
            teacher = torch.tensor(bins, dtype=logits.dtype)
            total = total + 0.4 * divergence(teacher, student, beta)
            ours = torch.sort(probs[at][uncommon], descending=True).values
            theirs = torch.tensor(sorted([*listed, tail], reverse=True), dtype=logits.dtype)
            width = max(len(ours), len(theirs))
            pad = torch.nn.functional.pad
            gap = pad(ours, (0, width - len(ours))) - pad(theirs, (0, width - len(theirs)))
            total = total + 0.6 * gap.abs().sum()
        return total * temperature**2

    expected, slope = autograd(dense, case.logits)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(grad, slope, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["ctkd", "gold"])
def test_chunk_term_equals_the_chain_rule(name):
    case = problem(5)
    projection = shard_of(case)
    plain, with_chunks = (
        run_head(
            build_loss(name, projection, lambda_chunk=weight),
            case.logits,
            case.rows,
            shard=SHARD,
            projection=projection,
        )
        for weight in (0.0, 0.7)
    )

    def dense(logits):
        log_probs = torch.log_softmax(logits, -1)
        total = logits.new_zeros(())
        for c in range(len(case.rows.position)):
            if case.rows.chunk_size[c].sum() <= 2:
                continue
            inside = case.rows.token_chunk == c
            at, ids = case.rows.token_position[inside], case.rows.token_id[inside]
            student = torch.exp(log_probs[at, ids].sum())
            teacher = torch.exp(torch.as_tensor(case.rows.chunk_logprob[c]))
            bins = torch.stack([student, 1 - student])
            total = total + divergence(torch.stack([teacher, 1 - teacher]), bins, 0.0)
        return 0.7 * total

    value, slope = autograd(dense, case.logits)
    torch.testing.assert_close(with_chunks[0] - plain[0], value, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(with_chunks[1] - plain[1], slope, rtol=1e-6, atol=1e-7)


def test_gradcheck_of_the_coupled_loss():
    case = problem(6)
    projection = shard_of(case)
    loss = build_loss("ctkd", projection, beta=0.4, lambda_chunk=1.0)
    _, grad = run_head(loss, case.logits, case.rows, shard=SHARD, projection=projection)
    step = 1e-6
    for row, column in [(0, 3), (3, 12), (3, 22), (6, 5), (7, 2), (8, 8)]:
        values = []
        for sign in (1, -1):
            moved = case.logits.clone()
            moved[row, column] += sign * step
            values.append(run_head(loss, moved, case.rows, shard=SHARD, projection=projection)[0])
        numeric = (values[0] - values[1]) / (2 * step)
        assert float(grad[row, column]) == pytest.approx(float(numeric), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", ["ctkd", "gold", "kl"])
@pytest.mark.parametrize("block_size", [1, 4])
def test_block_size_changes_nothing(name, block_size):
    case = problem(7, same_vocabulary=name == "kl")
    projection = shard_of(case)
    loss = build_loss(name, projection, **({} if name == "kl" else {"lambda_chunk": 0.5}))
    whole = run_head(loss, case.logits, case.rows, shard=SHARD, projection=projection)
    cut = run_head(
        loss, case.logits, case.rows, shard=SHARD, projection=projection, block_size=block_size
    )
    for a, b in zip(whole, cut, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["ctkd", "gold", "kl"])
def test_padded_columns_do_not_matter(name):
    case = problem(8, same_vocabulary=name == "kl")
    projection = shard_of(case)
    loss = build_loss(name, projection)
    plain = run_head(loss, case.logits, case.rows, shard=SHARD, projection=projection)
    padded = torch.cat([case.logits, torch.full((len(case.logits), 3), 50.0)], dim=1)
    shard = VocabShard(start=0, size=V_S + 3, vocab_size=V_S)
    value, grad = run_head(loss, padded, case.rows, shard=shard, projection=projection)
    torch.testing.assert_close(value, plain[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad[:, :V_S], plain[1], rtol=1e-12, atol=1e-12)
    assert not grad[:, V_S:].any()


def empty_rows(rows: TeacherRows) -> TeacherRows:
    cut = {
        f.name: getattr(rows, f.name)[:0]
        for f in dataclasses.fields(rows)
        if f.name not in ("teacher", "path_offsets")
    }
    return dataclasses.replace(rows, path_offsets=np.zeros(1, dtype=np.int64), **cut)


@pytest.mark.parametrize("name", ["ctkd", "gold", "kl"])
def test_nothing_to_train_gives_zero_and_still_runs_backward(name):
    case = problem(9)
    projection = shard_of(case)
    logits = case.logits.clone()
    logits[0, 0], logits[1, 1] = float("inf"), 1e4  # masked rows may hold anything
    value, grad = run_head(
        build_loss(name, projection),
        logits,
        empty_rows(case.rows),
        shard=SHARD,
        projection=projection,
    )
    assert float(value) == 0.0
    assert not grad.any()


@pytest.mark.parametrize("name", ["ctkd", "gold", "kl"])
def test_a_nan_in_a_trained_row_surfaces(name):
    case = problem(9, same_vocabulary=name == "kl")
    projection = shard_of(case)
    logits = case.logits.clone()
    logits[3, 2] = float("nan")
    value, _ = run_head(
        build_loss(name, projection), logits, case.rows, shard=SHARD, projection=projection
    )
    assert torch.isnan(value)


def test_float32_blocks_stay_close_to_fp64():
    case = problem(1)
    projection = shard_of(case)
    loss = build_loss("ctkd", projection, lambda_chunk=1.0)
    exact = run_head(loss, case.logits, case.rows, shard=SHARD, projection=projection)
    single = run_head(loss, case.logits.float(), case.rows, shard=SHARD, projection=projection)
    for a, b in zip(exact, single, strict=True):
        torch.testing.assert_close(a, b.double(), rtol=1e-5, atol=1e-5)


def test_chunk_term_numbers():
    # losses.md 42: P_T = .9 * .8 * .95, P_S = .5
    value, _ = binary_chunk_kl(
        torch.log(torch.tensor([0.5], dtype=torch.float64)),
        torch.log(torch.tensor([0.9 * 0.8 * 0.95], dtype=torch.float64)),
    )
    assert float(value) == pytest.approx(0.0693297, abs=1e-7)
    same, slope = binary_chunk_kl(torch.tensor([-0.3]), torch.tensor([-0.3]))
    assert float(same) == 0.0 and float(slope) == 0.0
    certain, slope = binary_chunk_kl(torch.tensor([0.0]), torch.tensor([-0.1]))
    assert torch.isfinite(certain).all() and torch.isfinite(slope).all()


def test_the_projection_shard_has_exactly_its_rows():
    projection = problem(0).projection
    whole = ProjectionShard(projection, start=0, end=V_S, device=CPU)
    halves = [
        ProjectionShard(projection, start=a, end=b, device=CPU) for a, b in ((0, 12), (12, 24))
    ]
    assert len(whole.val) == len(projection.val)
    assert sum(len(h.val) for h in halves) == len(projection.val)
    row, column, value = whole.columns(torch.arange(V_T + 1))
    dense = torch.zeros(V_S, V_T + 1).index_put_((row, column), value)
    assert torch.allclose(dense.sum(1), torch.ones(V_S), atol=1e-6)
