"""A teacher's rows at the loss's temperature, listed or whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mopd.types import TeacherScores

_BLOCK = 1 << 20  # elements of a temporary that stays in cache


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedRows:
    """Teacher log-probabilities at the loss's temperature, of the tokens that the teacher lists."""

    topk: np.ndarray  # [T, K] float32
    log_tail: np.ndarray  # [T] float32
    actual: np.ndarray  # [T] float32

    def rows(self, row: np.ndarray) -> np.ndarray:
        """[n, K] float32 log-probabilities of ``row`` [n]."""
        return self.topk[row]

    def at(self, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        """Log-probabilities of entries ``column`` of ``row``, which broadcast."""
        return self.topk[row, column]


@dataclass(frozen=True, kw_only=True)
class WholeRows:
    """The same of the whole vocabulary.

    ``topk`` stays as the teacher sent it, up to a constant per row and at temperature 1: most of
    its entries are never looked at.
    """

    topk: np.ndarray  # [T, V_T] float32
    log_tail: np.ndarray  # [T] float32
    token_ids: np.ndarray  # [T] int32
    temperature: float

    @cached_property
    def shift(self) -> np.ndarray:
        """[T] float64: the log-sum-exp of each row at the temperature."""
        found = np.zeros(len(self.topk))
        for part in row_blocks(*self.topk.shape):
            scaled = self.topk[part].astype(np.float64) / self.temperature
            top = scaled.max(axis=1)
            found[part] = top + np.log(np.exp(scaled - top[:, None]).sum(axis=1))
        return found

    @cached_property
    def actual(self) -> np.ndarray:
        """[T] float32: log-probability of the actual token."""
        return self.at(np.arange(len(self.topk)), self.token_ids)

    def rows(self, row: np.ndarray) -> np.ndarray:
        """[n, V_T] float32 log-probabilities of ``row`` [n]."""
        return (self.topk[row] / self.temperature - self.shift[row][:, None]).astype(np.float32)

    def at(self, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        """Log-probabilities of entries ``column`` of ``row``, which broadcast."""
        return (self.topk[row, column] / self.temperature - self.shift[row]).astype(np.float32)


Tempered = ListedRows | WholeRows


def temper(scores: TeacherScores, temperature: float) -> Tempered:
    """The teacher's log-probabilities at the loss's temperature.

    Whole rows need no log-sum-exps: their normaliser is in them.

    Raises:
        ValueError: the temperature is not 1 and a teacher of listed rows sent no log-sum-exps.
    """
    if scores.topk_ids is None:
        return WholeRows(
            topk=scores.topk_logprobs,
            log_tail=scores.log_tail,
            token_ids=scores.token_ids,
            temperature=temperature,
        )
    if temperature == 1.0:
        return ListedRows(
            topk=scores.topk_logprobs, log_tail=scores.log_tail, actual=scores.logprobs
        )
    if scores.lse is None:
        raise ValueError(f"teacher {scores.teacher} sends no log-sum-exp; set temperature to 1")
    lse = scores.lse.astype(np.float64)
    topk = (scores.topk_logprobs + lse[:, :1]) / temperature - lse[:, 1:]
    actual = (scores.logprobs + lse[:, 0]) / temperature - lse[:, 1]
    with np.errstate(divide="ignore"):
        inside = np.minimum(np.log(np.exp(topk).sum(axis=1)), -1e-7)
        tail = np.where(np.isneginf(scores.log_tail), -np.inf, np.log(-np.expm1(inside)))
    return ListedRows(
        topk=topk.astype(np.float32),
        log_tail=tail.astype(np.float32),
        actual=actual.astype(np.float32),
    )


def row_blocks(num_rows: int, width: int) -> Iterator[slice]:
    """Slices of rows that hold about 1e6 entries."""
    size = max(1, _BLOCK // max(width, 1))
    return (slice(begin, min(begin + size, num_rows)) for begin in range(0, num_rows, size))
