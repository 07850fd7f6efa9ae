"""An event loop in a thread of its own, for callers that block."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, wait
from typing import Any, TypeVar

T = TypeVar("T")

GLANCE_S = 0.5  # between two looks at whether the thread still lives
CLOSE_S = 5.0  # for what runs to end, and again for what is closed behind it


class LoopEnded(Exception):
    """The loop was closed, or its thread ended, before there was a result."""


class LoopThread:
    """``ended`` is what ended the thread, where that was not `close`.

    Args:
        release: runs last, when nothing else does: a task that still ran could open a connection
            anew that nobody would close.
    """

    def __init__(self, name: str, *, release: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self.ended: BaseException | None = None
        self.loop = asyncio.new_event_loop()
        self._release = release
        self._closed = False
        # No work is handed over once the end has begun: nobody would run it, or know of it.
        self._lock = threading.Lock()
        self._is_ending = False
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        try:
            self.loop.run_forever()
        except BaseException as error:  # told by whoever waits for this thread
            self.ended = error
        with self._lock:
            self._is_ending = True
        try:
            self.loop.run_until_complete(self._end())
        finally:
            self.loop.close()

    async def _end(self) -> None:
        await _end_tasks()
        async with asyncio.timeout(CLOSE_S):
            await self.loop.shutdown_asyncgens()  # half-read replies, that hold connections
            await self._release()
        await asyncio.sleep(0)  # for what the release has set going
        await _end_tasks()

    def run(self, work: Coroutine[Any, Any, T], *, watch: Callable[[], None] | None = None) -> T:
        """The result of a coroutine in this loop.

        Args:
            watch: called twice a second; what it raises ends the work.
        Raises:
            LoopEnded: and what the coroutine or ``watch`` raises.
        """
        with self._lock:
            if self._closed or self._is_ending:
                work.close()
                raise LoopEnded
            future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            while not wait([future], timeout=GLANCE_S).done:
                if not self._thread.is_alive():
                    raise LoopEnded
                if watch is not None:
                    watch()
            return future.result()
        except CancelledError:
            raise LoopEnded from None
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Ends what runs, releases, and ends the thread; safe to call twice.

        It waits for seconds. A thread that something keeps for longer does all this when it is
        free.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if not self._is_ending:
                self.loop.call_soon_threadsafe(self._stop)
        self._thread.join(timeout=2 * CLOSE_S)

    def _stop(self) -> None:
        if not self._is_ending:  # else it would stop the end itself
            self.loop.stop()


async def _end_tasks() -> None:
    """Cancels every other task of the loop, also those that appear meanwhile, and waits for them.

    One that has not begun is left to begin first: it may wrap a coroutine (anyio's do) that
    nobody would ever await.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + CLOSE_S
    asked: set[asyncio.Task[Any]] = set()
    while (tasks := asyncio.all_tasks() - {asyncio.current_task()}) and loop.time() < end:
        begun = {task for task in tasks if _has_begun(task)} - asked
        for task in begun:
            task.cancel()
        asked |= begun
        if tasks <= asked:
            await asyncio.wait(tasks, timeout=GLANCE_S, return_when=asyncio.FIRST_COMPLETED)
        else:
            await asyncio.sleep(0)


def _has_begun(task: asyncio.Task[Any]) -> bool:
    work = task.get_coro()
    return not inspect.iscoroutine(work) or inspect.getcoroutinestate(work) != inspect.CORO_CREATED
