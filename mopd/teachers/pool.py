"""All teachers of a run, asked in one fixed order; routing is data on the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mopd.teachers.base import Counting, Teacher, cut_rows
from mopd.types import Rollout, TeacherScores


class TeacherPool:
    """Scores every rollout with the teachers its prompt names."""

    def __init__(self, teachers: Mapping[str, Teacher]) -> None:
        self.teachers = teachers

    def score(self, rollouts: Sequence[Rollout]) -> list[dict[str, TeacherScores]]:
        """Per rollout: teacher name -> scores, in the pool's order, with as many entries a row as
        the rollout's prompt asks for."""
        results: list[dict[str, TeacherScores]] = [{} for _ in rollouts]
        for name, teacher in self.teachers.items():
            index = [i for i, r in enumerate(rollouts) if name in r.prompt.teachers]
            if index:
                scores = teacher.score([rollouts[i] for i in index])
                for i, score in zip(index, scores, strict=True):
                    results[i][name] = cut_rows(score, rollouts[i].prompt.top_k)
        return results

    def troubles(self) -> dict[str, int]:
        """What went wrong since the last call, of teachers that count it: missing/<teacher>/<why>
        positions without a score, requests/<teacher>/<why> that failed."""
        return {
            f"{kind}/{name}/{reason}": count
            for name, teacher in self.teachers.items()
            if isinstance(teacher, Counting)
            for kind, counts in teacher.drain().items()
            for reason, count in counts.items()
        }

    def close(self) -> None:
        for teacher in self.teachers.values():
            teacher.close()
