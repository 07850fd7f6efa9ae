"""What runs in a loop beside the callers, and in which order it ends."""

from __future__ import annotations

import asyncio
import gc
import socket
import sys
import threading
import time
import warnings
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from mopd.serving import loop_thread as loop_thread_module
from mopd.serving.http import HttpOptions, HttpServer
from mopd.serving.loop_thread import LoopEnded, LoopThread


class Held:
    """Counts what was opened and not closed; a task that is stopped opens once more."""

    def __init__(self) -> None:
        self.opened = 0
        self.running = threading.Event()

    async def work(self) -> None:
        self.opened += 1
        self.running.set()
        try:
            await asyncio.sleep(60.0)
        finally:
            await asyncio.sleep(0.0)
            self.opened += 1

    async def release(self) -> None:
        self.opened = 0


@pytest.fixture
def held() -> Held:
    return Held()


@pytest.fixture
def thread(held: Held) -> Iterator[LoopThread]:
    thread = LoopThread("test", release=held.release)
    yield thread
    thread.close()
    assert thread.loop.is_closed() and held.opened == 0


def asked(
    thread: LoopThread, held: Held, *, until: threading.Event | None = None
) -> tuple[threading.Thread, list[BaseException]]:
    """Another thread that waits for `Held.work`; returns when that runs, or at ``until``."""
    told: list[BaseException] = []

    def ask() -> None:
        try:
            thread.run(held.work())
        except BaseException as error:
            told.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    assert (until or held.running).wait(5.0)
    return asking, told


def test_a_result_and_an_error_reach_the_caller(thread: LoopThread) -> None:
    async def half(number: int) -> int:
        return number // 2

    async def broken() -> None:
        raise KeyError("it")

    assert thread.run(half(8)) == 4
    with pytest.raises(KeyError, match="it"):
        thread.run(broken())


def test_closing_releases_behind_the_last_task(thread: LoopThread, held: Held) -> None:
    asking, told = asked(thread, held)
    thread.close()
    asking.join(5.0)
    assert [type(error) for error in told] == [LoopEnded]
    assert held.opened == 0 and thread.loop.is_closed()
    with pytest.raises(LoopEnded):
        thread.run(held.work())


def test_a_stop_that_comes_late_does_not_stop_the_end(thread: LoopThread, held: Held) -> None:
    """Of a thread that ended by itself just when it was closed."""
    asking, told = asked(thread, held)

    def end() -> None:
        thread.loop.call_soon(thread._stop)
        sys.exit(3)

    thread.loop.call_soon_threadsafe(end)
    asking.join(5.0)
    assert [type(error) for error in told] == [LoopEnded]
    thread.close()
    assert thread.loop.is_closed() and held.opened == 0


def test_a_thread_that_ends_by_itself_is_told_and_releases(thread: LoopThread, held: Held) -> None:
    asking, told = asked(thread, held)
    thread.loop.call_soon_threadsafe(sys.exit, 3)
    asking.join(5.0)
    assert [type(error) for error in told] == [LoopEnded]
    assert isinstance(thread.ended, SystemExit)
    with pytest.raises(LoopEnded):
        thread.run(held.work())


def test_a_thread_that_is_kept_releases_when_it_is_free(
    thread: LoopThread, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_thread_module, "CLOSE_S", 0.05)
    asking, told = asked(thread, held)
    free = threading.Event()
    thread.loop.call_soon_threadsafe(free.wait, 60.0)
    thread.close()
    assert held.opened == 1  # `close` did not wait for ever
    free.set()
    asking.join(5.0)
    assert [type(error) for error in told] == [LoopEnded]
    end = time.monotonic() + 5.0
    while not thread.loop.is_closed() and time.monotonic() < end:
        time.sleep(0.01)
    assert thread.loop.is_closed() and held.opened == 0


def test_work_that_is_handed_over_while_it_closes_is_ended(
    thread: LoopThread, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the end nobody would run it, and it would never be awaited."""
    handed, submit = threading.Event(), asyncio.run_coroutine_threadsafe

    def late(work: Any, loop: asyncio.AbstractEventLoop) -> Any:
        handed.set()
        time.sleep(0.2)  # for `close` to overtake it
        return submit(work, loop)

    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", late)
    asking, told = asked(thread, held, until=handed)
    thread.close()
    asking.join(5.0)
    assert [type(error) for error in told] == [LoopEnded]


def test_a_watch_ends_the_work(thread: LoopThread, held: Held) -> None:
    def watch() -> None:
        raise TimeoutError("enough")

    with pytest.raises(TimeoutError, match="enough"):
        thread.run(held.work(), watch=watch)
    end = time.monotonic() + 5.0
    while held.opened < 2 and time.monotonic() < end:
        time.sleep(0.01)
    assert held.opened == 2  # it was cancelled, and the thread goes on


@pytest.mark.parametrize("turns", range(8))
def test_closing_at_any_moment_of_a_connection_leaves_nothing(
    turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a library's task has not begun yet, and where a reply is half read."""
    left: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: left.append(found.exc_value))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        options = HttpOptions(deadline_s=60.0, connect_s=60.0, max_connections=2)
        server = HttpServer(f"http://127.0.0.1:{listening.getsockname()[1]}", options)
        thread = LoopThread("test", release=server.close)

        async def begin() -> None:
            asking = [asyncio.create_task(server.request("GET", "/", max_bytes=9)) for _ in "ab"]
            for _ in range(turns):
                await asyncio.sleep(0)
            thread.loop.call_soon(sys.exit, 3)
            await asyncio.wait(asking)

        with pytest.raises(LoopEnded):
            thread.run(begin())
        thread.close()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        gc.collect()
    assert thread.loop.is_closed()
    assert [str(one) for one in left] == [] and [str(one.message) for one in told] == []


def test_a_half_read_reply_is_closed_behind_its_task(held: Held) -> None:
    async def lines() -> AsyncIterator[int]:
        held.opened += 1
        try:
            while True:
                yield held.opened
        finally:
            await asyncio.sleep(0)
            held.opened -= 1

    async def read() -> AsyncIterator[int]:
        found = lines()
        await anext(found)
        return found

    async def nothing() -> None:
        pass

    thread = LoopThread("test", release=nothing)
    kept = thread.run(read())
    assert held.opened == 1
    thread.close()
    assert held.opened == 0 and thread.loop.is_closed()
    del kept
