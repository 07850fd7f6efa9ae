"""The seam of all losses: two pure functions over a block of rows, and what they exchange."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from mopd.losses.vocab import VocabShard


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """What a micro-batch contributes. Nothing here is divided yet."""

    total: Tensor  # scalar with gradient
    metrics: Mapping[str, Tensor]  # scalar sums, added over micro-batches and replicas


class ProjectionRows(Protocol):
    """This rank's rows of a projection, as `mopd.projection.ProjectionShard` has them."""

    teacher_size: int
    common: Tensor  # [V_T] int64

    def columns(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...

    def fibre_entries(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBlock:
    """One teacher's payload for a block of n logits rows, on the device; block-local indices."""

    boundary: Tensor  # [r] int64 rows that carry a boundary
    topk_ids: Tensor  # [r, K] int64, teacher vocabulary, -1 where padded
    topk_logprobs: Tensor  # [r, K] float
    log_tail: Tensor  # [r] float
    token_row: Tensor  # [t] int64 rows that predict a token of a chunk
    token_id: Tensor  # [t] int64 global student ids
    path_weight: Tensor  # [q] float
    slot_path: Tensor  # [s] int64: path row of each slot (a group of tokens or one token)
    slot_target: Tensor  # [s] float: R
    entry_row: Tensor  # [e] int64: this rank's tokens of the slots: row, slot, local student id
    entry_slot: Tensor  # [e] int64
    entry_token: Tensor  # [e] int64


@dataclass(frozen=True, slots=True, kw_only=True)
class RowScalars:
    """First pass: what couples rows of different blocks and ranks."""

    token_logprob: Tensor  # [t] student's log-probability of each chunk token


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSums:
    """Second pass: scalar sums over the block."""

    loss: Tensor
    kl: Tensor  # the divergence at the boundaries alone


class Loss(Protocol):
    """One teacher's loss. ``logits`` are [n, V_local] float at temperature 1, padding at -inf.

    ``measure`` and ``couple`` run only when ``coupled``: first row scalars, then one step over the
    chunks that gives the value of the coupled term and its slope. ``grad`` returns sums and
    d(loss)/d(logits) [n, V_local]; ``token_grad`` [t] is d(loss)/d(log p) of the chunk tokens.
    """

    @property
    def coupled(self) -> bool: ...

    def measure(self, logits: Tensor, rows: RowBlock, shard: VocabShard) -> RowScalars: ...

    def couple(
        self, chunk_logprob: Tensor, teacher_logprob: Tensor, chunk_size: Tensor
    ) -> tuple[Tensor, Tensor]: ...

    def grad(
        self, logits: Tensor, rows: RowBlock, token_grad: Tensor | None, shard: VocabShard
    ) -> tuple[LossSums, Tensor]: ...


def zero(reference: Tensor) -> Tensor:
    """A scalar 0 of the dtype and on the device of ``reference``."""
    return reference.new_zeros(())
