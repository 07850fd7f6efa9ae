"""Micro-batches as ranks read them: every token once, whole texts, outputs in the old shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mopd.student.layout import Layout, lay_out
from mopd.types import MicroBatch

LENGTHS = [5, 3, 9]


def padded() -> MicroBatch:
    tokens = np.zeros((3, 10), dtype=np.int64)
    for row, length in enumerate(LENGTHS):
        tokens[row, :length] = 100 * (row + 1) + np.arange(length)
    return MicroBatch(
        tokens=tokens,
        lengths=np.array(LENGTHS),
        response_mask=np.zeros(tokens.shape, dtype=bool),
    )


def packed() -> MicroBatch:
    micro = padded()
    real = np.arange(10) < micro.lengths[:, None]
    return MicroBatch(
        tokens=micro.tokens[real][None],
        lengths=micro.lengths,
        response_mask=np.zeros((1, sum(LENGTHS)), dtype=bool),
        offsets=np.cumsum([0, *LENGTHS]),
    )


def whole_row(layouts: list[Layout]) -> np.ndarray:
    """[1, L'] of the row that context ranks share, in its natural order."""
    gathered = np.concatenate([layout.tokens[0] for layout in layouts])
    natural = layouts[0].natural
    return gathered[None] if natural is None else gathered[natural][None]


@pytest.mark.parametrize("cp_size", [1, 2, 4])
@pytest.mark.parametrize("multiple", [1, 2, 3])
@pytest.mark.parametrize("at_least", [0, 50])
@pytest.mark.parametrize("make", [padded, packed])
def test_outputs_come_back_in_the_shape_of_the_micro_batch(
    make: type, cp_size: int, multiple: int, at_least: int
) -> None:
    micro = make()
    shape = (4 if make is padded else 1, at_least) if at_least else (0, 0)
    layouts = [
        lay_out(micro, multiple=multiple, context=(rank, cp_size), at_least=shape)
        for rank in range(cp_size)
    ]
    for layout in layouts:
        assert layout.tokens.shape[1] % multiple == 0
        assert layout.tokens.shape == layout.real.shape
        assert layout.tokens.shape[1] * cp_size >= at_least
    assert len({layout.tokens.shape for layout in layouts}) == 1
    assert sum(int(layout.real.sum()) for layout in layouts) == sum(LENGTHS)
    row = np.concatenate([layout.tokens for layout in layouts], axis=1)  # as ranks gather it
    if layouts[0].kept is not None:
        row = row[:, layouts[0].kept]
    restored = layouts[0].restore(torch.from_numpy(row))
    assert restored.shape == micro.tokens.shape
    assert (restored.numpy() == micro.tokens).all()


@pytest.mark.parametrize("make", [padded, packed])
def test_texts_stay_whole_in_the_natural_order(make: type) -> None:
    layouts = [lay_out(make(), multiple=2, context=(rank, 2)) for rank in range(2)]
    row, offsets = whole_row(layouts)[0], layouts[0].offsets
    assert offsets is not None and offsets[-1] == len(row)
    for number, (start, length) in enumerate(zip(offsets, LENGTHS, strict=False)):
        assert (row[start : start + length] == 100 * (number + 1) + np.arange(length)).all()
        assert (offsets[number + 1] - start) % 4 == 0


def test_nothing_changes_where_nothing_is_asked() -> None:
    for micro in (padded(), packed()):
        layout = lay_out(micro)
        assert (layout.tokens == micro.tokens).all() and layout.kept is None
        output = torch.zeros(*micro.tokens.shape, 3)
        assert layout.restore(output) is output
