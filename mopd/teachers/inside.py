"""The lead rank's half of a teacher whose weights lie on all ranks of a replica.

It says which texts are to be scored and reads the rows that come back; the forward pass is
collective and belongs to `mopd.runtime.inside`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mopd.config.schema import PrivilegedSection
from mopd.errors import ConfigError
from mopd.serving.models import model_fingerprint, model_limits
from mopd.serving.reply import ArrayRows
from mopd.serving.scoring import ScoredSequence
from mopd.serving.wire import RawRows
from mopd.teachers import context
from mopd.teachers.admission import Admitted, admit
from mopd.teachers.base import TeacherInput, cut_rows, teacher_input
from mopd.teachers.selftest import Canary, difference
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Prompt, Rollout, TeacherScores

TOLERANCE = 0.05  # between two scores of one text, alone and beside others


@dataclass(frozen=True, slots=True, kw_only=True)
class InsideOptions:
    """What is asked of the model.

    Args:
        top_k: entries per position, the rest is one tail; None: the whole vocabulary.
        temperature: the loss's, for the second log-sum-exp.
        privileged: what the teacher reads and the student does not.
    """

    top_k: int | None
    temperature: float
    privileged: PrivilegedSection | None = None


class InsideTeacher:
    """Tokens beyond the model's context (``max_length``, prompt included) have no valid row, and
    neither have rows that break the contract of `admit`."""

    collective = True

    def __init__(
        self,
        name: str,
        model_dir: Path,
        *,
        tokenizer: ChatTokenizer,
        student: ChatTokenizer,
        options: InsideOptions,
    ) -> None:
        self.name = name
        self.tokenizer = tokenizer
        _, self.max_length = model_limits(model_dir)
        self._student = student
        self._fingerprint = model_fingerprint(model_dir)
        self._size = tokenizer.vocabulary.size
        self._top_k = None if options.top_k is None else min(options.top_k, self._size)
        self._temperature = options.temperature
        self._privileged = options.privileged

    def inputs(self, rollouts: Sequence[Rollout]) -> list[TeacherInput]:
        """What it is to read, in its own tokens and beyond its context too."""
        return [
            teacher_input(
                rollout, self.tokenizer, student=self._student, privileged=self._privileged
            )
            for rollout in rollouts
        ]

    def texts(self, inputs: Sequence[TeacherInput]) -> list[ScoredSequence]:
        """The same as ids, up to the end of its context."""
        parts = [context.cut(x, self.max_length) for x in inputs]
        return [
            ScoredSequence(
                ids=np.concatenate([x.prompt_ids, x.token_ids]).astype(np.int32),
                start=len(x.prompt_ids),
            )
            for x in parts
        ]

    def scores(
        self,
        rollouts: Sequence[Rollout],
        inputs: Sequence[TeacherInput],
        texts: Sequence[ScoredSequence],
        rows: Sequence[RawRows],
    ) -> tuple[list[TeacherScores], Counter[str]]:
        """Of the ``rows`` of `texts`, with as many entries as each prompt asks for; and the
        positions without a score by reason."""
        found: list[TeacherScores] = []
        missing: Counter[str] = Counter()
        for rollout, x, text, own in zip(rollouts, inputs, texts, rows, strict=True):
            admitted = self._admit(text, own)
            scores, beyond = context.whole_scores(
                x,
                {name: getattr(admitted, name) for name in _FIELDS},
                valid=admitted.valid,
                who=(self.name, self._fingerprint),
                vocab_size=self._size,
            )
            missing += admitted.missing + beyond
            found.append(cut_rows(scores, rollout.prompt.top_k))
        return found, missing

    def canary(self) -> list[ScoredSequence]:
        """Fixed texts that any model of this vocabulary can score."""
        canary = Canary.of(self.name, self.tokenizer, k=1, tolerance=TOLERANCE, min_length=1)
        return [ScoredSequence(ids=ids[: self.max_length], start=1) for ids in canary.prompts]

    def check(self, together: Sequence[RawRows], alone: RawRows) -> None:
        """Whether rows of `canary`, and of its first text scored alone, are a model's scores.

        Raises:
            ConfigError: they break the contract, or depend on the other texts of a micro-batch.
        """
        texts = self.canary()
        first = self._admit(texts[0], alone)
        for text, rows in zip(texts, together, strict=True):
            missing = self._admit(text, rows).missing
            if missing:
                counts = ", ".join(f"{reason} {count}" for reason, count in sorted(missing.items()))
                raise ConfigError(
                    f"teachers.{self.name}: its scores of a fixed text are no log-probabilities "
                    f"({counts}); look at its weights, or set "
                    f"teachers.{self.name}.backend.dtype=float32"
                )
        beside = self._admit(texts[0], together[0])
        if (worst := difference(first, beside)) > TOLERANCE:
            raise ConfigError(
                f"teachers.{self.name}: scores the same text {worst:.2g} apart beside other texts; "
                f"set teachers.{self.name}.backend.dtype=float32"
            )

    def _admit(self, text: ScoredSequence, rows: RawRows) -> Admitted:
        return admit(
            ArrayRows(rows=rows, temperature=self._temperature),
            ids=text.ids,
            num_prompt=text.start,
            k=self._top_k,
            vocab_size=self._size,
        )

    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        """Not by the lead alone."""
        raise TypeError(f"teachers.{self.name}: its scores need all ranks; see mopd.runtime.inside")

    def accuracy(self, prompts: Sequence[Prompt], *, max_new_tokens: int) -> float | None:
        """It scores and does not write, so that is not known."""
        return None

    def identity(self) -> dict[str, Any]:
        return {"model": self._fingerprint}

    def differs(self, before: Mapping[str, Any]) -> str | None:
        """The files of the model are compared."""
        return None if before.get("model") == self._fingerprint else "has other files"

    def close(self) -> None:
        """Holds nothing: the weights end with the job."""


_FIELDS = ("topk_ids", "topk_logprobs", "logprobs", "log_tail", "lse")
