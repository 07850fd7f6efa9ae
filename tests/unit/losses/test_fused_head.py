"""The head from hidden states equals the head from logits, and logits never exist as a whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mopd.align.positions import context_slice
from mopd.losses import source
from mopd.losses.divergence import Divergence
from mopd.losses.head import DistillationHead, TeacherTerm
from mopd.losses.vocab import VocabShard
from mopd.types import MicroBatch, StepBatch, TeacherRows
from tests.helpers.fused_losses import factors, head_of, run_factors, whole
from tests.helpers.losses import build_loss, dense_ctkd, make_rows, step_of
from tests.helpers.random_losses import V_S, N, problem

CASES: list[tuple[str, dict[str, Any]]] = [
    ("kl", {"beta": 1.0}),
    ("kl", {"beta": 0.4, "temperature": 1.5}),
    ("kl", {"divergence": Divergence(kind="forward_kl", top_k_mode="renorm")}),
    ("ctkd", {}),
    ("ctkd", {"lambda_chunk": 0.7, "temperature": 2.0}),
    ("gold", {"lambda_chunk": 0.3, "top_u": 4, "weights": (0.2, 0.8)}),
]


def both(
    name: str, options: dict[str, Any], *, dtype: torch.dtype = torch.float64, block_size: int = 4
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Fused, then unfused."""
    case = problem(11, same_vocabulary=name == "kl")
    shard, projection = whole(case)
    head = head_of(
        build_loss(name, projection, **options),
        shard=shard,
        projection=projection,
        block_size=block_size,
    )
    hidden, weight = factors(len(case.logits), V_S, dtype=dtype)
    return [run_factors(head, hidden, weight, case.rows, fused=fused) for fused in (True, False)]


