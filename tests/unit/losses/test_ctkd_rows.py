"""CTKD on native rows, on shared columns and on the teacher's whole vocabulary."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from mopd.losses.divergence import Divergence
from mopd.losses.head import DistillationHead, TeacherTerm
from mopd.losses.vocab import VocabShard
from mopd.projection import ProjectionShard
from tests.helpers.ctkd_problems import CPU, V_S, V_T, N, autograd, ctkd_loss, ctkd_problem, whole
from tests.helpers.losses import make_projection, step_of

KINDS = ("lists", "shared", "whole", "native", "native_only")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("beta", "temperature"), [(0.0, 1.0), (0.3, 2.5), (1.0, 1.0)])
def test_value_and_gradient_equal_the_dense_reference(kind, beta, temperature):
    case = ctkd_problem(kind, 1)
    options = {"beta": beta, "temperature": temperature}
    value, grad = whole(case, case.logits, **options)
    expected, slope = autograd(case, **options)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grad, slope, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mixed", "tvd", "skew_reverse_kl"])
def test_slopes_are_derivatives(kind, name):
    case = ctkd_problem(kind, 2)
    options: dict[str, Any] = {"divergence": Divergence(kind=name)}
    _, grad = whole(case, case.logits, temperature=1.3, **options)
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(case.logits.shape, generator=generator, dtype=torch.float64)
    up, down = (
        whole(case, case.logits + sign * 1e-6 * direction, temperature=1.3, **options)[0]
        for sign in (1, -1)
    )
    assert float((grad * direction).sum()) == pytest.approx(float(up - down) / 2e-6, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block_size", [1, 7, N])
def test_block_size_changes_nothing(kind, block_size):
    case = ctkd_problem(kind, 3)
    for a, b in zip(
        whole(case, case.logits, lambda_chunk=0.4),
        whole(case, case.logits, block_size, lambda_chunk=0.4),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def expanded(case):
    """The same payload with a list per row."""
    rows, count = case.rows, len(case.rows.position)
    if rows.topk_ids is None:
        total = np.log(np.exp(rows.topk_logprobs).sum(1, keepdims=True))
        rows = dataclasses.replace(
            rows,
            topk_ids=np.arange(V_T),
            topk_logprobs=rows.topk_logprobs - total,
            log_tail=np.full(count, -np.inf),
        )
    rows = dataclasses.replace(rows, topk_ids=np.tile(rows.topk_ids, (count, 1)))
    return dataclasses.replace(case, rows=rows)


@pytest.mark.parametrize("kind", ["shared", "whole"])
def test_whole_rows_equal_lists_of_everything_44(kind):
    case = ctkd_problem(kind, 4)
    for a, b in zip(whole(case, case.logits), whole(expanded(case), case.logits), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", ["shared", "whole"])
def test_columns_are_not_kept_for_other_columns_or_dtypes(kind):
    first, second = ctkd_problem(kind, 5), ctkd_problem(kind, 5)
    if kind == "shared":
        assert second.rows.topk_ids is not None
        other = np.setdiff1d(np.arange(V_T), second.rows.topk_ids)[:6]
        second = dataclasses.replace(second, rows=dataclasses.replace(second.rows, topk_ids=other))
    projection = ProjectionShard(first.projection, start=0, end=V_S, device=CPU)
    shard = VocabShard(start=0, size=V_S, vocab_size=V_S)
    loss = ctkd_loss(projection)
    head = DistillationHead(
        terms={"t": TeacherTerm(loss=loss, weight=1.0, projection=projection)}, shard=shard
    )
    head(first.logits[None].requires_grad_(), *step_of(first.rows, N))
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        leaf = second.logits[None].to(dtype).requires_grad_()
        output = head(leaf, *step_of(second.rows, N))
        expected, _ = whole(second, second.logits)
        torch.testing.assert_close(
            output.total.detach().double(), expected, rtol=tolerance, atol=tolerance
        )


def native_rows(rows, kept):
    """The same with the native rows ``kept`` alone."""
    names = [f.name for f in dataclasses.fields(rows) if f.name.startswith("native_")]
    return dataclasses.replace(rows, **{name: getattr(rows, name)[kept] for name in names})


def metrics(case):
    """(kl, loss) as the driver reports them."""
    projection = ProjectionShard(case.projection, start=0, end=V_S, device=CPU)
    loss = ctkd_loss(projection)
    head = DistillationHead(
        terms={"t": TeacherTerm(loss=loss, weight=1.0, projection=projection)},
        shard=VocabShard(start=0, size=V_S, vocab_size=V_S),
    )
    found = head(case.logits[None].requires_grad_(), *step_of(case.rows, N)).metrics
    return float(found["kl/t"]), float(found["loss/t"])


def test_the_kl_counts_boundaries_and_native_rows_where_there_are_none():
    kl, loss = metrics(ctkd_problem("native_only", 6))
    assert kl == pytest.approx(loss) and kl > 0.1
    case = ctkd_problem("native", 6)
    kl, loss = metrics(case)
    without = dataclasses.replace(case, rows=native_rows(case.rows, slice(0)))
    assert metrics(without) == pytest.approx((kl, kl))
    assert loss > kl + 0.1


def test_native_rows_are_boundary_rows_under_the_identity():
    case = ctkd_problem("native_only", 7)
    kept = np.array([0, 1, 3])
    rows = native_rows(case.rows, kept)
    value, grad = whole(dataclasses.replace(case, rows=rows), case.logits)
    lists = dataclasses.replace(
        native_rows(rows, slice(0)),
        position=rows.native_position,
        row_weight=rows.native_weight,
        topk_ids=rows.native_ids,
        topk_logprobs=rows.native_logprobs,
        log_tail=rows.native_log_tail,
    )
    identity = make_projection(np.eye(V_S, V_S + 1))
    pushed = dataclasses.replace(case, rows=lists, projection=identity)
    for a, b in zip((value, grad), whole(pushed, case.logits), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_in_a_trained_row_surfaces_and_others_may_hold_anything(kind):
    case = ctkd_problem(kind, 8)
    trained = 7 if kind.startswith("native") else 4
    logits = case.logits.clone()
    logits[trained, 2] = float("nan")
    assert torch.isnan(whole(case, logits)[0])
    logits = case.logits.clone()
    logits[3] = float("inf")  # no boundary, not native
    value, grad = whole(case, logits)
    assert torch.isfinite(value) and torch.isfinite(grad).all() and not grad[3].any()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_train_gives_zero(kind):
    case = ctkd_problem(kind, 9)
    cut = {
        f.name: getattr(case.rows, f.name)[:0]
        for f in dataclasses.fields(case.rows)
        if f.name not in ("teacher", "path_offsets", "topk_ids")
    }
    rows = dataclasses.replace(case.rows, **cut)
    value, grad = whole(dataclasses.replace(case, rows=rows), case.logits)
    assert float(value) == 0.0 and not grad.any()
