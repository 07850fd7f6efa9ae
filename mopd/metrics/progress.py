"""What a live panel knows of a run: the newest numbers, their histories, the pace."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from mopd.metrics.phases import PHASES, PREFIX

MAX_POINTS = 256  # of a history; older points are averaged in pairs
PACE_STEPS = 50  # that the time left and the shares of a step's time are taken from


class Series:
    """A history of any length in at most ``MAX_POINTS`` means of equally many values."""

    def __init__(self) -> None:
        self._points: list[float] = []
        self._open: list[float] = []  # values of the point that is not full yet
        self._stride = 1

    def add(self, value: float) -> None:
        """NaN and infinities are left out."""
        if not math.isfinite(value):
            return
        self._open.append(value)
        if len(self._open) < self._stride:
            return
        self._points.append(_mean(self._open))
        self._open = []
        if len(self._points) == MAX_POINTS:
            halves = zip(self._points[::2], self._points[1::2], strict=True)
            self._points = [_mean(pair) for pair in halves]
            self._stride *= 2

    def points(self, width: int) -> list[float]:
        """At most ``width`` means, the oldest first."""
        points = [*self._points, _mean(self._open)] if self._open else self._points
        count = min(width, len(points))
        edges = [round(i * len(points) / count) for i in range(count + 1)] if count else [0]
        return [_mean(points[a:b]) for a, b in pairwise(edges)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """Something that takes a while beside the steps, as in `evaluating` 128 of 1024 prompts."""

    what: str
    done: int
    total: int
    unit: str


class Progress:
    """Fed by a sink, read by `mopd.metrics.panel` from another thread, with ``lock`` held."""

    def __init__(
        self, *, title: str, num_steps: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.title = title
        self.num_steps = num_steps
        self.done = 0
        self.latest: dict[str, float] = {}  # of the newest step, and of those before where it lacks
        self.heldout: dict[str, float] = {}  # accuracy by domain
        self.heldout_step = 0
        self.activity: Activity | None = None
        self.series: dict[str, Series] = {}
        self.lock = threading.RLock()
        self._clock = clock
        self._started = clock()
        self._pace: deque[tuple[float, int]] = deque(maxlen=PACE_STEPS)  # when, steps done
        self._times: deque[dict[str, float]] = deque(maxlen=PACE_STEPS)

    def restart(self, step: int) -> None:
        """The run goes on with ``step``."""
        with self.lock:
            self.done = step
            self._started = self._clock()
            self._pace.clear()
            self._pace.append((self._started, step))

    def add(self, step: int, line: Mapping[str, float]) -> None:
        """The line of ``step``, counted from 0."""
        times = {name: line[f"{PREFIX}{name}"] for name in PHASES if PREFIX + name in line}
        with self.lock:
            self.done = step + 1
            self.activity = None
            self._pace.append((self._clock(), self.done))
            self.latest.update(line)
            if times:
                self._times.append(times)
            for key, value in line.items():
                if key == "loss" or key.startswith(("kl/", "loss/", "accuracy")):
                    self.series.setdefault(key, Series()).add(value)

    def add_evaluation(self, step: int, line: Mapping[str, float]) -> None:
        """After ``step`` steps."""
        prefix = "eval/accuracy/"
        found = {k.removeprefix(prefix): v for k, v in line.items() if k.startswith(prefix)}
        with self.lock:
            if found:
                self.heldout, self.heldout_step = found, step
            self.activity = None

    @property
    def seconds(self) -> float:
        """Since this start of the run."""
        return self._clock() - self._started

    @property
    def seconds_left(self) -> float | None:
        """At the pace of the newest steps, evaluations and checkpoints included."""
        if len(self._pace) < 2 or self.num_steps <= self.done:
            return 0.0 if self.done >= self.num_steps else None
        (began, first), (ended, last) = self._pace[0], self._pace[-1]
        if last <= first:
            return None
        per_step = (ended - began) / (last - first)
        return max(0.0, per_step * (self.num_steps - last) - (self._clock() - ended))

    @property
    def step_times(self) -> dict[str, float]:
        """Mean seconds per phase over the newest steps; empty before the first."""
        if not self._times:
            return {}
        count = len(self._times)
        return {name: sum(t.get(name, 0.0) for t in self._times) / count for name in PHASES}


def percents(values: Sequence[float]) -> list[int]:
    """Whole percentages that add up to 100, each within 1 of its own (largest remainders)."""
    total = sum(values)
    if total <= 0:
        return [0] * len(values)
    exact = [100 * value / total for value in values]
    found = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(values)), key=lambda i: found[i] - exact[i])
    for i in by_remainder[: 100 - sum(found)]:
        found[i] += 1
    return found
