"""The pool: teachers behind servers side by side, the others here; one order, the first error."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from mopd.demo import World
from mopd.errors import TeacherError, TeacherExhausted
from mopd.teachers import pool as pool_module
from mopd.teachers.pool import TeacherPool
from mopd.teachers.uniform import UniformTeacher
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Rollout, TeacherScores
from tests.helpers.teachers import make_rollout_of

WAIT_S = 20.0


class Here(UniformTeacher):
    """In process; does something before it scores."""

    def __init__(self, name: str, chat: ChatTokenizer, first: Callable[[], None]) -> None:
        super().__init__(name, tokenizer=chat, student=chat, top_k=2)
        self._first = first
        self.thread = ""
        self.closed = threading.Event()

    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        self.thread = threading.current_thread().name
        self._first()
        return super().score(rollouts)

    def close(self) -> None:
        assert not self.closed.is_set(), "closed twice"
        self.closed.set()


class Away(Here):
    """As if behind a server."""

    concurrent = True


@pytest.fixture(scope="module")
def chat(tiny_world: World) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_world.student)


def rollouts(chat: ChatTokenizer, *names: str) -> list[Rollout]:
    """One, for the teachers of these names."""
    made = make_rollout_of(chat, b"bo")
    return [replace(made, prompt=replace(made.prompt, teachers=names))]


def no_threads_asking() -> bool:
    return not any(thread.name.startswith("asks ") for thread in threading.enumerate())


def nothing() -> None: ...


def test_teachers_behind_servers_are_asked_at_the_same_time(chat: ChatTokenizer) -> None:
    meeting = threading.Barrier(3)

    def meet() -> None:
        meeting.wait(WAIT_S)

    teachers = {"a": Away("a", chat, meet), "b": Here("b", chat, meet), "c": Away("c", chat, meet)}
    found = TeacherPool(teachers).score(rollouts(chat, "a", "b", "c"))
    assert list(found[0]) == ["a", "b", "c"]
    assert [t.thread for t in teachers.values()] == ["asks a", "MainThread", "asks c"]
    assert no_threads_asking()


class Everywhere(Here):
    """Its scores need all ranks."""

    collective = True


def test_teachers_that_need_all_ranks_are_left_out(chat: ChatTokenizer) -> None:
    def never() -> None:
        raise AssertionError

    teachers = {"a": Everywhere("a", chat, never), "b": Here("b", chat, nothing)}
    found = TeacherPool(teachers).score(rollouts(chat, "a", "b"))
    assert list(found[0]) == ["b"]


def test_the_order_is_the_pools_and_not_that_of_arrival(chat: ChatTokenizer) -> None:
    later = threading.Event()
    teachers = {
        "slow": Away("slow", chat, lambda: _must(later.wait(WAIT_S))),
        "quick": Away("quick", chat, later.set),
    }
    (found,) = TeacherPool(teachers).score(rollouts(chat, "quick", "slow"))
    assert list(found) == ["slow", "quick"]
    assert [scores.teacher for scores in found.values()] == ["slow", "quick"]


def test_in_process_teachers_never_overlap(chat: ChatTokenizer) -> None:
    busy = threading.Lock()

    def alone() -> None:
        assert busy.acquire(blocking=False)
        time.sleep(0.02)
        busy.release()

    teachers = {name: Here(name, chat, alone) for name in "abc"}
    TeacherPool(teachers).score(rollouts(chat, "a", "b", "c"))
    assert {t.thread for t in teachers.values()} == {"MainThread"}


def fail(error: BaseException) -> Callable[[], None]:
    def raise_it() -> None:
        raise error

    return raise_it


def test_one_failure_ends_the_others_soon_and_keeps_its_type(chat: ChatTokenizer) -> None:
    """The other one would wait for ever, if it were not closed."""
    failing = Away("b", chat, fail(TeacherExhausted("b", "gone")))
    waiting = Away("a", chat, nothing)
    waiting._first = lambda: _must(waiting.closed.wait(WAIT_S))
    pool = TeacherPool({"a": waiting, "b": failing})
    began = time.monotonic()
    with pytest.raises(TeacherExhausted, match=r"teachers\.b: gone"):
        pool.score(rollouts(chat, "a", "b"))
    assert time.monotonic() - began < 10.0
    assert no_threads_asking() and failing.closed.is_set()
    pool.close()


def test_of_two_failures_the_first_in_order_is_told(
    chat: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "GRACE_S", WAIT_S)
    second = threading.Event()

    def later() -> None:
        second.wait(WAIT_S)
        raise ValueError("first in order")

    def sooner() -> None:
        second.set()
        raise KeyError("sooner")

    pool = TeacherPool({"a": Away("a", chat, later), "b": Away("b", chat, sooner)})
    with pytest.raises(ValueError, match="first in order"):
        pool.score(rollouts(chat, "a", "b"))


def test_a_failure_in_this_thread_ends_the_others_too(chat: ChatTokenizer) -> None:
    waiting = Away("a", chat, nothing)
    waiting._first = lambda: _must(waiting.closed.wait(WAIT_S))
    pool = TeacherPool({"a": waiting, "b": Here("b", chat, fail(ZeroDivisionError()))})
    with pytest.raises(ZeroDivisionError):
        pool.score(rollouts(chat, "a", "b"))
    assert no_threads_asking()


def test_an_exit_in_a_thread_is_an_error(chat: ChatTokenizer) -> None:
    """It would end the run with exit code 0 otherwise, untrained."""
    pool = TeacherPool({"a": Away("a", chat, fail(SystemExit(0)))})
    with pytest.raises(TeacherError, match=r"teachers\.a: its thread ended with SystemExit \(0\)"):
        pool.score(rollouts(chat, "a"))


def test_too_few_scores_are_refused(chat: ChatTokenizer) -> None:
    teacher = Here("a", chat, nothing)
    teacher.score = lambda rollouts: []  # type: ignore[method-assign]
    with pytest.raises(TeacherError, match="0 scores for 1 answers"):
        TeacherPool({"a": teacher}).score(rollouts(chat, "a"))


def test_nobody_is_asked_for_nothing(chat: ChatTokenizer) -> None:
    pool = TeacherPool({"a": Away("a", chat, fail(AssertionError()))})
    assert pool.score(rollouts(chat, "b")) == [{}]
    assert np.array_equal(pool.score([]), [])


def _must(happened: bool) -> None:
    assert happened


class Timing(Here):
    """Two requests a call, and it knows how long each took."""

    def drain_latencies(self) -> list[float]:
        return [0.25, 0.75]


def test_latencies_are_of_requests_or_of_the_call(chat: ChatTokenizer) -> None:
    pool = TeacherPool(
        {"a": Timing("a", chat, nothing), "b": Here("b", chat, lambda: time.sleep(0.02))}
    )
    pool.score(rollouts(chat, "a", "b"))
    pool.score(rollouts(chat, "a"))
    found = pool.latencies()
    assert found["a"] == [0.25, 0.75, 0.25, 0.75]
    assert len(found["b"]) == 1 and 0.02 <= found["b"][0] < 60
    assert pool.latencies() == {}


class Busy(Here):
    """Asked for other things than scores as well, as for answers."""

    def __init__(self, chat: ChatTokenizer) -> None:
        self.took = [9.0]
        super().__init__("a", chat, lambda: self.took.append(0.5))

    def drain_latencies(self) -> list[float]:
        found, self.took = self.took, []
        return found


def test_requests_before_the_scores_are_no_latencies_of_them(chat: ChatTokenizer) -> None:
    pool = TeacherPool({"a": Busy(chat)})
    pool.score(rollouts(chat, "a"))
    assert pool.latencies() == {"a": [0.5]}