@pytest.mark.parametrize("panel_rows", [1, 5, 256])
@pytest.mark.parametrize("block_size", [1, 4, 512])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_equals_the_head_on_logits(monkeypatch, name, options, block_size, panel_rows):
    monkeypatch.setattr(source, "PANEL_ROWS", panel_rows)
    fused, plain = both(name, options, block_size=block_size)
    assert float(plain[2].abs().max()) > 1e-3
    for ours, theirs in zip(fused, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_float32(name, options):
    for ours, theirs in zip(*both(name, options, dtype=torch.float32), strict=True):
        assert ours.dtype == torch.float32
        assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-6


@pytest.mark.parametrize("slice_elements", [1, 8_000_000])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_bfloat16(monkeypatch, name, options, slice_elements):
    """Against the unfused head, and no further from exact gradients of the same inputs than it."""
    monkeypatch.setattr(source, "SLICE_ELEMENTS", slice_elements)
    fused, plain = both(name, options, dtype=torch.bfloat16)
    assert fused[1].dtype == fused[2].dtype == torch.bfloat16
    assert fused[0].dtype == torch.float32  # the value is not rounded
    for ours, theirs in zip(fused, plain, strict=True):
        error = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
        assert float(error) < 2.0**-7


@pytest.mark.parametrize("block_size", [1, 7, 512])
def test_equals_the_formulas_under_autograd(block_size):
    case = problem(11)
    shard, projection = whole(case)
    head = head_of(
        build_loss("ctkd", projection, beta=0.3, temperature=1.5),
        shard=shard,
        projection=projection,
        block_size=block_size,
    )
    hidden, weight = factors(len(case.logits), V_S)
    ours = run_factors(head, hidden, weight, case.rows, fused=True)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    value = dense_ctkd(hidden @ weight.t(), case.rows, case.projection, beta=0.3, temperature=1.5)
    theirs = (value.detach(), *torch.autograd.grad(value, [hidden, weight]))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def test_a_frozen_weight_costs_no_gradient_of_its_own():
    case = problem(11)
    shard, projection = whole(case)
    head = head_of(build_loss("ctkd", projection), shard=shard, projection=projection)
    hidden, weight = factors(len(case.logits), V_S)
    expected = run_factors(head, hidden, weight, case.rows, fused=True)
    leaf = hidden.clone().requires_grad_()
    value = head.from_hidden(leaf[None], weight, *step_of(case.rows, len(case.logits))).total
    value.backward()
    torch.testing.assert_close(leaf.grad, expected[1], rtol=0, atol=0)
    linear = source.LinearSource(hidden, weight, shard, frozen=True)
    assert linear.finish()[1] is None


@pytest.mark.parametrize("name", ["kl", "ctkd", "gold"])
def test_finite_differences(name):
    """Along random directions of both inputs; the chunk term included."""
    case = problem(11, same_vocabulary=name == "kl")
    shard, projection = whole(case)
    loss = build_loss(name, projection, lambda_chunk=0.5)
    head = head_of(loss, shard=shard, projection=projection)
    hidden, weight = factors(len(case.logits), V_S)
    _, of_hidden, of_weight = run_factors(head, hidden, weight, case.rows, fused=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        up, across = (torch.randn(x.shape, generator=generator).double() for x in (hidden, weight))
        step = 1e-6
        high, low = (
            run_factors(head, hidden + s * up, weight + s * across, case.rows, fused=True)[0]
            for s in (step, -step)
        )
        slope = (of_hidden * up).sum() + (of_weight * across).sum()
        torch.testing.assert_close((high - low) / (2 * step), slope, rtol=1e-6, atol=1e-7)


def test_the_cross_entropy_goes_the_same_way():
    case = problem(4)
    shard, projection = whole(case)
    loss = build_loss("ctkd", projection, lambda_chunk=0.5)
    head = head_of(loss, shard=shard, projection=projection)
    hidden, weight = factors(N, V_S)
    results = [
        run_factors(head, hidden, weight, case.rows, fused=fused, crossentropy_weight=0.7)
        for fused in (True, False)
    ]
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)
    without = run_factors(head, hidden, weight, case.rows, fused=True)
    assert abs(float(results[0][0] - without[0])) > 0.1


def test_padded_rows_of_the_weight_do_not_matter():
    case = problem(11, same_vocabulary=True)
    shard, projection = whole(case)
    hidden, weight = factors(len(case.logits), V_S)
    loss = build_loss("kl", projection)
    plain = run_factors(head_of(loss, shard=shard), hidden, weight, case.rows, fused=True)
    padded = torch.cat([weight, weight.new_full((3, weight.shape[1]), 50.0)])
    wide = VocabShard(start=0, size=V_S + 3, vocab_size=V_S)
    value, of_hidden, of_weight = run_factors(
        head_of(loss, shard=wide), hidden, padded, case.rows, fused=True
    )
    assert not of_weight[V_S:].any()
    for ours, theirs in zip((value, of_hidden, of_weight[:V_S]), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_what_comes_from_above_scales_both_gradients():
    case = problem(11, same_vocabulary=True)
    shard, projection = whole(case)
    head = head_of(build_loss("kl", projection), shard=shard)
    hidden, weight = factors(len(case.logits), V_S)
    once = run_factors(head, hidden, weight, case.rows, fused=True)
    thrice = run_factors(head, hidden, weight, case.rows, fused=True, upstream=3.0)
    for one, three in zip(once[1:], thrice[1:], strict=True):
        torch.testing.assert_close(three, 3.0 * one)


def nobody(rows: TeacherRows) -> TeacherRows:
    return context_slice(rows, np.full(N, -1))


@pytest.mark.parametrize("name", ["kl", "ctkd", "gold"])
@pytest.mark.parametrize("payload", ["none", "empty"])
def test_without_rows_the_gradients_are_zeros(name, payload):
    """They must exist: Megatron's hooks wait for the gradient of every weight."""
    case = problem(11, same_vocabulary=name == "kl")
    shard, projection = whole(case)
    loss = build_loss(name, projection, lambda_chunk=0.5)
    head = head_of(loss, shard=shard, projection=projection)
    hidden, weight = (x.requires_grad_() for x in factors(len(case.logits), V_S))
    micro, batch = step_of(nobody(case.rows), len(case.logits))
    if payload == "none":
        micro = replace(micro, rows={})
    output = head.from_hidden(hidden[None], weight, micro, batch)
    output.total.backward()
    assert float(output.total.detach()) == 0.0
    for leaf in (hidden, weight):
        assert leaf.grad is not None and not leaf.grad.any()


def test_rows_that_no_loss_visits_are_not_multiplied():
    """NaN in their hidden states reaches nothing."""
    case = problem(11, same_vocabulary=True)
    shard, projection = whole(case)
    head = head_of(build_loss("kl", projection), shard=shard)
    hidden, weight = factors(len(case.logits), V_S)
    clean = run_factors(head, hidden, weight, case.rows, fused=True)
    others = np.setdiff1d(np.arange(len(hidden)), case.rows.position)
    assert len(others)
    hidden[torch.from_numpy(others)] = float("nan")
    for ours, theirs in zip(
        run_factors(head, hidden, weight, case.rows, fused=True), clean, strict=True
    ):
        assert torch.equal(ours, theirs)


def test_teachers_add_up():
    """Two teachers on overlapping rows: each row and each column collects both."""
    case = problem(11, same_vocabulary=True)
    shard, projection = whole(case)
    some = np.array([1, 3, 4, 8])
    payloads = {"a": case.rows, "b": replace(case.rows, **first_rows(case.rows, some))}
    head = DistillationHead(
        terms={
            "a": TeacherTerm(loss=build_loss("kl", projection), weight=0.3, projection=None),
            "b": TeacherTerm(
                loss=build_loss("kl", projection, beta=0.0), weight=0.7, projection=None
            ),
        },
        shard=shard,
        block_size=3,
    )
    micro, batch = step_of(case.rows, len(case.logits))
    micro = replace(micro, rows=payloads)
    batch = replace(batch, denominators={"a": 6.0, "b": 4.0}, num_tokens=5)
    hidden, weight = (x.requires_grad_() for x in factors(len(case.logits), V_S))
    fused = head.from_hidden(hidden[None], weight, micro, batch)
    plain = head((hidden @ weight.t())[None], micro, batch)
    torch.testing.assert_close(fused.total, plain.total, rtol=1e-12, atol=0.0)
    assert fused.metrics.keys() == plain.metrics.keys()
    ours = torch.autograd.grad(fused.total, [hidden, weight])
    theirs = torch.autograd.grad(plain.total, [hidden, weight])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def first_rows(rows: TeacherRows, position: np.ndarray) -> dict[str, np.ndarray]:
    """The boundary fields of as many first rows, at other positions."""
    assert rows.topk_ids is not None
    count = len(position)
    names = ("row_weight", "topk_ids", "topk_logprobs", "log_tail")
    return {"position": position} | {name: getattr(rows, name)[:count] for name in names}


class Largest(TorchDispatchMode):
    """Remembers the most elements that a result had."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else [result]:
            if isinstance(item, torch.Tensor):
                self.numel = max(self.numel, item.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["kl", "ctkd", "gold"])
def test_logits_never_exist_as_a_whole(name, dtype):
    case = problem(11, same_vocabulary=name == "kl")
    shard, projection = whole(case)
    loss = build_loss(name, projection, lambda_chunk=0.5)
    head = head_of(loss, shard=shard, projection=projection, block_size=16)
    count = 4000
    hidden, weight = factors(count, V_S, dtype=dtype)
    micro, batch = many_rows(case.rows, count)
    sizes = {}
    for fused in (True, False):
        leaf, other = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with Largest() as largest:
            if fused:
                output = head.from_hidden(leaf[None], other, micro, batch)
            else:
                output = head((leaf @ other.t())[None], micro, batch)
            output.total.backward()
        sizes[fused] = largest.numel
    assert sizes[False] == count * V_S
    assert sizes[True] <= hidden.numel() < count * V_S / 3


def many_rows(rows: TeacherRows, count: int) -> tuple[MicroBatch, StepBatch]:
    """The listed tokens of the first row, at every position."""
    assert rows.topk_ids is not None
    ids = np.repeat(rows.topk_ids[:1], count, axis=0)
    probs = np.repeat(np.exp(rows.topk_logprobs[:1]), count, axis=0)
    tokens = [(at, at % V_S, at) for at in range(count)]
    return step_of(make_rows(list(range(count)), ids, probs, tokens=tokens), count)
