"""Progress of a build: bars on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

PLAIN_INTERVAL_SECONDS = 5.0


class BuildProgress:
    """Shows (phase, step, steps, note) events. ``enabled=False`` shows nothing at all."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self.console = Console(stderr=True)
        self.bars: Progress | None = None
        self.tasks: dict[str, TaskID] = {}
        self.first: dict[str, tuple[float, int]] = {}  # time and step of a phase's first event
        self.printed: dict[str, float] = {}
        if enabled and self.console.is_terminal:
            self.bars = Progress(
                TextColumn("{task.description:<14}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self.console,
            )

    def __enter__(self) -> BuildProgress:
        if self.bars is not None:
            self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bars is not None:
            self.bars.stop()

    def line(self, text: str) -> None:
        """One line, above the bars if there are any."""
        if self.enabled:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def update(self, phase: str, *, step: int, steps: int, note: str) -> None:
        """``step`` equal to ``steps`` ends the phase, and ``note`` says how."""
        if self.bars is not None:
            if phase not in self.tasks:
                self.tasks[phase] = self.bars.add_task(phase, total=steps, note=note)
            self.bars.update(self.tasks[phase], completed=step, total=steps, note=note)
            return
        now = time.monotonic()
        first_time, first_step = self.first.setdefault(phase, (now, step))
        if step == steps:
            self.line(f"world: {phase}: {note}")
        elif now - self.printed.get(phase, first_time) >= PLAIN_INTERVAL_SECONDS:
            self.printed[phase] = now
            left = (now - first_time) / max(step - first_step, 1) * (steps - step)
            self.line(f"world: {phase}: step {step}/{steps}, at most {left:.0f} s left, {note}")
        else:
            self.printed.setdefault(phase, first_time)
