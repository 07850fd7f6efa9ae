"""A program on a terminal of its own: what it draws, and in which state it leaves the terminal."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """``with Terminal(words, ...) as terminal: terminal.read_until("step")``."""

    def __init__(
        self, words: Sequence[str], *, cwd: Path, env: Mapping[str, str], columns: int, rows: int
    ) -> None:
        self._main, self._other = pty.openpty()
        fcntl.ioctl(self._other, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self._before = termios.tcgetattr(self._other)
        self.output = ""  # all of it, with its escapes
        # a read may end in the middle of a letter
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.process = subprocess.Popen(
            words,
            cwd=cwd,
            env=dict(env),
            stdin=self._other,
            stdout=self._other,
            stderr=self._other,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._main)
        os.close(self._other)

    @property
    def text(self) -> str:
        """Everything without escapes."""
        return ESCAPES.sub("", self.output)

    @property
    def is_restored(self) -> bool:
        """The line discipline is what it was, and the cursor is shown."""
        hidden, shown = self.output.rfind("\x1b[?25l"), self.output.rfind("\x1b[?25h")
        return termios.tcgetattr(self._other) == self._before and hidden <= shown

    def type(self, keys: bytes) -> None:
        os.write(self._main, keys)

    def read_until(self, text: str, *, timeout: float) -> bool:
        """Whether ``text`` came in time; also False where the program ended without it."""
        deadline = time.monotonic() + timeout
        while text not in self.text:
            is_over = self.process.poll() is not None
            if not self._read(deadline) and is_over:
                return False
            if time.monotonic() > deadline:
                return False
        return True

    def wait(self, *, timeout: float) -> int:
        """The exit code."""
        deadline = time.monotonic() + timeout
        while self.process.poll() is None and time.monotonic() < deadline:
            self._read(deadline)
        while self._read(time.monotonic()):
            pass
        return self.process.wait(timeout=1.0)

    def _read(self, deadline: float) -> bool:
        pause = min(0.2, max(0.0, deadline - time.monotonic()))
        if not select.select([self._main], [], [], pause)[0]:
            return False
        self.output += self._decoder.decode(os.read(self._main, 65536))
        return True
