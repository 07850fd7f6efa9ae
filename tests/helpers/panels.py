"""A panel of a run that never was, at any width; ``python -m tests.helpers.panels FILE.svg``."""

from __future__ import annotations

import io
import math
import sys
from itertools import count
from pathlib import Path

from rich.console import Console

from mopd.metrics.panel import RunPanel
from mopd.metrics.progress import Activity, Progress

SECONDS_PER_STEP = 0.2
PHASES = {
    "rollout": 0.090,
    "teachers": 0.034,
    "align": 0.010,
    "train": 0.052,
    "sync": 0.008,
    "wait": 0.0,
    "other": 0.006,
}


def progress(*, steps: int = 240, names: tuple[str, ...] = ("sort", "upper")) -> Progress:
    """After ``steps`` of 500 steps, with a held-out evaluation after step 200."""
    ticks = count()
    made = Progress(
        title="mopd_ctkd", num_steps=500, clock=lambda: next(ticks) * SECONDS_PER_STEP / 1
    )
    made.restart(0)
    for step in range(steps):
        gone = 1 - math.exp(-step / 70)
        wave = math.sin(step / 9) * math.exp(-step / 150)
        line = {"loss": 0.6 - 0.58 * gone + 0.04 * wave, "tokens_per_second": 1690.4, "lr": 1e-3}
        line |= {"grad_norm": 0.42, "accuracy": 0.97 * gone}
        for i, name in enumerate(names):
            line[f"kl/{name}"] = (0.5 + 0.1 * i) * (1 - gone) + 0.01 + 0.01 * abs(wave)
            line[f"accuracy/{name}"] = min(1.0, max(0.0, (0.98 - 0.03 * i) * gone + 0.02 * wave))
        made.add(step, line | {f"phase/{name}": seconds for name, seconds in PHASES.items()})
        if step == 199:
            made.add_evaluation(
                200, {f"eval/accuracy/{name}": 0.93 - 0.02 * i for i, name in enumerate(names)}
            )
    return made


def rendered(made: Progress, *, width: int, height: int = 40, no_color: bool = False) -> list[str]:
    """The lines of the panel, without colours."""
    console = Console(
        file=io.StringIO(),
        force_terminal=True,
        width=width,
        height=height,
        record=True,
        no_color=no_color,
        color_system=None if no_color else "truecolor",
    )
    console.print(RunPanel(made))
    return console.export_text().splitlines()


def svg(made: Progress, *, width: int, title: str) -> str:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=40, record=True)
    console.print(RunPanel(made))
    return console.export_svg(title=title)


if __name__ == "__main__":
    shown = progress()
    shown.activity = Activity(
        what="answering held-out prompts", done=512, total=1024, unit="prompts"
    )
    Path(sys.argv[1]).write_text(svg(shown, width=100, title="make train"), encoding="utf-8")
