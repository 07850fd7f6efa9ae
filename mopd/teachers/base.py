"""The seam of teachers: token rows in, `TeacherScores` out, whatever engine computes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mopd.config.schema import PrivilegedSection
from mopd.tokens.chat import ChatTokenizer
from mopd.tokens.vocabulary import incomplete_utf8_tail
from mopd.types import Message, Prompt, Rollout, TeacherScores


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherInput:
    """What a teacher reads of one rollout, in its own ids."""

    prompt_ids: np.ndarray  # [P] int32
    token_ids: np.ndarray  # [T] int32; may be empty: the response cannot be spelled
    byte_ends: np.ndarray  # [T] int64, in the bytes of the response


class Teacher(Protocol):
    """``score`` keeps the order of the rollouts; a failed one has no valid row."""

    name: str
    tokenizer: ChatTokenizer

    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]: ...

    def accuracy(self, prompts: Sequence, *, max_new_tokens: int) -> float | None: ...

    def close(self) -> None: ...


@runtime_checkable
class Counting(Protocol):
    """A teacher that counts what went wrong: kind -> reason -> number, once."""

    def drain(self) -> dict[str, dict[str, int]]: ...


@runtime_checkable
class Timed(Protocol):
    """A teacher that times its requests."""

    def drain_latencies(self) -> list[float]: ...


@runtime_checkable
class Bounded(Protocol):
    """A teacher that reads so many tokens of a prompt and its answer; None: it does not tell."""

    max_length: int | None


@runtime_checkable
class Concurrent(Protocol):
    """A teacher that mostly waits for others: where ``concurrent`` is true, ``score`` may run in a
    thread beside other teachers', and ``close`` from another thread ends it soon."""

    concurrent: bool


@runtime_checkable
class Collective(Protocol):
    """A teacher whose scores need all ranks of a replica: where ``collective`` is true, the loop
    asks for them (`mopd.runtime.inside`) and the pool does not."""

    collective: bool


@runtime_checkable
class Known(Protocol):
    """A teacher that can be told from another one, also by a later process."""

    def identity(self) -> dict[str, Any]:
        """JSON values."""
        ...

    def differs(self, before: Mapping[str, Any]) -> str | None:
        """In what way this is not the teacher that gave the identity ``before``; None: it is."""
        ...


@runtime_checkable
class Writer(Protocol):
    """A teacher that can answer prompts itself: sampled text, and whether its turn ended.

    A key decides the draw of its answer alone, whatever the batch.
    """

    def write(
        self,
        prompts: Sequence[Prompt],
        keys: Sequence[str],
        *,
        max_new_tokens: int,
        temperature: float,
    ) -> list[tuple[bytes, bool]]: ...


def share_right(prompts: Sequence[Prompt], texts: Sequence[tuple[bytes, bool]]) -> float | None:
    """Exact matches among finished answers to checkable prompts; None where there are none."""
    right = [
        stopped and text.strip() == (prompt.answer or "").encode().strip()
        for prompt, (text, stopped) in zip(prompts, texts, strict=True)
    ]
    return float(np.mean(right)) if right else None


def teacher_messages(prompt: Prompt, privileged: PrivilegedSection | None) -> tuple[Message, ...]:
    """The chat as the teacher reads it: with its own system message, and with its prefix and the
    row's private field before the first user message.

    Raises:
        ValueError: there is a text to put before a user message, and no such message.
    """
    messages = list(prompt.messages)
    if privileged is None:
        return prompt.messages
    if privileged.system is not None:
        rest = messages[1:] if messages[0]["role"] == "system" else messages
        messages = [{"role": "system", "content": privileged.system}, *rest]
    texts = [] if privileged.prefix is None else [privileged.prefix]
    if privileged.field is not None:
        texts.append(prompt.private[privileged.field])
    if texts:
        users = [i for i, message in enumerate(messages) if message["role"] == "user"]
        if not users:
            raise ValueError(f"prompt {prompt.id} has no user message")
        first = messages[users[0]]
        messages[users[0]] = {**first, "content": "\n\n".join([*texts, first["content"]])}
    return tuple(messages)


def teacher_input(
    rollout: Rollout,
    tokenizer: ChatTokenizer,
    *,
    student: ChatTokenizer,
    privileged: PrivilegedSection | None = None,
) -> TeacherInput:
    """The teacher's own template and its own tokens of the response bytes.

    The prompt may hold what the student does not see (``privileged``).

    A teacher with the student's vocabulary gets the student's ids as they are. A response that was
    cut inside a UTF-8 character loses that beginning; bytes that are invalid elsewhere are passed
    on, so that nonsense is judged and not masked.
    """
    vocabulary = tokenizer.vocabulary
    prompt_ids = tokenizer.prompt_ids(teacher_messages(rollout.prompt, privileged))
    if vocabulary.fingerprint == student.vocabulary.fingerprint:
        return TeacherInput(
            prompt_ids=prompt_ids, token_ids=rollout.token_ids, byte_ends=rollout.byte_ends
        )
    response, stopped = rollout.response, rollout.finish_reason == "stop"
    if not stopped and (cut := incomplete_utf8_tail(response)):
        response = response[:-cut]
    reading = vocabulary.read(response)
    stops = stopped and (bool(reading.ids) or not response)
    end = reading.byte_ends[-1:] if len(reading.byte_ends) else np.zeros(1, dtype=np.int64)
    ids = [*reading.ids, vocabulary.eos_id] if stops else reading.ids
    return TeacherInput(
        prompt_ids=prompt_ids,
        token_ids=np.asarray(ids, dtype=np.int32),
        byte_ends=np.concatenate([reading.byte_ends, end]) if stops else reading.byte_ends,
    )


def cut_rows(scores: TeacherScores, k: int | None) -> TeacherScores:
    """Rows with their ``k`` likeliest tokens; what is cut joins the tail. None cuts nothing.

    Whole rows become lists, at most as long as the vocabulary.
    """
    if k is None or (scores.topk_ids is not None and scores.topk_ids.shape[1] <= k):
        return scores
    order = np.argsort(-scores.topk_logprobs, axis=1, kind="stable")
    ids = order.astype(np.int32)
    if scores.topk_ids is not None:
        ids = np.take_along_axis(scores.topk_ids, order, axis=1)
    elif not scores.valid.all():
        ids = np.where(scores.valid[:, None], ids, np.int32(-1))
    ranked = np.take_along_axis(scores.topk_logprobs, order, axis=1)
    rest = ranked[:, k:].astype(np.float64)
    with np.errstate(invalid="ignore"):  # of rows that are missing
        tail = np.logaddexp(scores.log_tail.astype(np.float64), np.logaddexp.reduce(rest, axis=1))
    return replace(
        scores,
        topk_ids=ids[:, :k],
        topk_logprobs=ranked[:, :k],
        log_tail=np.minimum(tail, 0.0).astype(np.float32),
    )
