"""The numbers of a page, without a browser."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from mopd.demo import World
from mopd.errors import ConfigError
from mopd.metrics.phases import PHASES
from mopd.report.answers import kept_samples
from mopd.report.compare import compare
from mopd.report.coverage import coverage_of
from mopd.report.model import Report, build_report
from mopd.report.panels import KINDS, OTHER, panels_of
from mopd.report.read import read_run
from mopd.report.series import MAX_POINTS, Series, binned_means, read_series, smoothed, thinned
from tests.helpers.report_runs import config, finished, sample, step_line, write_run
from tests.helpers.runs import ROOT


def report(run: Path) -> Report:
    return build_report(read_run(run, now=1e12), audit=False)


def test_every_metric_is_in_one_plot() -> None:
    names = ["loss", "loss/a", "eval/kl/a", "new/one", "new/two", "eval/odd/a", "time/step"]
    panels = panels_of(names)
    shown = [name for panel in panels for _, name in panel.curves]
    assert sorted(shown) == sorted(names)
    others = {p.title: [n for _, n in p.curves] for p in panels if p.section == OTHER}
    assert others == {"new": ["new/one", "new/two"], "eval/odd": ["eval/odd/a"]}


def test_no_documented_metric_is_unknown() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8").split("## summary.json")[0]
    names = [re.sub(r"<\w+>", "x", key) for key in re.findall(r"^\| `([^`]+)` \|", page, re.M)]
    assert len(names) > 50
    others = [p.title for p in panels_of(names) if p.section == OTHER]
    assert others == ["step"]  # the axis


def test_titles_are_told_apart() -> None:
    assert len({kind.title for kind in KINDS}) == len(KINDS)


def test_thinning_keeps_spikes_and_ends() -> None:
    values = np.zeros(10_000)
    values[4321], values[7777] = 9.0, -9.0
    few = thinned(Series(name="x", steps=np.arange(10_000), values=values), 100)
    assert len(few.values) <= 100
    assert few.values.max() == 9.0 and few.values.min() == -9.0
    assert few.steps[0] == 0 and few.steps[-1] == 9999
    assert (np.diff(few.steps) > 0).all()


def test_a_running_mean_has_no_bias_at_the_start() -> None:
    flat = smoothed(Series(name="x", steps=np.arange(50), values=np.full(50, 3.0)))
    assert flat.values == pytest.approx(np.full(50, 3.0))


def test_means_of_parts() -> None:
    found, begins = binned_means([np.arange(10.0), np.array([np.nan, *range(1, 10)])], 5)
    assert found[0].tolist() == [0.5, 2.5, 4.5, 6.5, 8.5]
    assert found[1].tolist()[0] == 1.0
    assert begins.tolist() == [0, 2, 4, 6, 8]


def test_what_is_no_number_is_no_point() -> None:
    series = read_series([{"step": 0, "a": None, "a/raw": "nan", "b": 1}, {"step": 1, "a": 2.0}])
    assert series["a"].steps.tolist() == [1]
    assert sorted(series) == ["a", "b"]


def test_the_phases_add_up_to_the_step(tmp_path: Path) -> None:
    """gather holds rollout and teachers, and a wait for the rest of it."""
    lines = [step_line(s, **{"time/evaluate": 8.0 * (s == 5)}) for s in range(10)]
    time = report(write_run(tmp_path / "r", lines=lines)).time
    assert time is not None and time.beside == {}
    assert time.means["wait"] == pytest.approx(0.125)
    assert time.means["other"] == pytest.approx(0.125)
    assert time.means["evaluate"] == pytest.approx(0.8)
    assert sum(time.means.values()) - 0.8 == pytest.approx(1.0)
    assert time.phases["evaluate"][5] == 8.0


def test_sampling_ahead_is_beside_the_step(tmp_path: Path) -> None:
    settings = config("r", rollout={"max_staleness": 1})
    lines = [step_line(s) for s in range(4)]
    time = report(write_run(tmp_path / "r", lines=lines, settings=settings)).time
    assert time is not None and set(time.beside) == {"rollout", "teachers"}
    assert time.means["wait"] == pytest.approx(0.5)
    assert sum(time.means.values()) == pytest.approx(1.0)


def test_the_phases_of_a_run_are_its_own(tmp_path: Path) -> None:
    """Also where sampling ahead is a phase of nothing, and a line beside."""
    own = {f"phase/{name}": 0.0 for name in PHASES} | {"phase/train": 0.75, "phase/wait": 0.25}
    more = own | {"time/align/wait": 0.01, "time/broadcast": 0.02, "time/save": 2.0}
    lines = [step_line(s, **more) for s in range(4)]
    settings = config("r", rollout={"max_staleness": 1})
    time = report(write_run(tmp_path / "r", lines=lines, settings=settings)).time
    assert time is not None
    assert time.means == {**{n: own[f"phase/{n}"] for n in PHASES}, "save": 2.0}
    assert time.phases["rollout"] == [0.0] * 4 and time.beside["rollout"] == [0.25] * 4


def test_the_latency_of_a_teacher(tmp_path: Path) -> None:
    lines = [step_line(s, **{"latency_p50/a": 0.25, "latency_p95/a": 0.5}) for s in range(4)]
    (one,) = report(write_run(tmp_path / "r", lines=lines)).teachers
    assert (one.latency, one.latency_p95) == (0.25, 0.5)


def test_one_step_that_dropped_all_is_no_warning(tmp_path: Path) -> None:
    """A reason has a number only in the steps in which it occurred."""
    lines = [step_line(s, **({"dropped/stale": 1.0} if s == 3 else {})) for s in range(40)]
    quiet = write_run(tmp_path / "quiet", lines=lines, summary=finished())
    assert report(quiet).warnings == []
    lines = [step_line(s, **{"dropped/stale": 0.4, "dropped/empty": 0.2}) for s in range(40)]
    (said,) = report(write_run(tmp_path / "loud", lines=lines, summary=finished())).warnings
    assert said.startswith("60% of the answers are not trained on")


def test_a_teachers_troubles_are_added_up(tmp_path: Path) -> None:
    lines = [step_line(s, **{"requests/a/timeout": 2, "missing/a/context": 1}) for s in range(3)]
    lines[0]["scored/a"] = 0.25
    found = report(write_run(tmp_path / "r", lines=lines))
    (one,) = found.teachers
    assert one.troubles == {"requests: timeout": 6, "missing: context": 3}
    assert one.scored == 1.0 and one.scored_least == 0.25


def test_warnings_in_words(tmp_path: Path) -> None:
    lines = [step_line(s, masked=0.5, truncated=0.4, **{"scored/a": 0.5}) for s in range(20)]
    said = " ".join(report(write_run(tmp_path / "r", lines=lines)).warnings)
    for word in ("ended after step 20 of 50", "50% of the response tokens", "40% of the answers"):
        assert word in said
    assert "a scored only 50%" in said
    good = [step_line(s, masked=0.0) for s in range(20)]
    assert report(write_run(tmp_path / "g", lines=good, summary=finished())).warnings == []


def test_the_evaluation_before_the_first_step_is_shown(tmp_path: Path) -> None:
    summary = finished(evaluations=[{"step": 0, "eval/accuracy/a": 0.2}])
    lines = [step_line(s) for s in range(20)]
    lines.append({"step": 19, "eval/accuracy/a": 0.7})
    found = report(write_run(tmp_path / "r", lines=lines, summary=summary))
    assert found.series["eval/accuracy/a"].steps.tolist() == [0, 20]
    assert found.series["eval/accuracy/a"].values.tolist() == [0.2, 0.7]


def test_what_never_changes_is_told_in_words(tmp_path: Path) -> None:
    found = report(write_run(tmp_path / "r", lines=[step_line(s) for s in range(20)]))
    assert ("Skipped steps", 0.0) in found.constants("Optimizer")
    titles = {figure["title"] for figure in found.client()["figures"]}
    assert "Gradient norm" in titles and "Skipped steps" not in titles


def test_ten_thousand_steps_stay_small(tmp_path: Path) -> None:
    lines = [step_line(s, odd=float(s % 7), **{"odd/x": 0.1 * s}) for s in range(10_000)]
    found = report(write_run(tmp_path / "r", lines=lines)).client()
    assert len(json.dumps(found)) < 1_500_000
    assert all(len(c["x"]) <= MAX_POINTS for figure in found["figures"] for c in figure["curves"])


def test_too_many_samples_are_thinned_by_step() -> None:
    every = [sample(step) for step in range(100)]
    size = len(json.dumps(every[0]))
    kept = kept_samples(every, max_bytes=20 * size)
    steps = [one["step"] for one in kept]
    assert steps[0] == 0 and steps[-1] == 99 and 5 < len(steps) <= 20
    assert kept_samples(every) == every
    assert len(kept_samples([sample(0) for _ in range(8)], max_bytes=3 * size)) == 2


def test_the_audit_reads_the_tokenizers(tiny_world: World, tmp_path: Path) -> None:
    settings = config("r", ("sort", "gone"), student={"model": str(tiny_world.student)})
    settings["teachers"]["sort"]["model"] = str(tiny_world.teachers["sort"])
    found = coverage_of(read_run(write_run(tmp_path / "r", settings=settings), now=0.0))
    gone, sort = sorted(found, key=lambda one: one.teacher)
    assert sort.problem == "" and sort.rows[-1].name == "all"
    assert sort.rows[-1].tokens == sum(row.tokens for row in sort.rows[:-1])
    assert "not here" in gone.problem and gone.rows == ()


def test_seeds_are_one_group_and_other_settings_are_not(tmp_path: Path) -> None:
    runs = []
    for number, (seed, lr, after) in enumerate([(1, 1e-3, 0.4), (2, 1e-3, 0.6), (1, 2e-3, 0.9)]):
        settings = config(f"r{number}", student={"optimizer": {"lr": lr}}, run={"seed": seed})
        settings["run"]["name"] = f"r{number}"
        lines = [step_line(s) for s in range(20)]
        path = tmp_path / f"r{number}"
        runs.append(write_run(path, lines=lines, settings=settings, summary=finished(after=after)))
    found = compare([report(run) for run in runs])
    assert [group.runs for group in found.groups] == [("r0", "r1"), ("r2",)]
    spread = found.groups[0].numbers["accuracy a"]
    assert spread.mean == pytest.approx(0.5) and spread.count == 2
    assert spread.deviation == pytest.approx(0.1 * 2**0.5)
    assert found.groups[1].numbers["accuracy a"].deviation is None
    assert set(found.settings) == {"run.seed", "student.optimizer.lr"}
    loss = next(f for f in found.client()["figures"] if f["title"] == "Loss")
    assert [(c["label"], c["color"], c["dash"]) for c in loss["curves"]] == [
        ("r0", 0, 0),
        ("r1", 0, 1),
        ("r2", 1, 0),
    ]


def test_one_run_is_no_comparison(tmp_path: Path) -> None:
    one = report(write_run(tmp_path / "r"))
    with pytest.raises(ConfigError, match="two runs"):
        compare([one])
    with pytest.raises(ConfigError, match="two runs"):
        compare([one, one])
