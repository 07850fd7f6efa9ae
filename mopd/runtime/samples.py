"""Answers of a step with what each teacher makes of them, chunk by chunk: ``samples.jsonl``.

A record holds one answer: the student's tokens with the sampler's log-probabilities, and of each
teacher its tokens, theirs, and the chunks both sides share. A chunk's ``divergence`` is
log q(chunk) - log p(chunk) in nats, of the student q that sampled it and the teacher p: one sample
of the integrand of the reverse KL divergence. It may be negative. It is null where a side does not
know a log-probability. A token is a string where its bytes are UTF-8, ``{"hex": ...}`` where they
are not, ``{"special": ...}`` where it has none (the end of the turn).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mopd.align.boundaries import CHUNK_TYPES, chunk_sizes
from mopd.align.payload import kept_chunks
from mopd.align.tokens import TextAlignment
from mopd.metrics.sinks import JsonlSink
from mopd.runtime.gather import Gathered
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Rollout, TeacherScores

MAX_TOKENS = 1024  # of an answer: what is beyond is left out, and counted as `omitted`
MAX_ANSWERS = 64  # of a step, whatever the number of domains
MAX_PROMPT = 4000  # characters of a message
MASKED = "masked"

Token = str | dict[str, str]
Align = Callable[[Rollout, TeacherScores], TextAlignment]
Trained = Callable[[Rollout], np.ndarray]


def _loss_mask(rollout: Rollout) -> np.ndarray:
    return rollout.loss_mask


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOptions:
    """Which answers are kept: ``per_domain`` of step 0, of every ``interval``-th and the last."""

    interval: int
    per_domain: int
    num_steps: int

    def is_due(self, step: int) -> bool:
        return step % self.interval == 0 or step == self.num_steps - 1


class SampleLog:
    """Writes ``samples.jsonl``, one answer a line. The file is opened with the first line."""

    def __init__(
        self,
        path: Path,
        *,
        student: ChatTokenizer,
        teachers: Mapping[str, ChatTokenizer],
        options: SampleOptions,
    ) -> None:
        self._path = path
        self._student = student
        self._teachers = teachers
        self._options = options
        self._sink: JsonlSink | None = None

    def log(self, gathered: Gathered, align: Align, *, trained: Trained = _loss_mask) -> None:
        """Keeps some of a step's answers; only reads them. ``trained`` [S] bool is which tokens of
        an answer may be trained on."""
        if not self._options.is_due(gathered.step):
            return
        for i in chosen(gathered.rollouts, self._options.per_domain):
            rollout, scores = gathered.rollouts[i], gathered.scores[i]
            rollout = replace(rollout, loss_mask=trained(rollout))
            record = self._record(rollout, scores, align)
            self._opened().log(gathered.step, record)

    def truncate_from(self, step: int) -> None:
        """Forgets the answers of ``step`` and later ones: they are about to be written again."""
        if self._path.exists():
            self._opened().truncate_from(step)

    def close(self) -> None:
        if self._sink is not None:
            self._sink.close()

    def _opened(self) -> JsonlSink:
        if self._sink is None:
            self._sink = JsonlSink(self._path)
        return self._sink

    def _record(
        self, rollout: Rollout, scores: Mapping[str, TeacherScores], align: Align
    ) -> dict[str, Any]:
        prompt = rollout.prompt
        return {
            "id": prompt.id,
            "sample": rollout.sample_index,
            "domain": prompt.domain,
            "source": rollout.source,
            "policy_version": rollout.policy_version,
            "finish": rollout.finish_reason,
            "correct": None if rollout.reward is None else rollout.reward > 0.5,
            "trained": bool(rollout.loss_mask.any()),
            "prompt": [
                {"role": m["role"], "content": m["content"][:MAX_PROMPT]} for m in prompt.messages
            ],
            "answer": rollout.response.decode("utf-8", "backslashreplace")[: 16 * MAX_TOKENS],
            "tokens": spelled(self._student, rollout.token_ids[:MAX_TOKENS]),
            "logprobs": _numbers(rollout.logprobs[:MAX_TOKENS]),
            "omitted": max(len(rollout.token_ids) - MAX_TOKENS, 0),
            "teachers": {
                name: self._judged(rollout, said, align(rollout, said))
                for name, said in scores.items()
            },
        }

    def _judged(
        self, rollout: Rollout, scores: TeacherScores, found: TextAlignment
    ) -> dict[str, Any]:
        chunks = list(chunks_of(rollout, scores, found))
        end = max((chunk["teacher"][1] for chunk in chunks), default=0)
        known = np.where(scores.valid, scores.logprobs, np.nan)
        return {
            "tokens": spelled(self._teachers[scores.teacher], scores.token_ids[:end]),
            "logprobs": _numbers(known[:end]),
            "chunks": chunks,
        }


def chosen(rollouts: Sequence[Rollout], per_domain: int) -> list[int]:
    """Indices of the answers to keep: the first of each prompt before second ones."""
    order = sorted(range(len(rollouts)), key=lambda i: (rollouts[i].sample_index, i))
    taken: Counter[str] = Counter()
    found: list[int] = []
    for i in order:
        domain = rollouts[i].prompt.domain
        if taken[domain] < per_domain and len(found) < MAX_ANSWERS:
            taken[domain] += 1
            found.append(i)
    return sorted(found)


def chunks_of(
    rollout: Rollout, scores: TeacherScores, found: TextAlignment
) -> Iterator[dict[str, Any]]:
    """Chunks in order, each with its token spans, its kind and its divergence.

    Together they cover both sides up to `MAX_TOKENS` student tokens. What lies before the first or
    behind the last shared boundary is a ``masked`` chunk, as is one that is not trained on.
    """
    known = np.where(scores.valid, scores.logprobs, np.nan)
    kinds = _kinds(found, scores, rollout.loss_mask)
    ours, theirs = found.alignment.student_starts, found.alignment.teacher_starts
    spans = list(zip(ours[:-1], ours[1:], theirs[:-1], theirs[1:], kinds, strict=True))
    spans.insert(0, (0, ours[0], 0, theirs[0], MASKED))
    spans.append((ours[-1], len(rollout.token_ids), theirs[-1], len(scores.token_ids), MASKED))
    for span in spans:
        begin, end, first, last = map(int, span[:4])
        if begin == end and first == last:
            continue
        if end > MAX_TOKENS:
            return
        divergence = None
        if span[4] != MASKED:
            divergence = _sum(rollout.logprobs[begin:end], -known[first:last])
        yield {
            "student": [begin, end],
            "teacher": [first, last],
            "kind": span[4],
            "divergence": divergence,
        }


def spelled(tokenizer: ChatTokenizer, ids: np.ndarray) -> list[Token]:
    """Each token as something that JSON can hold and a reader can tell apart."""
    return [_spelled(tokenizer, int(i)) for i in ids]


def _spelled(tokenizer: ChatTokenizer, index: int) -> Token:
    data = tokenizer.vocabulary.decode([index])
    if not data:
        known = index < tokenizer.vocabulary.size
        return {"special": tokenizer.token(index) if known else f"id {index}"}
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return {"hex": data.hex()}


def _kinds(found: TextAlignment, scores: TeacherScores, loss_mask: np.ndarray) -> list[str]:
    sizes = chunk_sizes(found.alignment)
    number = 2 * (sizes[:, 0] > 1) + (sizes[:, 1] > 1)
    used = kept_chunks(scores, found.alignment, found.trainable(loss_mask))  # as in the loss
    return [
        CHUNK_TYPES[kind] if is_used else MASKED
        for kind, is_used in zip(number.tolist(), used.tolist(), strict=True)
    ]


def _sum(*parts: np.ndarray) -> float | None:
    total = float(sum(part.astype(np.float64).sum() for part in parts))
    return _rounded(total)


def _numbers(values: np.ndarray) -> list[float | None]:
    return [_rounded(float(value)) for value in values]


def _rounded(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
