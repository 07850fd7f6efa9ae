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
SAFE_S = 2.0  # for `check` to raise an interrupt, before it is raised anywhere
END_S = 120.0  # for an interrupted run to close what it opened


class Interrupt:
    """``with Interrupt() as interrupt: ... interrupt.check()`` between two steps.

    Python raises KeyboardInterrupt wherever the main thread happens to be: with the lock of a queue
    in its hands, which nobody gets any more then, or in a finalizer, where it is dropped. So SIGINT
    is raised by `check`, and elsewhere only after ``SAFE_S`` without one.

    SIGTERM sets `is_stopping` and nothing else, so that the loop can save.

    The process ends at once, wherever it is, on SIGINT after SIGTERM, on either of them more than
    ``ONE_REQUEST_S`` after its like, and where it is still here ``END_S`` after SIGINT.
    """

    def __init__(self) -> None:
        self._interrupted: float | None = None  # when, on the monotonic clock
        self._terminated: float | None = None
        self._raised = False
        self._insisted = False
        self._is_own = False  # the next SIGINT that is heard
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
        self._raised = True  # no more of it from here on
        signal.set_wakeup_fd(self._wakeup)
        self._ears[1].close()  # the listener reads the end
        self._thread.join()
        for number, before in self._before.items():
            signal.signal(number, before)  # pyright: ignore[reportArgumentType]
        self._ears[0].close()

    def check(self) -> None:
        """Raises KeyboardInterrupt where one was asked for."""
        if self._interrupted is not None:
            self._raised = True
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """A second SIGINT gets here late only where a library took the socket's place."""
        now = time.monotonic()
        if self._interrupted is None:
            self._interrupted = now
        elif not self._raised and (self._insisted or now - self._interrupted > ONE_REQUEST_S):
            self._raised = True
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Also where a library took the socket's place. Late, so it is never a second request."""
        if self._terminated is None:
            self._terminated = time.monotonic()

    def _listen(self) -> None:
        assert self._ears is not None
        ear = self._ears[0]
        while True:
            ear.settimeout(self._patience_s())
            try:
                numbers = ear.recv(64)
            except TimeoutError:
                self._insist()
                continue
            if not numbers:
                return
            for number in numbers:
                self._hear(number)

    def _hear(self, number: int) -> None:
        now = time.monotonic()
        if number == signal.SIGTERM:
            if self._terminated is None:
                self._terminated = now
            elif now - self._terminated > ONE_REQUEST_S:
                _end(STOPPED)
        elif number == signal.SIGINT:
            if self._is_own:
                self._is_own = False
                return
            if self._interrupted is None:
                self._interrupted = now
            late = now - self._interrupted > ONE_REQUEST_S
            if late or self._terminated is not None:
                _end(INTERRUPTED)

    def _patience_s(self) -> float | None:
        """How long to listen until it is time to insist."""
        if self._interrupted is None:
            return None
        end = self._interrupted + (END_S if self._insisted else SAFE_S)
        return max(end - time.monotonic(), 0.01)

    def _insist(self) -> None:
        if self._insisted:
            _end(INTERRUPTED)
        self._insisted = True
        if not self._raised:
            self._is_own = True
            ident = threading.main_thread().ident
            assert ident is not None
            signal.pthread_kill(ident, signal.SIGINT)  # also ends what the thread waits for


def _end(code: int) -> None:
    print(
        "ended at once, without a checkpoint; the same command continues from the last one",
        file=sys.stderr,
        flush=True,
    )
    os._exit(code)
