"""What a page says in numbers beside its curves: headroom, time of a step, alignment, health."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mopd.metrics.phases import PHASES, PREFIX
from mopd.metrics.summary import chunk_shares
from mopd.report.read import RunData, section
from mopd.report.series import Series, binned_means, rounded

BARS = 60  # of the picture of a step's time
CHUNK_KINDS = ("1-1", "1-n", "n-1", "n-m", "unaligned")
# What the lead waits for, and what else it does in a step; the rest of the step has no name.
GATHERED = ("rollout", "teachers", "journal")
REST, WAIT = "other", "wait"
BETWEEN = ("save", "evaluate")  # beside a step, in the line of the one behind
ORDER = ("rollout", "teachers", "inside", "journal", WAIT, "align", "train", "sync")


@dataclass(frozen=True, slots=True, kw_only=True)
class Headroom:
    """Accuracies of one domain; ``before`` and ``after`` as in summary.json, 0 to 1."""

    domain: str
    before: float
    after: float
    teacher: float | None
    canonical_before: float | None
    canonical_after: float | None

    @property
    def recovered(self) -> float | None:
        """Share of the distance to the teacher that was gained; None where there is none."""
        if self.teacher is None or not self.teacher > self.before:
            return None
        return (self.after - self.before) / (self.teacher - self.before)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Mean seconds of each phase over parts of the run, and over the whole of it.

    ``phases`` add up to a step, the save and the evaluation before it; ``beside`` are done by
    another thread meanwhile (rollout.max_staleness > 0).
    """

    steps: list[int]  # where each part begins
    phases: Mapping[str, list[float]]
    beside: Mapping[str, list[float]]
    means: Mapping[str, float]  # of ``phases``


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherHealth:
    """One teacher over the whole run. ``troubles``: what was counted, by kind and reason."""

    name: str
    backend: str
    model: str
    loss: str
    domains: tuple[str, ...]
    weight: float
    scored: float | None  # of the tokens it was asked for, in the last tenth of the run
    scored_least: float | None
    latency: float | None  # seconds of a request, lately: the median
    latency_p95: float | None  # and the 95th percentile
    troubles: Mapping[str, int] = field(default_factory=dict)


def headroom_of(run: RunData) -> list[Headroom]:
    """From the summary, else from the newest checkpoint."""
    if domains := section(run.summary, "domains"):
        return [_headroom(name, found) for name, found in domains.items()]
    evaluations = run.state.get("evaluations") or []
    if not evaluations:
        return []
    before, after = section(run.state, "before"), section(evaluations[-1], "scores")
    teachers = section(run.state, "teachers")
    return [
        Headroom(
            domain=name,
            before=before[name]["accuracy"],
            after=after[name]["accuracy"],
            teacher=teachers.get(name),
            canonical_before=before[name].get("canonical"),
            canonical_after=after[name].get("canonical"),
        )
        for name in after
        if name in before
    ]


def _headroom(name: str, found: Mapping[str, Any]) -> Headroom:
    return Headroom(
        domain=name,
        before=found["before"],
        after=found["after"],
        teacher=found.get("teacher"),
        canonical_before=found.get("canonical_before"),
        canonical_after=found.get("canonical_after"),
    )


def with_evaluations(run: RunData, series: Mapping[str, Series]) -> dict[str, Series]:
    """Evaluations over the number of steps that were done, the one before the first step too."""
    first = next((e for e in run.summary.get("evaluations") or () if e["step"] == 0), None)
    if first is None:
        first = _first_evaluation(run)
    found = {n: one for n, one in series.items() if not n.startswith("eval/")}
    for name, one in series.items():
        if not name.startswith("eval/"):
            continue
        steps, values = one.steps + 1, one.values
        if first.get(name) is not None:
            steps, values = np.append([0], steps), np.append([first[name]], values)
        found[name] = Series(name=name, steps=steps, values=values)
    return found


def _first_evaluation(run: RunData) -> dict[str, float]:
    """From the newest checkpoint; {} where it has none of step 0."""
    for one in run.state.get("evaluations") or ():
        if one.get("step") == 0:
            found = dict(one.get("metrics") or {})
            for domain, scores in section(one, "scores").items():
                found |= {
                    f"eval/{what}/{domain}": scores[what] for what in ("accuracy", "canonical")
                }
            return found
    return {}


