"""The seam of all losses: pure functions over a block of rows, and what they exchange."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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

    boundary: Tensor  # [r] int64, ascending: rows that carry a boundary
    weight: Tensor  # [r] float
    topk_ids: (
        Tensor | None
    )  # [r, K] int64 teacher tokens, -1 where padded; [K] or None: TeacherRows
    topk_logprobs: Tensor  # [r, K] float
    log_tail: Tensor  # [r] float
    token_row: Tensor  # [t] int64 rows that predict a token of a chunk
    token_id: Tensor  # [t] int64 global student ids
    token_chunk: Tensor  # [t] int64
    path_weight: Tensor  # [q] float
    slot_path: Tensor  # [s] int64: path row of each slot (a group of tokens or one token)
    slot_target: Tensor  # [s] float: R
    entry_row: Tensor  # [e] int64: this rank's tokens of the slots: row, slot, local student id
    entry_slot: Tensor  # [e] int64
    entry_token: Tensor  # [e] int64
    native: Tensor  # [o] int64 rows judged over the student's own vocabulary
    native_weight: Tensor  # [o] float
    native_ids: Tensor  # [o, K'] int64 student tokens, -1 where padded
    native_logprobs: Tensor  # [o, K'] float
    native_log_tail: Tensor  # [o] float


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunks:
    """What a coupled term needs to know of one micro-batch: its chunks and their tokens."""

    token_chunk: Tensor  # [t] int64
    token_sampling_logprob: Tensor  # [t] float
    teacher_logprob: Tensor  # [C] float
    size: Tensor  # [C, 2] int64: student and teacher tokens
    weight: Tensor  # [C] float
    owned: Tensor  # [C] bool: whose value this rank reports
    sequence: Tensor  # [C] int64, ascending: chunks of one rollout share a number


@dataclass(frozen=True, slots=True, kw_only=True)
class Coupled:
    """Result of the step that joins rows: its value, and d(value)/d(log p) of each token.

    ``kl`` joins `LossSums.kl`. ``extra`` are further sums, to be divided by the number of chunks.
    """

    loss: Tensor
    token_grad: Tensor  # [t]
    kl: Tensor
    chunk_kl: Tensor | None = None  # [C] the summands of ``kl``
    extra: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowKl:
    """The summands of a block's ``kl``, row by row."""

    row: Tensor  # [r] int64 rows of the block
    total: Tensor  # [r] weight times divergence
    weight: Tensor  # [r]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSums:
    """Scalar sums over a block. ``kl`` is the divergence at the boundaries alone."""

    loss: Tensor
    kl: Tensor
    rows: RowKl | None = None  # None: no divergence here, or that of a coupled term
    extra: Mapping[str, Tensor] = field(default_factory=dict)  # a coupled term's, by name


class Loss(Protocol):
    """One teacher's loss. ``logits`` are [n, V_local] float at temperature 1, without padding.

    `measure` and `couple` run only when ``coupled``: `measure` gives the student's log-probability
    of each chunk token, [t] or the first column of [t, k], and `couple` sees those of the whole
    micro-batch next to ``chunk_logprob`` [C], their sums over each chunk.

    `grad` writes ``scale`` times d(loss)/d(logits) into ``out`` [n, V_local], which holds anything,
    and returns unscaled sums.
    """

    @property
    def coupled(self) -> bool: ...

    def measure(self, logits: Tensor, rows: RowBlock, shard: VocabShard) -> Tensor: ...

    def couple(self, token_logprob: Tensor, chunk_logprob: Tensor, chunks: Chunks) -> Coupled: ...

    def grad(
        self,
        logits: Tensor,
        out: Tensor,
        rows: RowBlock,
        token_grad: Tensor | None,
        shard: VocabShard,
        *,
        scale: float,
    ) -> LossSums: ...


def zero(reference: Tensor) -> Tensor:
    """A scalar 0 of the dtype and on the device of ``reference``."""
    return reference.new_zeros(())
