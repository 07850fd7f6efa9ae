"""Parts of a micro-batch's loss for context-parallel ranks that all see its whole output."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from mopd.align.positions import context_slice
from mopd.types import MicroBatch, TeacherRows

ShareBy = Literal["chunk", "sequence"]


def share_micro_batch(
    micro: MicroBatch, rank: int, size: int, *, by: ShareBy = "chunk"
) -> MicroBatch:
    """The loss rows of one of ``size`` ranks; tokens and positions stay those of the whole.

    Neighbouring chunks go to one rank, about as many to each, and no chunk is torn (with
    ``by="sequence"`` no answer): what a loss joins over a chunk (or an answer) is all here.
    """
    if size == 1:
        return micro
    trained = np.flatnonzero(micro.response_mask)
    mask = np.zeros(micro.response_mask.size, dtype=bool)
    mask[np.array_split(trained, size)[rank]] = True
    return replace(
        micro,
        response_mask=mask.reshape(micro.response_mask.shape),
        rows={
            name: _share(rows, rank, size, by=by, length=mask.size)
            for name, rows in micro.rows.items()
        },
    )


def _share(rows: TeacherRows, rank: int, size: int, *, by: ShareBy, length: int) -> TeacherRows:
    """Rows between the boundary of this rank's first chunk and that of the next rank's."""
    firsts = np.arange(len(rows.position))
    if by == "sequence":
        firsts = np.flatnonzero(np.diff(rows.chunk_sequence, prepend=-1))
    edges = [0, *(_edge(rows, firsts, r / size, length) for r in range(1, size)), length]
    here = np.full(length, -1)
    here[edges[rank] : edges[rank + 1]] = np.arange(edges[rank], edges[rank + 1])
    return context_slice(rows, here)


def _edge(rows: TeacherRows, firsts: np.ndarray, part: float, length: int) -> int:
    """Position of the first of ``firsts`` (chunks) at or behind a part of all chunks."""
    found = np.searchsorted(firsts, part * len(rows.position))
    return int(rows.position[firsts[found]]) if found < len(firsts) else length
