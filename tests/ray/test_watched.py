"""An actor that is asked for news: it answers, is silent, dies, or cannot be reached."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers.ray_attached import Call, attached
from tests.helpers.ray_runs import none_left

pytestmark = pytest.mark.ray

LONG_S = 60.0  # longer than any wait here
# Ray's books may be late on a busy machine. A lost connection counts as a death once they say so,
# and after a second, by default, as an actor that cannot be reached.
PATIENT = {"RAY_timeout_ms_task_wait_for_death_info": "60000"}


@pytest.fixture(scope="module")
def call(ray_address: str) -> Iterator[Call]:
    with attached(ray_address, PATIENT) as found:
        yield found


class Small:
    """As small as an actor can be that works and tells."""

    def __init__(self) -> None:
        self._asked = 0
        self._let_go = threading.Event()

    def pid(self) -> int:
        return os.getpid()

    def work(self, seconds: float) -> str:
        time.sleep(seconds)
        return "done"

    def work_until_let_go(self) -> str:
        self._let_go.wait(LONG_S)
        return "done"

    def let_go(self) -> None:
        self._let_go.set()

    def fail(self) -> None:
        raise ZeroDivisionError("ours")

    def news(self) -> int:
        self._asked += 1
        return self._asked


def _watched(*, pause_s: float = 0.0, silent_s: float = LONG_S) -> tuple[Any, int]:
    import ray

    from mopd.runtime.ray.watched import Watched

    actor = ray.remote(Small).options(num_cpus=0, max_concurrency=4, max_restarts=0).remote()
    return (
        Watched("small", actor, pause_s=pause_s, silent_s=silent_s),
        ray.get(actor.pid.remote()),
    )


def _look_until(one: Any, *, wanted: int) -> list[Any]:
    """The next answers, or the error that came instead."""
    from mopd.runtime.ray.watched import Gone

    found: list[Any] = []
    deadline = time.monotonic() + 30
    while len(found) < wanted and time.monotonic() < deadline:
        try:
            news = one.look()
        except Gone as error:
            return [*found, str(error)]
        found += [] if news is None else [news]
        time.sleep(0.02)
    return found


def _answers() -> tuple[list[Any], Any, Any, int]:
    one, _ = _watched()
    one.begin(one.actor.work_until_let_go.remote())
    before = one.result()
    first = one.look()  # asks, and waits for nothing
    found = [first, *_look_until(one, wanted=3)]
    one.actor.let_go.remote()
    import ray

    ray.wait([one.work], timeout=30)
    result, waiting = one.result(), len(one.waiting)
    one.kill()
    return found, before, result, waiting


def test_news_and_the_result(call: Call) -> None:
    found, before, result, waiting = call(_answers)
    assert found == [None, 1, 2, 3]
    assert (before, result) == (None, "done")
    assert waiting in (0, 1)  # of the work that is over nobody waits


def _pauses() -> int:
    one, _ = _watched(pause_s=LONG_S)
    one.begin(one.actor.work.remote(LONG_S))
    found = _look_until(one, wanted=1)
    for _ in range(20):
        one.look()
        time.sleep(0.02)
    asked = len(one.waiting)
    one.kill()
    return 10 * len(found) + asked


def test_between_two_questions_is_a_pause(call: Call) -> None:
    assert call(_pauses) == 11  # one answer, and no second question beside the work


def _stopped() -> tuple[list[Any], int, str]:
    from mopd.runtime.ray.watched import Gone

    one, pid = _watched(silent_s=0.5)
    one.begin(one.actor.work.remote(LONG_S))
    os.kill(pid, signal.SIGSTOP)
    found = _look_until(one, wanted=1)
    import ray

    ray.wait([one.work], timeout=30)  # a kill is not instant
    try:
        return found, pid, str(one.result())
    except Gone as error:
        return found, pid, str(error)


def test_a_silent_one_is_ended(call: Call) -> None:
    found, pid, result = call(_stopped)
    assert found == ["small was silent for 0.5 s"]
    assert result == "small died"
    assert none_left([pid])


def _killed() -> tuple[list[Any], str]:
    import ray

    from mopd.runtime.ray.watched import Gone

    one, pid = _watched()
    one.begin(one.actor.work.remote(LONG_S))
    _look_until(one, wanted=1)
    os.kill(pid, signal.SIGKILL)
    found = _look_until(one, wanted=10_000)
    ray.wait([one.work], timeout=30)
    try:
        one.result()
    except Gone as error:
        return found[-1:], str(error)
    finally:
        one.kill()  # once more does no harm
    return found, "a result"


def test_a_dead_one(call: Call) -> None:
    news, result = call(_killed)
    assert news in (["small died"], ["small cannot be reached"])
    assert result == "small died"


def _mistake() -> str:
    one, _ = _watched()
    one.begin(one.actor.fail.remote())
    import ray

    ray.wait([one.work], timeout=30)
    try:
        one.result()
    except ZeroDivisionError as error:
        return type(error).__name__
    finally:
        one.kill()
    return "nothing"


def test_a_mistake_inside_is_no_death(call: Call) -> None:
    assert "ZeroDivisionError" in call(_mistake)


def _unavailable() -> str:
    import ray
    from ray.exceptions import ActorUnavailableError

    from mopd.runtime.ray.watched import Gone, value_of

    @ray.remote(num_cpus=0)
    def lost() -> None:
        raise ActorUnavailableError("a lost connection", None)

    try:
        value_of(lost.remote(), name="small")
    except Gone as error:
        return str(error)
    return "nothing"


def test_one_that_cannot_be_reached(call: Call) -> None:
    """Its node may come back, but what it was asked is lost."""
    assert call(_unavailable) == "small cannot be reached"


def _late() -> bool:
    from mopd.runtime.ray.watched import value_of

    one, _ = _watched()
    try:
        value_of(one.actor.work.remote(LONG_S), name="small", timeout_s=0.2)
    except TimeoutError:
        return True
    finally:
        one.kill()
    return False


def test_an_answer_that_takes_too_long(call: Call) -> None:
    assert call(_late)


def _waits(*, dies: bool, seconds: float) -> float:
    from mopd.runtime.ray.watched import wait_for_news

    one, pid = _watched()
    one.begin(one.actor.work.remote(LONG_S))
    if dies:
        threading.Timer(0.3, lambda: os.kill(pid, signal.SIGKILL)).start()
    before = time.monotonic()
    wait_for_news([one], seconds=seconds)
    waited = time.monotonic() - before
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return waited


def _waits_for_a_death() -> float:
    return _waits(dies=True, seconds=LONG_S)


def _waits_in_vain() -> float:
    return _waits(dies=False, seconds=0.5)


def test_a_death_is_noticed_at_once(call: Call) -> None:
    assert call(_waits_for_a_death) < LONG_S / 2
    assert call(_waits_in_vain) >= 0.4
