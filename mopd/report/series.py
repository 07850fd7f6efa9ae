"""Numbers over steps: read from step lines, thinned, smoothed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

TOTAL_POINTS = 60_000  # of all curves of a page together
MIN_POINTS, MAX_POINTS = 60, 600  # of one curve
FEW = 40  # a curve of fewer points is shown with its points, and not smoothed
DIGITS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One metric: N steps, ascending, and its values, all finite."""

    name: str
    steps: np.ndarray  # [N] int64
    values: np.ndarray  # [N] float64

    @property
    def last(self) -> float:
        return float(self.values[-1])

    def tail(self, share: float = 0.1) -> np.ndarray:
        """The values of the last part of the run, one at least."""
        return self.values[-max(1, round(share * len(self.values))) :]

    def tail_steps(self, share: float = 0.1) -> np.ndarray:
        """The steps of `tail`."""
        return self.steps[-len(self.tail(share)) :]


def read_series(lines: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    """Every number of the step lines, by name; what is not finite is left out."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for line in lines:
        step = line["step"]
        for name, value in line.items():
            # a bool is an int, and no measurement
            if name == "step" or type(value) not in (int, float) or not math.isfinite(value):
                continue
            steps, values = found.setdefault(name, ([], []))
            steps.append(step)
            values.append(float(value))
    return {
        name: Series(name=name, steps=np.asarray(steps), values=np.asarray(values))
        for name, (steps, values) in found.items()
    }


def points_each(num_series: int) -> int:
    """How many points a curve may have where so many share a page."""
    return max(MIN_POINTS, min(MAX_POINTS, TOTAL_POINTS // max(num_series, 1)))


def thinned(series: Series, limit: int) -> Series:
    """At most ``limit`` points: the smallest and the largest of equal parts, first and last point.

    A spike stays visible, which the mean of a part would hide.
    """
    size = len(series.values)
    if size <= limit:
        return series
    edges = np.linspace(0, size, max((limit - 2) // 2, 1) + 1).astype(np.int64)
    keep = {0, size - 1}
    for begin, end in itertools.pairwise(edges):
        part = series.values[begin:end]
        keep |= {int(begin + part.argmin()), int(begin + part.argmax())}
    index = np.array(sorted(keep))
    return Series(name=series.name, steps=series.steps[index], values=series.values[index])


def smoothed(series: Series) -> Series:
    """A running mean over about a thirtieth of the run, exponentially weighted, from the first
    point on without bias."""
    size = len(series.values)
    keep = 1.0 - 1.0 / max(5.0, size / 30)
    total = weight = 0.0
    values = np.empty(size)
    for i, value in enumerate(series.values.tolist()):
        total, weight = keep * total + value, keep * weight + 1.0
        values[i] = total / weight
    return Series(name=series.name, steps=series.steps, values=values)


def binned_means(parts: Sequence[np.ndarray], size: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Means of arrays of one length over at most ``size`` equal parts, and where each part begins.

    A NaN does not count; a part of NaN alone is 0.
    """
    length = len(parts[0]) if parts else 0
    edges = np.unique(np.linspace(0, length, min(size, length) + 1).astype(np.int64))
    found = []
    for values in parts:
        known = ~np.isnan(values)
        sums = np.add.reduceat(np.where(known, values, 0.0), edges[:-1]) if length else values
        counts = np.add.reduceat(known.astype(float), edges[:-1]) if length else values
        found.append(sums / np.maximum(counts, 1.0))
    return found, edges[:-1]


def rounded(values: np.ndarray) -> list[float]:
    """For a file that is small."""
    return [float(f"{value:.{DIGITS}g}") for value in values.tolist()]
