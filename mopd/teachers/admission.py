"""What a server said of one answer, position by position: believed, or missing with a reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mopd.serving.reply import AMBIGUOUS, ArrayRows, Entries
from mopd.teachers.row_problems import MISSING, SLACK, in_order, row_problems


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """Rows that predict the response's tokens. Where ``valid`` is False: NaN and id -1."""

    logprobs: np.ndarray  # [T] float32, of the actual token
    topk_ids: np.ndarray | None  # [T, K] int32; None: the whole vocabulary
    topk_logprobs: np.ndarray  # [T, K] float32, descending where listed
    log_tail: np.ndarray  # [T] float32
    valid: np.ndarray  # [T] bool
    missing: Counter[str] = field(default_factory=Counter)  # positions by reason
    lse: np.ndarray | None = None  # [T, 2] float32; None: the server does not tell


def nothing(num_tokens: int, k: int | None, reason: str, *, vocab_size: int) -> Admitted:
    """All of it missing; ``k`` None: whole rows."""
    width = vocab_size if k is None else k
    return Admitted(
        logprobs=np.full(num_tokens, np.nan, dtype=np.float32),
        topk_ids=None if k is None else np.full((num_tokens, k), -1, dtype=np.int32),
        topk_logprobs=np.full((num_tokens, width), np.nan, dtype=np.float32),
        log_tail=np.full(num_tokens, np.nan, dtype=np.float32),
        lse=np.full((num_tokens, 2), np.nan, dtype=np.float32),
        valid=np.zeros(num_tokens, dtype=bool),
        missing=Counter({reason: num_tokens} if num_tokens else {}),
    )


def admit(
    said: Entries | ArrayRows,
    *,
    ids: np.ndarray,
    num_prompt: int,
    k: int | None,
    vocab_size: int,
) -> Admitted:
    """The contract, on the positions behind the prompt, for lists (`admit_lists`) and for
    arrays (`admit_rows`).

    Args:
        ids: [P + T] what was sent; ``num_prompt`` = P, at least 1.
        k: None: the whole vocabulary, which only arrays hold.
    """
    if isinstance(said, ArrayRows):
        return admit_rows(said, actual_ids=ids[num_prompt:], k=k, vocab_size=vocab_size)
    assert k is not None
    return admit_lists(said, ids=ids, num_prompt=num_prompt, k=k, vocab_size=vocab_size)


def admit_lists(
    entries: Entries, *, ids: np.ndarray, num_prompt: int, k: int, vocab_size: int
) -> Admitted:
    """The contract of lists.

    A list has K entries, or K + 1 with the actual token behind the others; the actual token is in
    it; ids are inside the vocabulary and differ; log-probabilities are finite, above `MISSING` and
    at most 0, their probabilities at most 1 together (both with `SLACK`).
    """
    num_tokens = len(ids) - num_prompt
    if len(entries.count) != len(ids):
        return nothing(num_tokens, k, "length", vocab_size=vocab_size)
    if entries.echoed is not None and not _echoes(entries.echoed, ids):
        return nothing(num_tokens, k, "echo", vocab_size=vocab_size)
    count = entries.count[num_prompt:]
    begin = len(entries.ids) - int(count.sum())
    flat_ids, flat_values = entries.ids[begin:], entries.logprobs[begin:]
    fits = (count == k) | (count == k + 1)
    inside = (np.arange(k + 1) < count[:, None]) & fits[:, None]
    token = np.full((num_tokens, k + 1), -1, dtype=np.int64)
    value = np.full((num_tokens, k + 1), -np.inf)
    used = slice(None) if fits.all() else np.repeat(fits, count)
    token[inside] = flat_ids[used]
    value[inside] = flat_values[used]
    order, actual, total, problems = _judge(
        token, value, actual_ids=ids[num_prompt:], outside=count == k + 1
    )
    foreign = (flat_ids < 0) | (flat_ids >= vocab_size)
    problems = [
        ("ambiguous", _rows_with(flat_ids == AMBIGUOUS, count)),
        ("null", count == 0),
        ("width", ~fits),
        ("vocabulary", _rows_with(foreign, count)),
        ("missing", _rows_with(~(np.abs(flat_values) < -MISSING), count)),
        ("positive", _rows_with(flat_values > SLACK, count)),
        *problems,
    ]
    valid, missing = first_reasons(problems, num_tokens)
    keep = order[:, :k]
    topk_ids = np.take_along_axis(token, keep, axis=1).astype(np.int32)
    with np.errstate(over="ignore"):  # of values that are refused
        topk_logprobs = np.take_along_axis(value, keep, axis=1).astype(np.float32)
    log_tail = _log_tail(total, actual, outside=count == k + 1, whole=k >= vocab_size)
    if missing:
        gone = ~valid
        topk_ids[gone], topk_logprobs[gone] = -1, np.nan
        log_tail[gone], actual[gone] = np.nan, np.nan
    return Admitted(
        # within the slack a value may exceed what a probability can be
        logprobs=np.minimum(actual, 0.0).astype(np.float32),
        topk_ids=topk_ids,
        topk_logprobs=np.minimum(topk_logprobs, np.float32(0.0)),
        log_tail=log_tail.astype(np.float32),
        valid=valid,
        missing=missing,
    )


