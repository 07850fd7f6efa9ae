"""An interrupt waits for the next look, if that is soon; SIGTERM waits for one look, not two."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from mopd.runtime import signals
from mopd.runtime.signals import INTERRUPTED, STOPPED, Interrupt
from tests.helpers.runs import ROOT


class Finalizer:
    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_in_a_finalizer_is_raised_at_the_next_look() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Interrupt() as interrupt:
        interrupt.check()
        Finalizer()
        with pytest.raises(KeyboardInterrupt):
            interrupt.check()
        assert not interrupt.is_stopping
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert signal.set_wakeup_fd(-1) == -1


def test_an_interrupt_that_nobody_looks_for_is_raised_soon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(signals, "SAFE_S", 1.0)
    waits = False
    with Interrupt():
        with pytest.raises(KeyboardInterrupt):  # also where a pause comes between the two
            os.kill(os.getpid(), signal.SIGINT)
            waits = True  # nothing is raised here
            time.sleep(60.0)
        assert waits
        os.kill(os.getpid(), signal.SIGINT)  # as torchrun does once more: what closes is left alone
        time.sleep(0.5)


def test_an_interrupt_leaves_no_lock_behind() -> None:
    """Raised wherever the main thread is, a fifth of them would."""
    for number in range(100):
        found: queue.Queue[int] = queue.Queue()
        timer = threading.Timer(number * 1e-5, os.kill, (os.getpid(), signal.SIGINT))
        with Interrupt() as interrupt, pytest.raises(KeyboardInterrupt):
            timer.start()
            while True:
                interrupt.check()
                for _ in range(100):
                    found.put(1)
        timer.join()
        assert not found.mutex.locked()


def wait_until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 10.0
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_request_to_stop_raises_nothing() -> None:
    with Interrupt() as interrupt:
        assert not interrupt.is_stopping
        for _ in range(3):  # from the scheduler, from torchrun, and once more
            os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: interrupt.is_stopping)
        interrupt.check()
    assert interrupt.is_stopping


# The main thread waits in C for ever, as in a collective: Python's handlers never run.
STUCK = """
import ctypes
from mopd.runtime import signals
signals.ONE_REQUEST_S, signals.SAFE_S, signals.END_S = 0.2, 0.1, {end_s}
with signals.Interrupt():
    print("ready", flush=True)
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)
"""


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [
        (signal.SIGTERM, signal.SIGTERM, STOPPED),
        (signal.SIGTERM, signal.SIGINT, INTERRUPTED),
        (signal.SIGINT, signal.SIGINT, INTERRUPTED),
    ],
)
def test_a_second_signal_ends_at_once(
    first: signal.Signals, second: signal.Signals, code: int
) -> None:
    with stuck(end_s=60.0) as process:
        process.send_signal(first)
        time.sleep(1.5)  # far above ONE_REQUEST_S: the process may hear the first one late
        assert process.poll() is None
        process.send_signal(second)
        assert_ended(process, code)


def test_an_interrupted_run_that_cannot_end_is_ended() -> None:
    with stuck(end_s=0.4) as process:
        process.send_signal(signal.SIGINT)
        assert_ended(process, INTERRUPTED)


@contextmanager
def stuck(*, end_s: float) -> Iterator[subprocess.Popen[str]]:
    words = [sys.executable, "-c", STUCK.format(end_s=end_s)]
    with subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


def assert_ended(process: subprocess.Popen[str], code: int) -> None:
    _, errors = process.communicate(timeout=20)
    assert process.returncode == code
    assert errors.startswith("ended at once") and errors.count("\n") == 1
