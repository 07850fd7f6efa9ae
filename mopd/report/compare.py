"""Several runs side by side: final numbers with their spread over seeds, and what differs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mopd.errors import ConfigError
from mopd.report.model import Report, curve
from mopd.report.panels import OTHER, SECTIONS
from mopd.report.series import points_each

# Settings that tell runs apart without making them another experiment.
SAME_EXPERIMENT = ("run.name", "run.dir", "run.seed", "run.overwrite", "run.threads", "cache_dir")
SHOWN_CURVES = 80  # plots of a page at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Mean over the runs of a group that have the number, and their sample standard deviation
    (None for one run)."""

    mean: float
    deviation: float | None
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Runs whose settings differ in ``run.seed`` at most, and their final numbers."""

    label: str
    runs: tuple[str, ...]
    numbers: Mapping[str, Spread]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """``columns``: every number that a group has; ``settings``: key -> value of each run, as text,
    of the keys that differ."""

    reports: list[Report]
    names: list[str]
    groups: list[Group]
    columns: list[str]
    settings: Mapping[str, list[str]]

    def headline(self) -> dict[str, Any]:
        """For programs: what the tables of the page say."""
        return {
            "groups": [
                {
                    "label": group.label,
                    "runs": group.runs,
                    "numbers": {
                        name: {"mean": s.mean, "deviation": s.deviation, "count": s.count}
                        for name, s in group.numbers.items()
                    },
                }
                for group in self.groups
            ],
            "settings": {
                key: dict(zip(self.names, values, strict=True))
                for key, values in self.settings.items()
            },
        }

    @property
    def sections(self) -> list[str]:
        """Those that have a plot, in order."""
        own = {name for report in self.reports for name in report.sections}
        return [name for name in SECTIONS if name in own and name != OTHER]

    def client(self) -> dict[str, Any]:
        """What the page's script draws; plain JSON."""
        return {
            **{"figures": _figures(self), "sections": self.sections},
            **{"names": [], "time": None, "samples": []},
        }


def compare(reports: Sequence[Report]) -> Comparison:
    """Raises ConfigError for fewer than two runs, or one that is named twice."""
    paths = [report.run.directory.resolve() for report in reports]
    if len(set(paths)) != len(paths) or len(paths) < 2:
        raise ConfigError("compare needs two runs or more, each of them once")
    names = _names(reports)
    settings = [flat(report.run.config) for report in reports]
    members: dict[str, list[int]] = {}
    for i, own in enumerate(settings):
        key = json.dumps({k: v for k, v in own.items() if k not in SAME_EXPERIMENT}, sort_keys=True)
        members.setdefault(key, []).append(i)
    groups = [_group([names[i] for i in m], [reports[i] for i in m]) for m in members.values()]
    return Comparison(
        reports=list(reports),
        names=names,
        groups=groups,
        columns=list(dict.fromkeys(name for group in groups for name in group.numbers)),
        settings=differing(settings),
    )


def differing(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Keys that are not the same in all, but for names and places of runs."""
    found = {}
    for key in sorted({key for own in settings for key in own}):
        if key in SAME_EXPERIMENT and key != "run.seed":
            continue
        values = [json.dumps(own[key]) if key in own else "–" for own in settings]  # noqa: RUF001
        if len(set(values)) > 1:
            found[key] = values
    return found


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; an empty mapping is a value."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def final_numbers(report: Report) -> dict[str, float]:
    """Of one run: results of domains, and means over the last tenth of its steps."""
    found: dict[str, float] = {"steps": float(report.run.num_steps)}
    for one in report.headroom:
        found[f"accuracy {one.domain}"] = one.after
        if one.recovered is not None:
            found[f"headroom {one.domain}"] = one.recovered
        if one.canonical_after is not None:
            found[f"canonical {one.domain}"] = one.canonical_after
    for name in ("loss", *(f"kl/{one.name}" for one in report.teachers), "masked", "truncated"):
        if name in report.series:
            found[name] = float(report.series[name].tail().mean())
    if report.tokens_per_second is not None:
        found["tokens/s"] = report.tokens_per_second
    if report.seconds is not None:
        found["seconds"] = report.seconds
    return found


def _group(names: Sequence[str], reports: Sequence[Report]) -> Group:
    found = [final_numbers(report) for report in reports]
    columns = dict.fromkeys(name for numbers in found for name in numbers)
    return Group(
        label=names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more seeds",
        runs=tuple(names),
        numbers={name: _spread([n[name] for n in found if name in n]) for name in columns},
    )


def _spread(values: Sequence[float]) -> Spread:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(mean=statistics.fmean(values), deviation=deviation, count=len(values))


def _names(reports: Sequence[Report]) -> list[str]:
    """The names of the runs; their directories where two have one name."""
    names = [report.run.name for report in reports]
    if len(set(names)) == len(names):
        return names
    return [str(report.run.directory) for report in reports]


def _changes(metric: str, reports: Sequence[Report]) -> bool:
    """Whether a plot of it says more than a number would."""
    values = [report.series[metric].values for report in reports if metric in report.series]
    return len({float(edge) for v in values for edge in (v.min(), v.max())}) > 1


def _figures(found: Comparison) -> list[dict[str, Any]]:
    """One plot a metric, a curve for each run: colour by group, dashes by run in a group."""
    place = {
        name: (number, member)
        for number, group in enumerate(found.groups)
        for member, name in enumerate(group.runs)
    }
    panels: dict[tuple[str, str], dict[str, Any]] = {}
    metrics: dict[str, tuple[str, str]] = {}
    for report in found.reports:
        for panel in report.panels:
            for label, metric in panel.curves:
                if panel.section == OTHER or not _changes(metric, found.reports):
                    continue
                title = panel.title if label == "all" else f"{panel.title}: {label}"
                metrics[metric] = (panel.section, title)
                panels.setdefault(
                    (panel.section, metric),
                    {"share": panel.is_share, "hint": panel.hint, "exact": panel.is_exact},
                )
    shown = list(panels.items())[:SHOWN_CURVES]
    limit = points_each(len(shown) * len(found.reports))
    return [
        {
            **look,
            "section": section,
            "title": metrics[metric][1],
            "curves": [
                {
                    **curve(name, report.series[metric], limit, exact=look["exact"]),
                    "color": place[name][0],
                    "dash": place[name][1],
                }
                for name, report in zip(found.names, found.reports, strict=True)
                if metric in report.series
            ],
        }
        for (section, metric), look in shown
    ]
