"""A long silence explained: what the program is busy with, and for how long it has been."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from mopd.metrics.text import printable

PATIENCE_S = 5.0


@contextmanager
def announced(
    what: str, *, after_s: float = PATIENCE_S, say: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Says ``what`` once the block takes longer than ``after_s`` seconds, again whenever the time
    has tripled, and at last how long it took. A shorter block says nothing.

    Of several ranks only rank 0 speaks.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    speak = say or _say
    started = time.monotonic()
    over = threading.Event()
    has_spoken = threading.Event()

    def watch() -> None:
        due = after_s
        while not over.wait(max(0.0, started + due - time.monotonic())):
            speak(printable(f"{what}: {time.monotonic() - started:.0f} s so far"))
            has_spoken.set()
            due *= 3

    thread = threading.Thread(target=watch, name="announced", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    if has_spoken.is_set():
        speak(printable(f"{what}: done after {time.monotonic() - started:.0f} s"))


def _say(message: str) -> None:
    with suppress(OSError):  # nobody reads any more, and the work goes on
        print(message, flush=True)
