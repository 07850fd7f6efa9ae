"""What the driver learns of a process that ends, stops or cannot start."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytestmark = [pytest.mark.ray]

SILENT_S = 1.0


class Worker:
    def place(self) -> int:
        return os.getpid()

    def work(self, seconds: float) -> str:
        time.sleep(seconds)
        return "done"

    def news(self) -> str:
        return "well"


@pytest.fixture(scope="module")
def joined(ray_address: str) -> Iterator[None]:
    import ray

    from mopd.runtime.ray.cluster import join

    before = signal.getsignal(signal.SIGTERM)
    join(ray_address)
    assert signal.getsignal(signal.SIGTERM) is before  # not the one of Ray, which exits with 15
    try:
        yield
    finally:
        ray.shutdown()


def _watched() -> Any:
    import ray

    from mopd.runtime.ray.watched import Watched

    actor: Any = ray.remote(Worker).options(num_cpus=0, max_concurrency=4).remote()
    return Watched("worker", actor, pause_s=0.0, silent_s=SILENT_S)


def _until(found: Any, *, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_ended_is_not_waited_for(joined: None) -> None:
    """It stays ready: the driver would look without a pause until the last one has ended."""
    from mopd.runtime.ray.watched import wait_for_news

    watched = _watched()
    assert watched.result() is None  # it was not asked yet
    watched.begin(watched.actor.work.remote(0.0))
    _until(lambda: watched.result() == "done")
    watched.look()
    began = time.monotonic()
    wait_for_news([watched], seconds=0.5)
    assert time.monotonic() - began > 0.4
    watched.kill()


def test_a_process_that_stops_is_ended(joined: None) -> None:
    from mopd.runtime.ray.rank import wait_until_gone
    from mopd.runtime.ray.watched import Gone, value_of
    from tests.helpers.ray_runs import none_left

    watched = _watched()
    pid = value_of(watched.actor.place.remote(), name="worker")
    watched.begin(watched.actor.work.remote(60.0))
    _until(lambda: watched.look() == "well")
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(Gone, match="worker was silent for 1 s"):
        _until(lambda: watched.look() == "never")
    wait_until_gone((pid,))
    assert none_left([pid], seconds=0.1)