def step_time(run: RunData, series: Mapping[str, Series]) -> StepTime | None:
    """None without a step line that has its time."""
    if "time/step" not in series:
        return None
    steps = series["time/step"].steps
    ahead = int(section(run.config, "rollout").get("max_staleness") or 0) > 0
    own = [name for name in GATHERED if ahead and f"time/{name}" in series]
    beside = {name: _on(series[f"time/{name}"], steps) for name in own}
    every = _partition(series, steps) or _from_spans(series, steps, ahead=ahead)
    for name in BETWEEN:
        if f"time/{name}" in series:
            every[name] = _on(series[f"time/{name}"], steps)
    binned, begins = binned_means([*every.values(), *beside.values()], BARS)
    bars = list(map(rounded, binned))
    return StepTime(
        steps=steps[begins].tolist(),
        phases=dict(zip(every, bars[: len(every)], strict=True)),
        beside=dict(zip(beside, bars[len(every) :], strict=True)),
        means={name: float(values.mean()) for name, values in every.items()},
    )


def _partition(series: Mapping[str, Series], steps: np.ndarray) -> dict[str, np.ndarray]:
    """phase/<name>, as the run wrote them; {} where a step has none."""
    found = {name: series.get(f"{PREFIX}{name}") for name in PHASES}
    if any(one is None or not np.array_equal(one.steps, steps) for one in found.values()):
        return {}
    return {name: one.values for name, one in found.items() if one is not None}


def _from_spans(
    series: Mapping[str, Series], steps: np.ndarray, *, ahead: bool
) -> dict[str, np.ndarray]:
    """The same from time/<name>, of a run that wrote no phases."""
    every = {
        name.removeprefix("time/"): _on(one, steps)
        for name, one in series.items()
        if name.startswith("time/") and name.count("/") == 1
    }
    step = every.pop("step")
    gather = every.pop("gather", np.zeros(len(steps)))
    every = {name: values for name, values in every.items() if name not in BETWEEN}
    if ahead:
        every = {name: values for name, values in every.items() if name not in GATHERED}
    if WAIT not in every:
        inside = sum((every[n] for n in GATHERED if n in every), np.zeros(len(steps)))
        every[WAIT] = np.maximum(gather - inside, 0.0)
    every[REST] = np.maximum(step - sum(every.values(), np.zeros(len(steps))), 0.0)
    shown = (*ORDER, *(n for n in every if n not in (*ORDER, REST)), REST)
    return {name: every[name] for name in shown if name in every}


def _on(series: Series, steps: np.ndarray) -> np.ndarray:
    """Seconds at ``steps``; 0 where the phase did not run."""
    values = np.zeros(len(steps))
    index = np.searchsorted(steps, series.steps)
    known = (index < len(steps)) & (steps[np.minimum(index, len(steps) - 1)] == series.steps)
    values[index[known]] = series.values[known]
    return values


def alignment_of(run: RunData) -> dict[str, dict[str, dict[str, float]]]:
    """Teacher -> "tokens" or "chunks" -> kind -> share; {} before the first checkpoint."""
    found = section(run.summary, "chunks")
    if not found:
        counts = section(run.state, "chunks")
        found = {name: chunk_shares(of) for name, of in counts.items() if any(of.values())}
    return {
        name: {
            what: {
                kind: shares.get(f"{what} {kind}", 0.0)
                for kind in CHUNK_KINDS
                if what == "tokens" or kind != "unaligned"
            }
            for what in ("tokens", "chunks")
        }
        for name, shares in found.items()
    }


def teachers_of(run: RunData, series: Mapping[str, Series]) -> list[TeacherHealth]:
    """In the order of the recipe."""
    return [
        _health(name, section(run.config, "teachers", name), run, series)
        for name in section(run.config, "teachers")
    ]


def _health(
    name: str, settings: Mapping[str, Any], run: RunData, series: Mapping[str, Series]
) -> TeacherHealth:
    scored = series.get(f"scored/{name}")
    default = section(run.config, "distillation").get("loss", "")
    return TeacherHealth(
        name=name,
        backend=str(section(settings, "backend").get("type", "")),
        model=str(settings.get("model") or ""),
        loss=str(settings.get("loss") or default),
        domains=tuple(map(str, settings.get("domains") or ())),
        weight=float(settings.get("weight", 1.0)),
        scored=_lately(series, f"scored/{name}"),
        scored_least=None if scored is None else float(scored.values.min()),
        latency=_lately(series, f"latency_p50/{name}"),
        latency_p95=_lately(series, f"latency_p95/{name}"),
        troubles=troubles_of(name, series),
    )


def _lately(series: Mapping[str, Series], name: str) -> float | None:
    return float(series[name].tail().mean()) if name in series else None


def troubles_of(name: str, series: Mapping[str, Series]) -> dict[str, int]:
    """``requests/<name>/<why>`` and ``missing/<name>/<why>``, added up over the run."""
    found: dict[str, int] = {}
    for kind in ("requests", "missing", "errors", "restarts"):
        for metric, one in series.items():
            if metric == f"{kind}/{name}" or metric.startswith(f"{kind}/{name}/"):
                why = metric.removeprefix(f"{kind}/{name}").strip("/")
                found[f"{kind}: {why}" if why else kind] = int(one.values.sum())
    return found
