"""L1 distance of two sets of probabilities, each sorted by size (ULD 2402.12030).

The r-th largest probability of the student is compared with the r-th largest of the teacher, the
shorter side padded with zeros. The slope is that of the difference's sign, at the student's token
that holds rank r. Of equal probabilities the smaller token id comes first, on one shard as on many.
Where the two sides of a rank are equal up to rounding, that slope is as uncertain as rounding is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mopd.losses.vocab import VocabShard

_LARGEST = 0x7FFFFFFF  # bits of a float32 without its sign
_INDEX = 0xFFFFFFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class SortedL1:
    """The distance of each row, and its derivative in the student's probabilities.

    U is the number of ranks kept; an entry is 0 where its token lives on another shard.
    """

    value: Tensor  # [r]
    mean: Tensor  # [r]: sum of q * slope over all shards
    index: Tensor  # [r, U] int64 into this shard's columns
    slope: Tensor  # [r, U]
    probs: Tensor  # [r, U]: the student's probability of each rank


def sorted_l1(
    student: Tensor, teacher: Tensor, *, top_u: int | None, shard: VocabShard, width: int
) -> SortedL1:
    """Of probabilities ``student`` [r, n] of this shard and the teacher's [r, m], largest first.

    ``top_u`` keeps that many of the student's largest ones, None all of them; for the teacher's see
    `largest`. ``width`` is the largest n of any shard. Several shards
    exchange what they keep: 4 bytes per row, rank and shard, so ``width`` of them when exact, and
    every shard sorts it all.
    """
    kept = student.shape[1] if top_u is None else top_u
    if shard.group is None:
        probs, index = descending(student, kept)
    elif top_u is None:
        everyone = shard.gather_columns(_pad(student, width))
        probs, order = descending(everyone, everyone.shape[1])
        index = order - shard.rank_offset(width)
    else:
        width = min(width, top_u)
        mine, place = descending(student, width)
        # shards stand in order of their ids: ties fall as they would on one
        probs, order = descending(shard.gather_columns(_pad(mine, width)), top_u)
        index = _look_up(place, order - shard.rank_offset(width))
    ranks = max(probs.shape[1], teacher.shape[1])
    gap = _pad(probs, ranks) - _pad(teacher, ranks)
    slope = torch.sign(gap[:, : probs.shape[1]])
    value, mean = gap.abs_().sum(dim=-1), torch.linalg.vecdot(probs, slope)
    if shard.group is not None:
        slope = torch.where((index >= 0) & (index < student.shape[1]), slope, 0.0)
        index = index.clamp(0, max(student.shape[1] - 1, 0))
    if student.shape[1] == 0:  # nothing here can be named
        index, slope, probs = index[:, :0], slope[:, :0], probs[:, :0]
    return SortedL1(value=value, mean=mean, index=index, slope=slope, probs=probs)


def descending(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest of each row of ``values`` [r, n] >= 0, and where they are.

    At most n are given. Equal ones keep their order.
    """
    count = min(count, values.shape[1])
    if values.dtype != torch.float32:
        top, index = torch.sort(values, dim=-1, descending=True, stable=True)
        return top[:, :count], index[:, :count]
    on_cpu = values.device.type == "cpu"
    index = _order_on_cpu(values, count) if on_cpu else _order(values, count)
    return values.gather(1, index), index


def largest(values: Tensor, count: int) -> Tensor:
    """The ``count`` largest of each row of ``values`` [r, n], descending; at most n."""
    size = values.shape[1]
    count = min(count, size)
    if values.device.type != "cpu":
        return values.topk(count, dim=-1, sorted=True).values
    rows = values.numpy()
    # numpy sorts with vector instructions: 30 times as fast as torch at 150,000 columns
    found = np.empty((len(rows), count), dtype=rows.dtype)
    for row, out in zip(rows, found, strict=True):
        kept = np.partition(row, size - count)[size - count :] if 0 < count < size else row[:count]
        out[:] = np.sort(kept)[::-1]
    return torch.from_numpy(found)


def _order(values: Tensor, count: int) -> Tensor:
    """[r, count] int64. A key holds the bits of a probability, which rise with it, and its place:
    keys are distinct, so that any sort of them is a stable one."""
    place = torch.arange(values.shape[1], device=values.device)
    keys = ((_LARGEST - values.contiguous().view(torch.int32).long()) << 32) | place
    return keys.topk(count, dim=-1, largest=False, sorted=True).values & _INDEX


def _order_on_cpu(values: Tensor, count: int) -> Tensor:
    """`_order` through numpy, row by row: the keys of one row stay in cache."""
    rows, size = values.numpy(), values.shape[1]
    found = np.empty((len(rows), count), dtype=np.int64)
    everywhere = np.arange(size)
    for row, out in zip(rows, found, strict=True):
        place = everywhere
        if 0 < count < size:
            limit = np.partition(row, size - count)[size - count]
            place = np.flatnonzero(~(row < limit))  # all of them where the row is NaN
            row = row[place]
        keys = _LARGEST - np.ascontiguousarray(row).view(np.int32).astype(np.int64)
        keys <<= 32
        keys |= place
        keys.sort()
        np.bitwise_and(keys[:count], _INDEX, out=out)
    return torch.from_numpy(found)


def _look_up(place: Tensor, index: Tensor) -> Tensor:
    """``place`` at ``index``, -1 where that is outside."""
    if place.shape[1] == 0:
        return torch.full_like(index, -1)
    inside = (index >= 0) & (index < place.shape[1])
    return torch.where(inside, place.gather(1, index.clamp(0, place.shape[1] - 1)), -1)


def _pad(values: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, width - values.shape[1]))
