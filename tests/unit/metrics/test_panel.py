"""The panel shows everything at every width, whatever the names are."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from mopd.metrics.panel import ASCII_SPARKS, COLORS, SPARKS
from mopd.metrics.phases import PHASES
from mopd.metrics.progress import MAX_POINTS, Activity, Progress, Series, percents
from tests.helpers.panels import progress, rendered

EIGHT = tuple(f"domain-{n}" for n in (10, 2, 1, 3, 4, 5, 6, 7))


@pytest.mark.parametrize("width", [50, 60, 100, 160])
def test_everything_is_there_at_any_width(width: int) -> None:
    lines = rendered(progress(), width=width)
    shown = "\n".join(lines)
    assert {cell_len(line) for line in lines} == {width}
    assert lines[0].startswith("╭─ mopd_ctkd ─") and lines[-1].startswith("╰")
    assert "240/500  48%" in shown
    assert "0:00:4" in shown and " gone " in shown and " left " in shown
    assert "loss 0.0471" in shown and "accuracy 93.8%" in shown
    assert "tokens/s 1,690" in shown
    assert ("grad norm 0.42" in shown) == (width >= 100)
    assert re.search(r"sort +0\.0285 ", shown) and re.search(r"upper +0\.0318 ", shown)
    assert re.search(r"sort +95\.2% .* 93\.0% ", shown), "rollouts and held-out"
    assert re.search(r"upper +92\.3% .* 91\.0% ", shown)
    for share in ("rollout 45%", "teachers 17%", "align 5%", "train 26%", "sync 4%", "other 3%"):
        assert share in shown
    assert "a step 0.20 s" in shown
    assert "wait" not in shown, "what takes no time is left out"
    assert "…" not in shown


def test_teachers_and_domains_stand_beside_each_other_where_there_is_room() -> None:
    def heads(width: int) -> list[str]:
        return [line for line in rendered(progress(), width=width) if "KL" in line]

    assert "rollouts" in heads(100)[0]
    assert "rollouts" not in heads(60)[0]


@pytest.mark.parametrize(("width", "height"), [(60, 50), (100, 24), (160, 24)])
def test_eight_of_each_are_all_shown_in_their_order(width: int, height: int) -> None:
    lines = rendered(progress(names=EIGHT), width=width, height=height)
    assert len(lines) <= height
    first = [found[0] for line in lines if (found := re.findall(r"domain-\d+", line))]
    once = first if width > 90 else first[:8]
    assert once == sorted(EIGHT, key=lambda name: int(name.split("-")[1]))
    assert "more" not in "\n".join(lines)


@pytest.mark.parametrize(("height", "shown"), [(24, 4), (30, 7), (10, 2)])
def test_what_does_not_fit_is_counted(height: int, shown: int) -> None:
    names = tuple(f"d{n:02}" for n in range(15))
    lines = rendered(progress(names=names), width=60, height=height)
    assert sum("and " in line and f"and {15 - shown} more" in line for line in lines) == 2
    assert sum(bool(re.match(r"│ d\d\d ", line)) for line in lines) == 2 * shown
    if height >= 20:
        assert len(lines) <= height


def test_names_are_no_markup_and_too_long_ones_are_cut() -> None:
    hostile = "[red]x[/red]\x1b[2J"
    shown = "\n".join(rendered(progress(names=(hostile, "n" * 80)), width=100))
    assert "[red]x[/red]\\x" in shown
    assert "\x1b[2J" not in shown
    assert "nnn…" in shown
    wide = "\n".join(rendered(progress(names=("数学" * 20,)), width=100))
    assert {cell_len(line) for line in wide.splitlines()} == {100}


def test_without_colours_neighbours_differ_by_their_shades() -> None:
    lines = rendered(progress(), width=60, no_color=True)
    bar = next(line for line in lines if line.startswith("│ ███"))
    assert re.fullmatch(r"│ █+░+▓+▒+█+░+ │", bar)


def test_before_the_first_step_there_is_a_panel_too() -> None:
    made = Progress(title="", num_steps=4)
    made.restart(0)
    made.activity = Activity(what="answering", done=3, total=8, unit="prompts")
    shown = "\n".join(rendered(made, width=60))
    assert "the first step has not ended yet" in shown
    assert "-:--:-- left" in shown
    assert "answering: 3/8 prompts" in shown


def test_numbers_that_are_none_are_shown_and_break_no_history() -> None:
    made = progress(steps=3)
    line = {"loss": math.nan, "kl/sort": math.inf, "accuracy/sort": math.nan, "phase/train": 0.1}
    made.add(3, line)
    shown = "\n".join(rendered(made, width=100))
    assert "loss nan" in shown and "inf" in shown


def test_a_run_without_divergence_or_answers_shows_its_losses() -> None:
    made = Progress(title="", num_steps=4)
    made.restart(0)
    made.add(0, {"loss": 1.0, "loss/sort": 0.25})
    shown = "\n".join(rendered(made, width=60))
    assert re.search(r"teacher +loss", shown) and re.search(r"sort +0\.2500", shown)
    assert "domain" not in shown


def test_every_phase_has_a_colour() -> None:
    assert tuple(COLORS) == PHASES
    assert len(SPARKS) == len(ASCII_SPARKS)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=8))
def test_percentages_add_up(values: list[float]) -> None:
    found = percents(values)
    if sum(values) > 0:
        assert sum(found) == 100
        exact = [100 * value / sum(values) for value in values]
        assert all(abs(a - b) <= 1 for a, b in zip(found, exact, strict=True))
    else:
        assert found == [0] * len(values)


@given(st.integers(1, 5000), st.integers(1, 40))
def test_a_history_keeps_its_mean_and_its_order(count: int, width: int) -> None:
    series = Series()
    for value in range(count):
        series.add(float(value))
    series.add(math.nan)
    points = series.points(width)
    assert len(points) == min(width, len(series.points(MAX_POINTS)))
    assert points == sorted(points)
    assert points[0] <= count / min(width, count) + MAX_POINTS
    assert points[-1] >= (count - 1) * (1 - 1 / width) / 2


def test_the_time_left_follows_the_newest_pace() -> None:
    now = 0.0
    made = Progress(title="", num_steps=300, clock=lambda: now)
    made.restart(100)
    assert made.seconds_left is None
    for step in range(100, 200):
        now += 10.0 if step < 140 else 1.0
        made.add(step, {})
    assert made.seconds_left == pytest.approx(100.0)
    now += 30.0
    assert made.seconds_left == pytest.approx(70.0), "it goes on between two steps"
    assert made.seconds == pytest.approx(400.0 + 60.0 + 30.0)
