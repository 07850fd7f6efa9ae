"""An engine that takes turns on its devices: brought there when it is asked, away when others wait.

Requests ask for a turn. The first one waits for the lease and for the weights; while the engine
has both, a turn costs nothing. A thread of its own takes the lease, loads, and lets go: when others
wait and the engine is idle, or has had the devices for ``quantum_s``. Then the requests that run
are finished, and later ones wait with the others.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager, suppress

from mopd.errors import MopdError
from mopd.serving.lease import DeviceLease, LeaseTimeout

QUANTUM_S = 10.0  # of holding the devices while others wait
LINGER_S = 0.1  # without a request, while others wait: the next one of a batch is on its way
WAIT_S = 45.0  # of one request for its turn: a little less than a client's deadline by default
LOOK_S = 0.02  # between two looks at the queue
CLOSE_S = 30.0


class Turns:
    """Turns of one engine on one lease.

    Args:
        lease: where it is held already, the engine is on its devices.
        load: brings the engine to its devices. Both are called from one thread, never together.
        release: takes it away from there.
    """

    def __init__(
        self,
        lease: DeviceLease,
        *,
        load: Callable[[], None],
        release: Callable[[], None],
        quantum_s: float = QUANTUM_S,
        linger_s: float = LINGER_S,
        wait_s: float = WAIT_S,
    ) -> None:
        self._lease = lease
        self._load, self._release = load, release
        self._quantum_s, self._linger_s, self._wait_s = quantum_s, linger_s, wait_s
        self._changed = threading.Condition()
        self._waiting: list[Future[None]] = []
        self._active = 0
        self._idle_since = time.monotonic()
        self._is_open = lease.is_held  # requests may begin
        self._is_closing = False
        self._broken: BaseException | None = None
        self._keeper = threading.Thread(target=self._keep, name="device lease", daemon=True)
        self._keeper.start()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The engine is on its devices within. A thread must not nest turns.

        Raises:
            LeaseTimeout: the devices did not come free in time.
            Exception: what ``load`` raised.
        """
        granted = self._ask()
        if granted is not None:
            try:
                granted.result(self._wait_s)
            except BaseException as error:
                self._give_up(granted)
                raise self._late() if _is_late(granted, error) else error from None
        try:
            yield
        finally:
            self._leave()

    @asynccontextmanager
    async def aturn(self) -> AsyncIterator[None]:
        """`turn` for an event loop, which goes on meanwhile."""
        granted = self._ask()
        if granted is not None:
            try:
                await asyncio.wait_for(asyncio.wrap_future(granted), self._wait_s)
            except BaseException as error:
                self._give_up(granted)
                raise self._late() if _is_late(granted, error) else error from None
        try:
            yield
        finally:
            self._leave()

    def close(self) -> None:
        """Lets go after the requests that run; turns that wait fail. Safe to call twice."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._keeper.join(timeout=CLOSE_S)

    def _ask(self) -> Future[None] | None:
        """None: the turn has begun."""
        with self._changed:
            if self._broken is not None:
                raise MopdError(f"{self._lease.owner}: cannot leave its devices") from self._broken
            if self._is_closing:
                raise MopdError(f"{self._lease.owner}: is being closed")
            if self._is_open:
                self._active += 1
                return None
            granted: Future[None] = Future()
            self._waiting.append(granted)
            self._changed.notify_all()
            return granted

    def _give_up(self, granted: Future[None]) -> None:
        # it may have been granted at the last moment
        if not granted.cancel() and granted.exception() is None:
            self._leave()

    def _leave(self) -> None:
        with self._changed:
            self._active -= 1
            self._idle_since = time.monotonic()
            self._changed.notify_all()

    def _late(self) -> LeaseTimeout:
        return LeaseTimeout(
            f"{self._lease.owner}: no turn on the devices within {self._wait_s:g} s; "
            f"{self._lease.last_holder()} had them last"
        )

    def _keep(self) -> None:
        if not self._lease.is_held and not self._taken():
            return
        while True:
            self._until_due()
            try:
                self._release()
            except BaseException as error:  # its memory may be in use for good: all turns say so
                self._fail(error, for_good=True)
            self._lease.release()
            if not self._taken():
                return

    def _taken(self) -> bool:
        """Waits until somebody asks, takes the lease and loads; False: it is being closed."""
        while self._is_demanded():
            try:
                if not self._lease.acquire(wait_s=None, is_given_up=self._is_given_up):
                    continue
                self._load()
            except BaseException as error:
                if self._lease.is_held:
                    with suppress(Exception):
                        self._release()  # what did come to the devices
                    self._lease.release()
                self._fail(error)
            else:
                self._open()
                return True
        self._fail(MopdError(f"{self._lease.owner}: is being closed"))
        return False

    def _is_demanded(self) -> bool:
        with self._changed:
            while not self._is_closing and not self._has_demand():
                self._changed.wait()
            return not self._is_closing

    def _is_given_up(self) -> bool:
        with self._changed:
            return self._is_closing or not self._has_demand()

    def _has_demand(self) -> bool:
        self._waiting = [one for one in self._waiting if not one.cancelled()]
        return bool(self._waiting) and self._broken is None

    def _open(self) -> None:
        with self._changed:
            self._is_open = True
            self._idle_since = time.monotonic()
            for granted in self._waiting:
                if granted.set_running_or_notify_cancel():
                    self._active += 1
                    granted.set_result(None)
            self._waiting.clear()

    def _fail(self, error: BaseException, *, for_good: bool = False) -> None:
        with self._changed:
            self._broken = error if for_good else self._broken
            for granted in self._waiting:
                if granted.set_running_or_notify_cancel():
                    granted.set_exception(error)
            self._waiting.clear()

    def _until_due(self) -> None:
        """Until the devices are to be given away and no request runs."""
        began = time.monotonic()
        with self._changed:
            while True:
                now = time.monotonic()
                idle = self._active == 0 and now - self._idle_since >= self._linger_s
                spent = now - began >= self._quantum_s
                # idle first: the look at the queue costs a little more
                due = self._is_closing or ((idle or spent) and self._lease.is_wanted())
                # once closed it stays so, though they may be gone: requests wait already
                self._is_open = self._is_open and not due
                if not self._is_open and self._active == 0:
                    return
                self._changed.wait(timeout=LOOK_S)


def _is_late(granted: Future[None], error: BaseException) -> bool:
    """The wait ended, not the work: that has a TimeoutError of its own, perhaps."""
    return isinstance(error, TimeoutError) and (granted.cancelled() or granted.exception() is None)
