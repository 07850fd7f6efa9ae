"""All teachers of a run, those behind servers side by side; routing is data on the prompt."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mopd.errors import TeacherError
from mopd.teachers.base import Collective, Concurrent, Counting, Teacher, Timed, cut_rows
from mopd.types import Rollout, TeacherScores

GRACE_S = 0.5  # for teachers that fail together, so that the first of them in order is named
END_S = 3.0  # for a closed teacher to let go of its thread


@dataclass(slots=True)
class _Call:
    """One teacher asked for its rollouts, here or in a thread."""

    name: str
    teacher: Teacher
    index: list[int]  # of its rollouts among all
    scores: Sequence[TeacherScores] | None = None
    error: Exception | None = None
    seconds: float = 0.0
    thread: threading.Thread | None = None

    @property
    def concurrent(self) -> bool:
        return isinstance(self.teacher, Concurrent) and self.teacher.concurrent

    def start(self, rollouts: Sequence[Rollout], done: queue.SimpleQueue[_Call]) -> None:
        def ask() -> None:
            try:
                self.run(rollouts)
            except Exception as error:  # raised by the thread that waits
                self.error = error
            except BaseException as error:  # as it is, it would end the run with its own exit code
                self.error = TeacherError(
                    f"teachers.{self.name}: its thread ended with {type(error).__name__} ({error})"
                )
                self.error.__cause__ = error
            done.put(self)

        self.thread = threading.Thread(target=ask, name=f"asks {self.name}", daemon=True)
        self.thread.start()

    def run(self, rollouts: Sequence[Rollout]) -> None:
        began = time.monotonic()
        scores = self.teacher.score([rollouts[i] for i in self.index])
        self.seconds = time.monotonic() - began
        if len(scores) != len(self.index):
            raise TeacherError(
                f"teachers.{self.name}: {len(scores)} scores for {len(self.index)} answers"
            )
        self.scores = scores


class TeacherPool:
    """Scores every rollout with the teachers its prompt names.

    Teachers that are `Concurrent` run in threads of their own, the others in the calling thread,
    one after another; those that are `Collective` are left out. A wait is as long as the teachers'
    own deadlines.
    """

    def __init__(self, teachers: Mapping[str, Teacher], *, top_k: int | None = None) -> None:
        self.teachers = teachers
        self._top_k = top_k  # of the recipe; cuts whole rows of teachers that send them unasked
        self._closed = False
        self._latencies: dict[str, list[float]] = {}

    def score(self, rollouts: Sequence[Rollout]) -> list[dict[str, TeacherScores]]:
        """Per rollout: teacher name -> scores, in the pool's order, with as many entries a row as
        the rollout's prompt asks for.

        Raises:
            Exception: a teacher's, as it is; of several at a time the first in the pool's order.
                The pool is closed then.
        """
        calls = [
            _Call(name, teacher, index)
            for name, teacher in self.teachers.items()
            if not (isinstance(teacher, Collective) and teacher.collective)
            and (index := [i for i, r in enumerate(rollouts) if name in r.prompt.teachers])
        ]
        for call in calls:
            if isinstance(call.teacher, Timed):
                call.teacher.drain_latencies()  # of what else it was asked
        try:
            _ask(calls, rollouts)
        except BaseException:
            self.close()
            _wait_for_threads(calls)
            raise
        results: list[dict[str, TeacherScores]] = [{} for _ in rollouts]
        for call in calls:
            assert call.scores is not None
            teacher, took = call.teacher, [call.seconds]
            if isinstance(teacher, Timed):
                took = teacher.drain_latencies()
            self._latencies.setdefault(call.name, []).extend(took)
            for i, score in zip(call.index, call.scores, strict=True):
                whole = self._top_k if score.topk_ids is None else None
                results[i][call.name] = cut_rows(score, rollouts[i].prompt.top_k or whole)
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

    def latencies(self) -> dict[str, list[float]]:
        """Seconds since the last call, by teacher: of each request that was answered, or of each
        call where there are no requests."""
        found, self._latencies = self._latencies, {}
        return found

    def close(self) -> None:
        """Closes every teacher; safe to call twice."""
        if self._closed:
            return
        self._closed = True
        for teacher in self.teachers.values():
            teacher.close()


def _ask(calls: Sequence[_Call], rollouts: Sequence[Rollout]) -> None:
    done: queue.SimpleQueue[_Call] = queue.SimpleQueue()
    waiting = [call for call in calls if call.concurrent]
    for call in waiting:
        call.start(rollouts, done)
    for call in calls:
        if not call.concurrent:
            if any(other.error for other in waiting):
                break
            call.run(rollouts)
    for _ in waiting:
        if done.get().error is not None:
            _settle(waiting, GRACE_S)
            break
    else:
        _settle(waiting, END_S)  # a thread ends a moment later than its work
    for call in waiting:
        if call.error is not None:
            raise call.error


def _wait_for_threads(calls: Sequence[_Call]) -> None:
    _settle([call for call in calls if call.thread is not None], END_S)


def _settle(calls: Sequence[_Call], seconds: float) -> None:
    """Waits until the threads end, at most so long."""
    end = time.monotonic() + seconds
    for call in calls:
        if call.thread is not None:
            call.thread.join(timeout=max(0.0, end - time.monotonic()))
