"""Step lines for people: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from mopd.metrics.sinks import StepLine
from mopd.metrics.text import printable


class ConsoleSink:
    """Shows step, loss, KL per teacher, accuracy and tokens/s.

    On a terminal one bar with an estimate of the time left; otherwise a plain line every
    `log_interval` steps and after the last. Names are never read as markup.
    """

    def __init__(
        self, *, num_steps: int, log_interval: int, console: Console | None = None
    ) -> None:
        self._num_steps = num_steps
        self._log_interval = log_interval
        self._console = console or Console()
        self._first_step = 0
        self._started = time.monotonic()
        self._progress = _progress(self._console) if self._console.is_terminal else None
        if self._progress is not None:
            self._progress.start()
            self._task = self._progress.add_task("", total=num_steps)

    def log(self, step: int, line: StepLine) -> None:
        """`step` counts from 0; the person sees how many are done.

        The line of an evaluation is left to `note`.
        """
        if line and all(key.startswith("eval/") for key in line):
            return
        done = step + 1
        shown = " ".join(_fields(line))
        if self._progress is not None:
            self._progress.update(self._task, completed=done, description=shown)
        elif done % self._log_interval == 0 or done == self._num_steps:
            self._write(f"step {done}/{self._num_steps} {shown} left {self._left(done)}")

    def note(self, message: str) -> None:
        """Print one line of news (a checkpoint, a warning) above the bar."""
        self._write(message)

    def truncate_from(self, step: int) -> None:
        self._first_step = step
        self._started = time.monotonic()
        if self._progress is not None:
            self._progress.reset(self._task, completed=step, total=self._num_steps)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()

    def _write(self, text: str) -> None:
        self._console.print(Text(printable(text)), soft_wrap=True)

    def _left(self, done: int) -> timedelta:
        per_step = (time.monotonic() - self._started) / max(done - self._first_step, 1)
        return timedelta(seconds=round(per_step * (self._num_steps - done)))


def _progress(console: Console) -> Progress:
    return Progress(
        MofNCompleteColumn(),
        BarColumn(bar_width=20),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
        console=console,
    )


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
