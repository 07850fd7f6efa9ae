"""The seam of teachers: token rows in, `TeacherScores` out, whatever engine computes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from mopd.tokens.chat import ChatTokenizer
from mopd.tokens.vocabulary import incomplete_utf8_tail
from mopd.types import Prompt, Rollout, TeacherScores


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


def teacher_input(
    rollout: Rollout, tokenizer: ChatTokenizer, *, student: ChatTokenizer
) -> TeacherInput:
    """The teacher's own template and its own tokens of the response bytes.

    A teacher with the student's vocabulary gets the student's ids as they are. A response that was
    cut inside a UTF-8 character loses that beginning; bytes that are invalid elsewhere are passed
    on, so that nonsense is judged and not masked.
    """
    vocabulary = tokenizer.vocabulary
    prompt_ids = tokenizer.prompt_ids(rollout.prompt.messages)
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
