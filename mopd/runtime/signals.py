"""Signals that cannot get lost: an interrupt ends the run, SIGTERM lets it save first."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from types import FrameType

STOPPED, INTERRUPTED = 128 + signal.SIGTERM, 128 + signal.SIGINT  # exit codes, as shells count
# A scheduler tells every process, and torchrun tells its workers once more: that is one request.
ONE_REQUEST_S = 3.0


class Interrupt:
    """``with Interrupt() as interrupt: ... interrupt.check()`` between two steps.

    Python raises KeyboardInterrupt wherever the main thread happens to be, and drops it where that
    is a finalizer or a callback of a library. `check` raises it again.

    SIGTERM sets `is_stopping` and nothing else, so that the loop can save. Another one more than
    ``ONE_REQUEST_S`` later, or SIGINT after it, ends the process at once, wherever it is.
    """

    def __init__(self) -> None:
        self._asked = False
        self._terminated: float | None = None  # when, on the monotonic clock
        self._before: dict[int, object] = {}
        self._wakeup = -1
        self._ears: tuple[socket.socket, socket.socket] | None = None
        self._thread: threading.Thread | None = None

    @property
    def is_stopping(self) -> bool:
        """Whether SIGTERM came."""
        return self._terminated is not None

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is not threading.main_thread():
            return self
        # Python runs handlers in the main thread, between two of its instructions: not while it
        # waits in a collective. The number of a signal, however, is written to a socket at once.
        self._ears = socket.socketpair()
        for ear in self._ears:
            ear.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._ears[1].fileno(), warn_on_full_buffer=False)
        self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._handle)
        self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._note)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._ears is None or self._thread is None:
            return
        for number, before in self._before.items():
            signal.signal(number, before)  # pyright: ignore[reportArgumentType]
        signal.set_wakeup_fd(self._wakeup)
        self._ears[1].close()  # the listener reads the end
        self._thread.join()
        self._ears[0].close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Also where a library took the socket's place. Late, so it is never a second request."""
        if self._terminated is None:
            self._terminated = time.monotonic()

    def _listen(self) -> None:
        assert self._ears is not None
        ear = self._ears[0]
        ear.setblocking(True)
        while numbers := ear.recv(64):
            for number in numbers:
                self._hear(number)

    def _hear(self, number: int) -> None:
        if number == signal.SIGTERM and self._terminated is None:
            self._terminated = time.monotonic()
            return
        if self._terminated is None:
            return
        if number == signal.SIGINT:
            _end(INTERRUPTED)
        if number == signal.SIGTERM and time.monotonic() - self._terminated > ONE_REQUEST_S:
            _end(STOPPED)

    def check(self) -> None:
        """Raises KeyboardInterrupt where one was asked for."""
        if self._asked:
            raise KeyboardInterrupt


def _end(code: int) -> None:
    print(
        "ended at once, without a checkpoint; the same command continues from the last one",
        file=sys.stderr,
        flush=True,
    )
    os._exit(code)
