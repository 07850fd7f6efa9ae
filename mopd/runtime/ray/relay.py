"""What an actor prints, kept until the driver asks for it: Ray's own way loses the last lines."""

from __future__ import annotations

import io
import sys
import threading
from collections import deque
from typing import TextIO

MAX_LINES = 10_000  # that wait to be asked for; the oldest go
MAX_CHARACTERS = 100_000  # of a line that has no end yet

Line = tuple[bool, str]  # whether it is an error, and the text


class Relay(io.TextIOBase):
    """In place of sys.stdout or sys.stderr: whole lines go to ``lines`` and to ``beneath``."""

    def __init__(self, lines: deque[Line], beneath: TextIO, *, is_error: bool) -> None:
        self._lines = lines
        self._beneath = beneath
        self._is_error = is_error
        self._rest = ""
        self._lock = threading.Lock()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        with self._lock:
            *whole, rest = map(_overwritten, (self._rest + text).split("\n"))
            if len(rest) > MAX_CHARACTERS:
                whole, rest = [*whole, rest], ""
            self._rest = rest
            self._lines.extend((self._is_error, line.rstrip("\r")) for line in whole)
        self._beneath.write(text)
        return len(text)

    def flush(self) -> None:
        self._beneath.flush()

    def fileno(self) -> int:
        """Of the file beneath: for faulthandler, which writes past this object."""
        return self._beneath.fileno()


def _overwritten(line: str) -> str:
    """What a terminal shows of it: bars of progress begin with a carriage return each time."""
    text = line.rstrip("\r")
    return text.rpartition("\r")[2] + line[len(text) :]


class Printed:
    """Both streams of this process, from now on."""

    def __init__(self) -> None:
        self._lines: deque[Line] = deque(maxlen=MAX_LINES)
        sys.stdout = Relay(self._lines, sys.stdout, is_error=False)
        sys.stderr = Relay(self._lines, sys.stderr, is_error=True)

    def take(self) -> list[Line]:
        """The lines since the last call."""
        found = []
        while self._lines:
            found.append(self._lines.popleft())
        return found
