"""Teachers of `backend.type: custom` that are slow, or stop for ever in the middle of a run."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

from mopd.config.schema import RunConfig
from mopd.runtime import watchdog
from mopd.teachers.uniform import UniformTeacher
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Rollout, TeacherScores

GOOD_CALLS = 2


class Slow(UniformTeacher):
    """Takes its time, and ends."""

    def __init__(self, *, config: RunConfig, tokenizer: ChatTokenizer) -> None:
        student = ChatTokenizer.load(str(config.student.model))
        super().__init__("sort", tokenizer=tokenizer, student=student, top_k=4)

    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        time.sleep(0.5)
        return super().score(rollouts)


class Sleeper(Slow):
    """Sleeps, as a wait without a deadline does; the interpreter is free."""

    def __init__(self, *, config: RunConfig, tokenizer: ChatTokenizer) -> None:
        super().__init__(config=config, tokenizer=tokenizer)
        self._left = GOOD_CALLS

    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        if not self._left:
            self.stop_for_ever()
        self._left -= 1
        return super().score(rollouts)

    def stop_for_ever(self) -> None:
        time.sleep(3600.0)


class Hog(Sleeper):
    """Never gives the interpreter back: no other Python thread runs."""

    def __init__(self, *, config: RunConfig, tokenizer: ChatTokenizer) -> None:
        super().__init__(config=config, tokenizer=tokenizer)
        watchdog.BACKSTOP_S = 1.0

    def stop_for_ever(self) -> None:
        re.match(r"(a+)+b", "a" * 64)