def first_reasons(
    problems: Sequence[tuple[str, np.ndarray]], num_tokens: int
) -> tuple[np.ndarray, Counter[str]]:
    """[T] bool: rows without a problem; and the others, each counted by its first reason."""
    valid = np.ones(num_tokens, dtype=bool)
    missing: Counter[str] = Counter()
    for reason, wrong in problems:
        if found := int((wrong & valid).sum()):
            missing[reason] += found
            valid &= ~wrong
    return valid, missing


def _echoes(echoed: np.ndarray, ids: np.ndarray) -> bool:
    """Whether what the server read is what was sent, as far as its strings tell."""
    return len(echoed) == len(ids) and bool(((echoed == ids) | (echoed < -1)).all())


def _rows_with(entry: np.ndarray, count: np.ndarray) -> np.ndarray:
    """[T] bool: rows in whose ``count`` entries something holds."""
    found = np.zeros(len(count), dtype=bool)
    if entry.any():
        found[np.repeat(np.arange(len(count)), count)[entry]] = True
    return found


def _judge(
    token: np.ndarray, value: np.ndarray, *, actual_ids: np.ndarray, outside: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[tuple[str, np.ndarray]]]:
    """What concerns a row as a whole.

    Args:
        token, value: [T, K + 1], -1 and -inf where a list has K entries.
        outside: [T] bool: K + 1 entries, so the actual token is not one of the top-k.
    Returns:
        [T, K + 1] columns by falling probability, an actual token outside the top-k last; [T] the
        actual token's value; [T] the top-k's probability; (reason, [T] bool) in order.
    """
    rows = np.arange(len(token))
    hit = token == actual_ids[:, None]
    place = hit.argmax(axis=1)
    actual = value[rows, place]
    with np.errstate(over="ignore", invalid="ignore"):
        probability = np.exp(np.minimum(value, 1.0))
        everything = probability.sum(axis=1)
        total = everything - np.where(outside, probability[rows, place], 0.0)
        key = np.negative(value, dtype=np.float32, casting="same_kind")
    key[rows[outside], place[outside]] = np.inf
    order = key.argsort(axis=1)
    least = -key[rows, order[:, -2]]
    ranked = token.astype(np.int32)
    ranked.sort(axis=1)
    problems = [
        ("echo", ~hit[rows, place]),
        ("repeated", (ranked[:, 1:] == ranked[:, :-1]).any(axis=1)),
        ("mass", everything > 1.0 + SLACK),
        ("order", outside & (actual > least + SLACK)),
    ]
    return order, actual, total, problems


def _log_tail(
    total: np.ndarray, actual: np.ndarray, *, outside: np.ndarray, whole: bool
) -> np.ndarray:
    """[T] log(1 - total); at least the actual token's, where that is outside the top-k."""
    if whole:
        return np.full(len(total), -np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        # fp32 log-probabilities leave the sum with an error of this size
        tail = np.log(-np.expm1(np.minimum(np.log(total), -1e-7)))
    return np.where(outside, np.maximum(tail, actual), tail)


def admit_rows(
    said: ArrayRows, *, actual_ids: np.ndarray, k: int | None, vocab_size: int
) -> Admitted:
    """The contract of arrays.

    Listed ids are inside the vocabulary and differ; log-probabilities are finite, above `MISSING`
    and at most 0; probabilities and tail are 1 together; the actual token has the value that its
    entry says, or is no likelier than the last entry and the tail; the log-sum-exps are finite and
    fit together.

    Args:
        actual_ids: [T] what was sent behind the prompt.
    """
    rows, num_tokens = said.rows, len(actual_ids)
    width = vocab_size if k is None else k
    if rows.topk_logprobs.shape != (num_tokens, width) or (rows.topk_ids is None) != (k is None):
        return nothing(num_tokens, k, "length", vocab_size=vocab_size)
    rows = in_order(rows)
    with np.errstate(all="ignore"):  # of values that are refused
        valid, missing = first_reasons(
            row_problems(rows, said, actual_ids=actual_ids, vocab_size=vocab_size), num_tokens
        )
    values = np.minimum(rows.topk_logprobs, np.float32(0.0))
    logprobs = np.minimum(rows.logprobs, np.float32(0.0))
    tail = np.minimum(rows.log_tail, np.float32(0.0))
    ids, lse = rows.topk_ids, rows.lse
    if missing:
        gone = ~valid
        values[gone], logprobs[gone], tail[gone] = np.nan, np.nan, np.nan
        ids = None if ids is None else np.where(gone[:, None], np.int32(-1), ids)
        lse = np.where(gone[:, None], np.float32(np.nan), lse)
    return Admitted(
        logprobs=logprobs,
        topk_ids=ids,
        topk_logprobs=values,
        log_tail=tail,
        lse=lse,
        valid=valid,
        missing=missing,
    )
