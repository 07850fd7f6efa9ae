"""A teacher of `backend.type: custom` that is itself the mistake."""

from __future__ import annotations

from collections.abc import Sequence

from mopd.types import Rollout, TeacherScores
from tests.helpers.stuck import Slow


class Mistaken(Slow):
    """Raises what nobody expects of a teacher."""

    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        raise LookupError("a mistake of this teacher's own")
