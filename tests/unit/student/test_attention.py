"""Attention of packed texts and of windows is that of each text alone, by the plain formula."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from mopd.student.attention import CausalAttention, PackedTexts

HEADS, GROUPS, SIZE = 4, 2, 8


def attention(window: int | None) -> CausalAttention:
    config: Any = SimpleNamespace(window_size=None if window is None else (window - 1, 0))
    return CausalAttention(
        config,
        1,
        AttnMaskType.causal,
        "self",
        pg_collection=SimpleNamespace(cp=None),  # pyright: ignore[reportArgumentType]
    )


def formula(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None
) -> torch.Tensor:
    """[L, N * D] of [L, N, D] and [L, G, D], token by token."""
    rows = []
    for i in range(len(query)):
        first = 0 if window is None else max(0, i - window + 1)
        heads = []
        for n in range(HEADS):
            g = n // (HEADS // GROUPS)
            scores = key[first : i + 1, g] @ query[i, n] / SIZE**0.5
            heads.append(torch.softmax(scores, 0) @ value[first : i + 1, g])
        rows.append(torch.cat(heads))
    return torch.stack(rows)


def draw(length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    return tuple(  # pyright: ignore[reportReturnType]
        torch.randn(length, heads, SIZE, dtype=torch.float64, generator=generator)
        for heads in (HEADS, GROUPS, GROUPS)
    )


@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_padded_rows(window: int | None) -> None:
    query, key, value = draw(11)
    batch = [torch.stack([each, each.flip(0)], dim=1) for each in (query, key, value)]
    found = attention(window)(*batch, None)
    torch.testing.assert_close(found[:, 0], formula(query, key, value, window))
    flipped = formula(query.flip(0), key.flip(0), value.flip(0), window)
    torch.testing.assert_close(found[:, 1], flipped)


@pytest.mark.parametrize("window", [None, 3])
def test_packed_texts_do_not_see_each_other(window: int | None) -> None:
    query, key, value = draw(12)
    offsets = (0, 5, 6, 12)
    found = attention(window)(
        query, key, value, None, packed_seq_params=PackedTexts(offsets=offsets)
    )
    expected = [formula(query[a:b], key[a:b], value[a:b], window) for a, b in pairwise(offsets)]
    torch.testing.assert_close(found, torch.cat(expected))
