"""Step lines for people: a live panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from mopd.metrics.announced import PATIENCE_S
from mopd.metrics.panel import NARROWEST, RunPanel
from mopd.metrics.progress import Activity, Progress
from mopd.metrics.sinks import StepLine
from mopd.metrics.text import printable

REFRESHES_PER_SECOND = 2.0


class ConsoleSink:
    """Shows step, loss, KL per teacher, accuracy per domain, tokens/s and where the time goes.

    On a terminal of at least `NARROWEST` columns a panel that stays at the lower end, news above
    it; otherwise (a pipe, a dumb terminal, an actor of Ray) a plain line every ``log_interval``
    steps and after the last. Names are never read as markup. Nothing of the terminal's state is
    changed: whoever kills the process leaves it in order.
    """

    def __init__(
        self,
        *,
        num_steps: int,
        log_interval: int,
        title: str = "",
        console: Console | None = None,
    ) -> None:
        self._num_steps = num_steps
        self._log_interval = log_interval
        self._console = console or _console()
        self._first_step = 0
        self._started = self._spoken = time.monotonic()
        self._panel: _LivePanel | None = None
        if _is_fit_for_a_panel(self._console):
            self._panel = _LivePanel(Progress(title=title, num_steps=num_steps), self._console)

    def log(self, step: int, line: StepLine) -> None:
        """`step` counts from 0; the person sees how many are done.

        The line of an evaluation is shown in the panel; elsewhere it is left to `note`.
        """
        done = step + 1
        is_evaluation = bool(line) and all(key.startswith("eval/") for key in line)
        if self._panel is not None:
            self._panel.start()
            if is_evaluation:
                self._panel.progress.add_evaluation(done, line)
            else:
                self._panel.progress.add(step, line)
        elif is_evaluation:
            return
        elif done % self._log_interval == 0 or done == self._num_steps:
            shown = " ".join(_fields(line))
            self._write(f"step {done}/{self._num_steps} {shown} left {self._left(done)}")

    def note(self, message: str) -> None:
        """Print one line of news (a checkpoint, a warning) above the panel."""
        self._write(message)

    def activity(self, what: str, done: int, total: int, unit: str) -> None:
        """How far an evaluation is; without a panel a line of it after each `PATIENCE_S` seconds
        of silence."""
        if self._panel is not None:
            self._panel.start()
            now = Activity(what=what, done=done, total=total, unit=unit)
            self._panel.progress.activity = None if done >= total else now
        elif time.monotonic() - self._spoken >= PATIENCE_S:
            self._write(f"{what}: {done}/{total} {unit}")

    def truncate_from(self, step: int) -> None:
        self._first_step = step
        self._started = self._spoken = time.monotonic()
        if self._panel is not None:
            self._panel.progress.restart(step)
            self._panel.start()

    def close(self) -> None:
        """Leaves the panel as it is; safe to call twice."""
        if self._panel is not None:
            self._panel.close()

    def _write(self, text: str) -> None:
        self._spoken = time.monotonic()
        style = "gold3" if self._panel is not None and text.startswith("warning") else ""
        self._console.print(Text(printable(text), style=style), soft_wrap=True)

    def _left(self, done: int) -> timedelta:
        per_step = (time.monotonic() - self._started) / max(done - self._first_step, 1)
        return timedelta(seconds=round(per_step * (self._num_steps - done)))


class _LivePanel:
    """Draws ``progress`` from `start` to `close`, in a thread; what is printed goes above it."""

    def __init__(self, progress: Progress, console: Console) -> None:
        self.progress = progress
        self._console = console
        self._has_started = False
        self._handlers: list[tuple[logging.StreamHandler[TextIO], TextIO]] = []
        self._live = Live(
            RunPanel(progress),
            console=console,
            refresh_per_second=REFRESHES_PER_SECOND,
            vertical_overflow="crop",
        )

    def start(self) -> None:
        """Does nothing where it has started, also when it was closed since."""
        if self._has_started:
            return
        self._has_started = True
        before = sys.stdout, sys.stderr
        self._live.start()
        # rich hides the cursor; shown, a process that is killed leaves nothing to mend
        self._console.show_cursor(True)
        self._handlers = list(_moved_handlers(before))

    def close(self) -> None:
        self._live.stop()
        for handler, stream in self._handlers:
            handler.setStream(stream)
        self._handlers = []


def _moved_handlers(
    before: Sequence[TextIO],
) -> Iterator[tuple[logging.StreamHandler[TextIO], TextIO]]:
    """Loggers keep the streams that they were made with, and would write across the panel: those
    that had one of ``before`` get its successor. Yields what they had."""
    successors = {id(old): new for old, new in zip(before, (sys.stdout, sys.stderr), strict=True)}
    loggers = [logging.getLogger(), *logging.root.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and id(handler.stream) in successors:
                yield handler, handler.stream
                handler.setStream(successors[id(handler.stream)])


def _console() -> Console:
    """Of stdout. A variable such as FORCE_COLOR may colour a pipe; it makes no terminal of it."""
    return Console() if sys.stdout.isatty() else Console(force_terminal=False)


def _is_fit_for_a_panel(console: Console) -> bool:
    return console.is_terminal and not console.is_dumb_terminal and console.width >= NARROWEST


def _fields(line: StepLine) -> Iterator[str]:
    if "loss" in line:
        yield f"loss {line['loss']:.4f}"
    for key, value in line.items():
        if key.startswith("kl/"):
            yield f"{printable(key)} {value:.4f}"
    if "accuracy" in line:
        yield f"accuracy {line['accuracy']:.1%}"
    if "tokens_per_second" in line:
        yield f"tokens/s {line['tokens_per_second']:.0f}"
