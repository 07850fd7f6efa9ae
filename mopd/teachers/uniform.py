"""A teacher that knows nothing: every token is equally likely."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mopd.teachers.base import teacher_input
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Prompt, Rollout, TeacherScores


class UniformTeacher:
    """Negative control with a real teacher's tokenizer and template."""

    def __init__(
        self, name: str, *, tokenizer: ChatTokenizer, student: ChatTokenizer, top_k: int | None
    ) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self._student = student
        size = tokenizer.vocabulary.size
        self._width = size if top_k is None else min(top_k, size)
        self._listed = top_k is not None

    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        """log(1 / V) for every entry; the first ``top_k`` ids are the listed ones, None is all."""
        return [self._score(rollout) for rollout in rollouts]

    def _score(self, rollout: Rollout) -> TeacherScores:
        size = self.tokenizer.vocabulary.size
        read = teacher_input(rollout, self.tokenizer, student=self._student)
        rows, width, each = len(read.token_ids), self._width, -np.log(size)
        with np.errstate(divide="ignore"):
            tail = np.log(np.float64(size - width)) + each
        ids = np.tile(np.arange(width, dtype=np.int32), (rows, 1)) if self._listed else None
        return TeacherScores(
            teacher=self.name,
            model_fingerprint="uniform",
            token_ids=read.token_ids,
            byte_ends=read.byte_ends,
            logprobs=np.full(rows, each, dtype=np.float32),
            topk_ids=ids,
            topk_logprobs=np.full((rows, width), each, dtype=np.float32),
            log_tail=np.full(rows, tail, dtype=np.float32),
            lse=np.full((rows, 2), np.log(size), dtype=np.float32),
            valid=np.ones(rows, dtype=bool),
        )

    def accuracy(self, prompts: Sequence[Prompt], *, max_new_tokens: int) -> float | None:
        """Nothing to measure."""
        return None

    def close(self) -> None:
        """Nothing to free."""
