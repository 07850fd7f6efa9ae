"""Ends a run that makes no progress, with the stacks of its threads: no wait is for ever."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from pathlib import Path
from typing import TextIO

EXIT_CODE = 1
BACKSTOP_S = 30.0  # after the limit, for a process whose Python threads cannot run
GLANCES = 20  # within the limit
LONGEST_GLANCE_S = 5.0


class Watchdog:
    """``with Watchdog(...) as watchdog: ... watchdog.feed()`` after every piece of progress.

    When nothing came for ``limit_s`` seconds (0: never mind), the stacks of all threads go to
    ``<directory>/stall-<rank>.txt`` and stderr, and the process ends with exit code 1: what is
    stuck cannot be asked to clean up. A second clock, which needs no interpreter, does the same
    without the message where a thread keeps the interpreter for itself.
    """

    def __init__(self, limit_s: float, *, directory: Path, rank: int) -> None:
        self._limit_s = limit_s
        self._path = directory / f"stall-{rank}.txt"
        self._rank = rank
        self._fed = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._file: TextIO | None = None

    def __enter__(self) -> Watchdog:
        if self._limit_s > 0:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("w", encoding="utf-8")
            self.feed()
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is None:
            return
        self._over.set()
        self._thread.join(timeout=LONGEST_GLANCE_S)
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        self._file = None
        self._path.unlink(missing_ok=True)

    def feed(self) -> None:
        """A step, or a part of an evaluation, is finished."""
        self._fed = time.monotonic()
        if self._file is not None:
            faulthandler.dump_traceback_later(
                self._limit_s + BACKSTOP_S, exit=True, file=self._file
            )

    def _watch(self) -> None:
        pause = min(self._limit_s / GLANCES, LONGEST_GLANCE_S)
        while not self._over.wait(pause):
            if time.monotonic() - self._fed > self._limit_s:
                self._end()

    def _end(self) -> None:
        """The backstop still runs, should a full disk or pipe hold this up."""
        for file in (self._file, sys.stderr):
            # a stream that is closed, or has no file: the exit counts for more than the report
            with contextlib.suppress(OSError, ValueError):
                if file is not None:
                    faulthandler.dump_traceback(file=file, all_threads=True)
        with contextlib.suppress(OSError, ValueError):
            print(
                f"error: rank {self._rank}: nothing was finished for {self._limit_s:g} s; "
                f"{self._path} shows where every thread stands; mend that, or raise run.stall_s; "
                "the same command continues from the last checkpoint",
                file=sys.stderr,
                flush=True,
            )
            sys.stdout.flush()
        os._exit(EXIT_CODE)
