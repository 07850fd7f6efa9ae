"""What can be wrong with rows that came as arrays, position by position.

Shapes: T rows, K entries, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mopd.serving.reply import ArrayRows
from mopd.serving.wire import RawRows

SLACK = 1e-3  # of a log-probability over 0 and of a total probability over 1
MISSING = -9000.0  # servers clamp what they do not know to -9999
BLOCK = 1 << 20  # elements of a temporary that stays in cache


def in_order(rows: RawRows) -> RawRows:
    """Lists by falling probability, as servers should send them."""
    values = rows.topk_logprobs
    if rows.topk_ids is None or not (values[:, 1:] > values[:, :-1]).any():
        return rows
    order = np.argsort(-values, axis=1, kind="stable")
    return replace(
        rows,
        topk_ids=np.take_along_axis(rows.topk_ids, order, axis=1),
        topk_logprobs=np.take_along_axis(values, order, axis=1),
    )


def row_problems(
    rows: RawRows, said: ArrayRows, *, actual_ids: np.ndarray, vocab_size: int
) -> list[tuple[str, np.ndarray]]:
    """(reason, [T] bool) in order; later ones are meaningless where an earlier one holds.

    Args:
        rows: those of ``said``, `in_order`.
    """
    values, actual = rows.topk_logprobs, rows.logprobs.astype(np.float64)
    tail = rows.log_tail.astype(np.float64)
    lowest = values.min(axis=1, initial=np.inf)
    known = (lowest > MISSING) & (actual > MISSING) & np.isfinite(actual)
    known &= np.isfinite(values.max(axis=1, initial=-np.inf)) & ~np.isnan(tail)
    highest = np.maximum(np.maximum(values.max(axis=1, initial=-np.inf), actual), tail)
    total, error = _mass(values, said.error)
    return [
        *_of_ids(rows.topk_ids, vocab_size),
        ("missing", ~known),
        ("positive", highest > SLACK),
        ("mass", ~(np.abs(total + np.exp(tail) - 1.0) <= SLACK + error)),
        *_of_actual(rows, actual, tail, actual_ids=actual_ids, error=said.error),
        ("lse", ~_lse_fits(rows, said, vocab_size)),
    ]


def _of_ids(ids: np.ndarray | None, vocab_size: int) -> list[tuple[str, np.ndarray]]:
    if ids is None:
        return []
    ranked = np.sort(ids, axis=1)
    foreign = (ranked[:, 0] < 0) | (ranked[:, -1] >= vocab_size)
    return [
        ("vocabulary", foreign),
        ("repeated", (ranked[:, 1:] == ranked[:, :-1]).any(axis=1)),
    ]


def _of_actual(
    rows: RawRows,
    actual: np.ndarray,
    tail: np.ndarray,
    *,
    actual_ids: np.ndarray,
    error: float,
) -> list[tuple[str, np.ndarray]]:
    """The actual token against its entry, or against what is outside the list."""
    index = np.arange(len(actual))
    if rows.topk_ids is None:
        listed, place = np.ones(len(actual), dtype=bool), actual_ids
    else:
        hit = rows.topk_ids == actual_ids[:, None]
        listed, place = hit.any(axis=1), hit.argmax(axis=1)
    entry = rows.topk_logprobs[index, place].astype(np.float64)
    differs = ~(np.abs(entry - actual) <= SLACK + error * np.abs(entry))
    last = rows.topk_logprobs[:, -1].astype(np.float64)
    beyond = (actual > last + SLACK + error * np.abs(last)) | (actual > tail + SLACK)
    return [("actual", listed & differs), ("order", ~listed & beyond)]


def _mass(values: np.ndarray, error: float) -> tuple[np.ndarray, np.ndarray]:
    """[T] float64: the probability of the entries, and how far off their wire may make it."""
    total, off = np.zeros(len(values)), np.zeros(len(values))
    for part in _blocks(values):
        block = np.minimum(values[part], np.float32(1.0))
        probability = np.exp(block)
        total[part] = probability.sum(axis=1, dtype=np.float64)
        if error:
            off[part] = 1.1 * error * np.abs(probability * block).sum(axis=1, dtype=np.float64)
    return total, off


def _lse_fits(rows: RawRows, said: ArrayRows, vocab_size: int) -> np.ndarray:
    """[T] bool. With p the probabilities, lse_tau - lse_1 / tau is log sum p^(1/tau): at least the
    listed tokens' share of it, at most that and what the tail can add."""
    lse, power = rows.lse.astype(np.float64), 1.0 / said.temperature
    shift = lse[:, 1] - power * lse[:, 0]
    listed, values = np.zeros(len(lse)), rows.topk_logprobs
    for part in _blocks(values):
        listed[part] = np.exp(values[part].astype(np.float64) * power).sum(axis=1)
    outside = np.maximum(vocab_size - values.shape[1], 1) ** max(0.0, 1.0 - power)
    tail = outside * np.exp(power * rows.log_tail.astype(np.float64))
    # rounding of log-sum-exps grows with the logits
    slack = SLACK + 1e-5 * np.abs(lse).sum(axis=1)
    slack += said.error * power * np.abs(values).max(axis=1, initial=0.0)
    above = shift >= np.log(listed) - slack
    return np.isfinite(lse).all(axis=1) & above & (shift <= np.log(listed + tail) + slack)


def _blocks(values: np.ndarray) -> list[slice]:
    size = max(1, BLOCK // max(values.shape[1], 1))
    return [slice(begin, begin + size) for begin in range(0, len(values), size)]
