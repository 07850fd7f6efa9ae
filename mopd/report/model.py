"""One run as the numbers of its page, without a browser or a template in sight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mopd.report.answers import kept_samples
from mopd.report.coverage import TeacherCoverage, coverage_of
from mopd.report.facts import (
    Headroom,
    StepTime,
    TeacherHealth,
    alignment_of,
    headroom_of,
    step_time,
    teachers_of,
    troubles_of,
    with_evaluations,
)
from mopd.report.panels import SECTIONS, Panel, panels_of
from mopd.report.read import Record, RunData, section
from mopd.report.series import FEW, Series, points_each, read_series, rounded, smoothed, thinned
from mopd.report.warnings import warnings_of_run

ENOUGH = 5  # points of a curve that can be called constant


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything on the page of one run."""

    run: RunData
    series: Mapping[str, Series]
    panels: list[Panel]
    headroom: list[Headroom]
    warnings: list[str]
    time: StepTime | None
    alignment: Mapping[str, Mapping[str, Mapping[str, float]]]
    coverage: list[TeacherCoverage]
    teachers: list[TeacherHealth]
    sampler_troubles: Mapping[str, int]
    samples: list[Record]

    def headline(self) -> dict[str, Any]:
        """For programs: what the head of the page says."""
        return {
            "run": self.run.name,
            "status": self.run.status,
            "steps": self.run.num_steps,
            "planned_steps": self.run.planned_steps,
            "seconds": self.seconds,
            "domains": {
                one.domain: {
                    "before": one.before,
                    "after": one.after,
                    "teacher": one.teacher,
                    "headroom_recovered": one.recovered,
                }
                for one in self.headroom
            },
            "last": {name: one.last for name, one in sorted(self.series.items())},
            "warnings": self.warnings,
        }

    @property
    def seconds(self) -> float | None:
        """Wall time over all starts; of a run without a checkpoint the time of its steps."""
        for source in (self.run.summary, self.run.state):
            if source.get("seconds"):
                return float(source["seconds"])
        one = self.series.get("time/step")
        return None if one is None else float(one.values.sum())

    @property
    def tokens_per_second(self) -> float | None:
        one = self.series.get("tokens_per_second")
        return None if one is None else float(one.tail(0.5).mean())

    @property
    def sections(self) -> list[str]:
        """Those that have a metric, in order."""
        return [name for name in SECTIONS if any(p.section == name for p in self.panels)]

    def constants(self, section: str) -> list[tuple[str, float]]:
        """(metric in words, value) of the plots of a section in which nothing ever changed: they
        are told in words, a plot of one value in one word."""
        found: list[tuple[str, float]] = []
        for panel in self.panels:
            if panel.section != section or not is_constant(panel, self.series):
                continue
            values = {label: self.series[name].last for label, name in panel.curves}
            if len(set(values.values())) == 1:
                found.append((panel.title, next(iter(values.values()))))
            else:
                found += [(f"{panel.title} of {label}", value) for label, value in values.items()]
        return found

    def client(self) -> dict[str, Any]:
        """What the page's script draws; plain JSON."""
        return {
            "figures": figures(self.panels, self.series),
            "sections": self.sections,
            "names": entities(self.run),
            "time": None if self.time is None else _time(self.time),
            "samples": self.samples,
        }


def build_report(run: RunData, *, audit: bool = True) -> Report:
    """Numbers of ``run``; ``audit`` also reads its tokenizers for the coverage audit."""
    series = with_evaluations(run, read_series(run.lines))
    return Report(
        run=run,
        series=series,
        panels=panels_of(series),
        headroom=headroom_of(run),
        warnings=warnings_of_run(run, series),
        time=step_time(run, series),
        alignment=alignment_of(run),
        coverage=coverage_of(run) if audit else [],
        teachers=teachers_of(run, series),
        sampler_troubles=troubles_of("rollout", series),
        samples=kept_samples(run.samples),
    )


def entities(run: RunData) -> list[str]:
    """Teachers and domains: each has one colour in all plots."""
    teachers = section(run.config, "teachers")
    domains = [
        *(str(d) for one in teachers.values() for d in one.get("domains") or ()),
        *section(run.summary, "domains"),
    ]
    return list(dict.fromkeys([*map(str, teachers), *domains]))


def is_constant(panel: Panel, series: Mapping[str, Series]) -> bool:
    """Whether each of its curves has one value from end to end: over enough steps to say so, or
    told in a single step of many."""
    curves = [series[name].values for _, name in panel.curves]
    steps = max(len(one.values) for one in series.values())
    return all(
        values.min() == values.max() and (len(values) >= ENOUGH or len(values) == 1 < steps)
        for values in curves
    )


def figures(panels: Sequence[Panel], series: Mapping[str, Series]) -> list[dict[str, Any]]:
    """Curves of each panel in which something changed; noisy ones with a running mean."""
    panels = [panel for panel in panels if not is_constant(panel, series)]
    limit = points_each(sum(len(panel.curves) for panel in panels))
    return [
        {
            "section": panel.section,
            "title": panel.title,
            "hint": panel.hint,
            "share": panel.is_share,
            "curves": [
                curve(label, series[name], limit, exact=panel.is_exact)
                for label, name in panel.curves
            ],
        }
        for panel in panels
    ]


def curve(label: str, series: Series, limit: int, *, exact: bool = False) -> dict[str, Any]:
    """At most ``limit`` points, with a running mean where there are many, unless ``exact``."""
    few = thinned(series, limit)
    found: dict[str, Any] = {"label": label, "x": few.steps.tolist(), "y": rounded(few.values)}
    changes = float(series.values.max()) > float(series.values.min())
    if len(series.values) >= FEW and changes and not exact:
        mean = thinned(smoothed(series), limit // 2)
        found["smooth"] = {"x": mean.steps.tolist(), "y": rounded(mean.values)}
    return found


def _time(time: StepTime) -> dict[str, Any]:
    return {
        "steps": time.steps,
        "phases": dict(time.phases),
        "beside": dict(time.beside),
    }
