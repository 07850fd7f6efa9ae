"""An interrupt arrives, at the latest at the next look; SIGTERM waits for one look, not two."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

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


def test_an_interrupt_elsewhere_is_raised_at_once() -> None:
    with Interrupt(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()


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
signals.ONE_REQUEST_S = 0.2
with signals.Interrupt():
    print("ready", flush=True)
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)
"""


@pytest.mark.parametrize(
    ("second", "code"), [(signal.SIGTERM, STOPPED), (signal.SIGINT, INTERRUPTED)]
)
def test_a_second_signal_ends_at_once(second: signal.Signals, code: int) -> None:
    words = [sys.executable, "-c", STUCK]
    with subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        time.sleep(0.6)
        assert process.poll() is None
        process.send_signal(second)
        try:
            _, errors = process.communicate(timeout=10)
        finally:
            process.kill()
    assert process.returncode == code
    assert errors.startswith("ended at once") and errors.count("\n") == 1
