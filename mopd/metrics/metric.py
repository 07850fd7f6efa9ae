"""Numbers that carry their own reduction, so that micro-batches and ranks merge without a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Reduction = Literal["mean", "sum", "max", "last"]


@dataclass(frozen=True, slots=True)
class Metric:
    """A partial result. `count` is 0 where nothing was measured; only `mean` divides by it.

    >>> Metric.mean(6.0, 3).merge(Metric.mean(2.0, 1)).value
    2.0
    """

    reduction: Reduction
    total: float
    count: float = 1.0

    @classmethod
    def mean(cls, total: float, count: float) -> Metric:
        """A sum over `count` things, divided once, after every merge."""
        return cls("mean", float(total), float(count))

    @classmethod
    def sum(cls, total: float) -> Metric:
        return cls("sum", float(total))

    @classmethod
    def max(cls, value: float) -> Metric:
        return cls("max", float(value))

    @classmethod
    def last(cls, value: float) -> Metric:
        """A value that is the same everywhere, or of which the newest counts."""
        return cls("last", float(value))

    def merge(self, other: Metric) -> Metric:
        """Combine with a metric of the same reduction; `other` is the later one."""
        if self.reduction != other.reduction:
            raise ValueError(f"a {self.reduction} and a {other.reduction} cannot be merged")
        if self.count == 0 or other.count == 0:
            return self if other.count == 0 else other
        match self.reduction:
            case "mean":
                return Metric("mean", self.total + other.total, self.count + other.count)
            case "sum":
                return Metric("sum", self.total + other.total)
            case "max":
                return Metric("max", _max(self.total, other.total))
            case "last":
                return other

    @property
    def value(self) -> float | None:
        """The reduced number; None where nothing was measured."""
        if self.count == 0:
            return None
        return self.total / self.count if self.reduction == "mean" else self.total


def _max(left: float, right: float) -> float:
    """The larger; NaN wins, whichever side it comes from (builtin `max` depends on the order)."""
    return math.nan if math.isnan(left) or math.isnan(right) else max(left, right)


def merge(parts: Iterable[Mapping[str, Metric]]) -> dict[str, Metric]:
    """Merge by name, in the given order. A name may be missing from some parts."""
    merged: dict[str, Metric] = {}
    for part in parts:
        for name, metric in part.items():
            merged[name] = merged[name].merge(metric) if name in merged else metric
    return merged


def means(sums: Mapping[str, tuple[float, float]]) -> dict[str, Metric]:
    """Metrics of `StepBatch.metrics`: name -> (sum, count)."""
    return {name: Metric.mean(total, count) for name, (total, count) in sums.items()}


def values(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """The reduced numbers; what was not measured is left out."""
    reduced = {name: metric.value for name, metric in metrics.items()}
    return {name: value for name, value in reduced.items() if value is not None}
