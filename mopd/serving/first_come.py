"""One worker at a time, in the order in which they came. No torch."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

GLANCE_S = 0.05


class NoTurnError(Exception):
    """Gave up while others were still in front."""


class FirstCome:
    """A lock with a line, so that nobody who waits is passed by those who came later."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._line: deque[object] = deque()

    @contextmanager
    def turn(self, *, gives_up: Callable[[], bool]) -> Iterator[None]:
        """Waits until everybody who came before has gone.

        Raises:
            NoTurnError: ``gives_up``, which is asked while it waits, was true.
        """
        me = object()
        with self._changed:
            self._line.append(me)
        try:
            self._wait(me, gives_up)
            yield
        finally:
            with self._changed:
                self._line.remove(me)
                self._changed.notify_all()

    def _wait(self, me: object, gives_up: Callable[[], bool]) -> None:
        with self._changed:
            while self._line[0] is not me:
                if gives_up():
                    raise NoTurnError
                self._changed.wait(GLANCE_S)
