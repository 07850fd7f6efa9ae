"""What joining a cluster changes in the driver, and what it waits for."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers.ray_attached import Call, attached
from tests.helpers.ray_runs import none_left

pytestmark = [pytest.mark.ray]


@pytest.fixture(scope="module")
def call(ray_address: str) -> Iterator[Call]:
    with attached(ray_address) as found:
        yield found


class Worker:
    def pid(self) -> int:
        return os.getpid()

    def work(self, seconds: float) -> str:
        time.sleep(seconds)
        return "done"

    def news(self) -> str:
        return "well"


def _watched() -> Any:
    import ray

    from mopd.runtime.ray.watched import Watched

    actor: Any = ray.remote(Worker).options(num_cpus=0, max_concurrency=4).remote()
    return Watched("worker", actor, pause_s=0.0, silent_s=60.0)


def _pause_of_what_ended() -> tuple[Any, float]:
    from mopd.runtime.ray.watched import wait_for_news

    watched = _watched()
    before = watched.result()
    watched.begin(watched.actor.work.remote(0.0))
    deadline = time.monotonic() + 30
    while watched.result() != "done" and time.monotonic() < deadline:
        time.sleep(0.02)
    watched.look()
    began = time.monotonic()
    wait_for_news([watched], seconds=0.5)
    took = time.monotonic() - began
    watched.kill()
    return before, took


def test_what_ended_is_not_waited_for(call: Call) -> None:
    """It stays ready: the driver would look without a pause until the last one has ended."""
    before, took = call(_pause_of_what_ended)
    assert before is None and took > 0.4


def _waited_for_a_killed_one() -> int:
    import ray

    from mopd.runtime.ray.rank import wait_until_gone

    watched = _watched()
    pid = ray.get(watched.actor.pid.remote())
    os.kill(pid, signal.SIGKILL)
    wait_until_gone((pid,))
    return pid


def test_a_process_that_was_killed_is_waited_for(call: Call) -> None:
    assert none_left([call(_waited_for_a_killed_one)], seconds=0.1)


def _handlers() -> tuple[bool, bool]:
    """Joins again: whether the handler stayed, and whether there was one of Ray in between."""
    import ray

    from mopd.runtime.ray.cluster import join

    address = ray.get_runtime_context().gcs_address
    ray.shutdown()
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    join(address)
    kept = signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    signal.signal(signal.SIGTERM, before)
    return kept, ray.is_initialized()


def test_sigterm_keeps_its_meaning(call: Call) -> None:
    """Ray's own handler would end the driver with exit code 15."""
    assert call(_handlers) == (True, True)
