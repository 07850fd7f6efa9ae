"""Rows from logits against float64 sums written from the definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mopd.serving.rows import rows_of_logits

COUNT, WIDTH = 6, 37


@pytest.fixture
def logits() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return 4 * torch.randn(COUNT, WIDTH, generator=generator)


@pytest.mark.parametrize("top_k", [1, 5, WIDTH, WIDTH + 9, None])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_rows_are_what_they_say(
    logits: torch.Tensor, top_k: int | None, temperature: float
) -> None:
    actual = torch.arange(COUNT) * 5 % WIDTH
    rows = rows_of_logits(logits, actual, top_k=top_k, temperature=temperature)
    exact = logits.double().numpy()
    lse = np.log(np.exp(exact).sum(1))
    lse_tau = np.log(np.exp(exact / temperature).sum(1))
    log_probs = exact - lse[:, None]
    np.testing.assert_allclose(rows.lse, np.stack([lse, lse_tau], 1), atol=1e-5)
    np.testing.assert_allclose(
        rows.logprobs, log_probs[np.arange(COUNT), actual.numpy()], atol=1e-5
    )
    if top_k is None:
        assert rows.topk_ids is None
        np.testing.assert_allclose(rows.topk_logprobs, log_probs, atol=1e-5)
        assert np.isneginf(rows.log_tail).all()
        return
    order = np.argsort(-log_probs, axis=1)
    width = min(top_k, WIDTH)
    np.testing.assert_array_equal(rows.topk_ids, order[:, :width])
    np.testing.assert_allclose(
        rows.topk_logprobs, np.take_along_axis(log_probs, order[:, :width], 1), atol=1e-5
    )
    outside = np.exp(np.take_along_axis(log_probs, order[:, width:], 1)).sum(1)
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(rows.log_tail, np.log(outside), atol=1e-5)


@pytest.mark.parametrize("depth", [-40.0, -90.0, -200.0])
def test_the_tail_keeps_its_digits_when_it_is_tiny(depth: float) -> None:
    logits = torch.tensor([[1.0, 1.0 + depth, depth]])
    rows = rows_of_logits(logits, torch.tensor([0]), top_k=1, temperature=1.0)
    assert rows.log_tail[0] == pytest.approx(depth + np.log1p(np.exp(-1.0)), abs=1e-4)


def test_a_large_vocabulary_costs_no_digits() -> None:
    logits = 4 * torch.randn(40, 150_000, generator=torch.Generator().manual_seed(0))
    rows = rows_of_logits(logits, torch.zeros(40), top_k=8, temperature=2.0)
    exact = torch.stack([torch.logsumexp(logits.double() / tau, 1) for tau in (1.0, 2.0)], 1)
    np.testing.assert_allclose(rows.lse, exact, rtol=0, atol=5e-6)


def test_no_rows_are_no_rows() -> None:
    rows = rows_of_logits(torch.zeros(0, 9), torch.zeros(0), top_k=3, temperature=2.0)
    assert rows.topk_logprobs.shape == (0, 3) and rows.lse.shape == (0, 2)


def test_types_are_those_of_the_wire(logits: torch.Tensor) -> None:
    rows = rows_of_logits(
        logits.bfloat16(), torch.zeros(COUNT, dtype=torch.int32), top_k=2, temperature=2.0
    )
    assert rows.topk_ids is not None and rows.topk_ids.dtype == np.int32
    for array in (rows.topk_logprobs, rows.logprobs, rows.log_tail, rows.lse):
        assert array.dtype == np.float32
