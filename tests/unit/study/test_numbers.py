"""Spread over seeds, the tables' cells, the marks in a document, what makes two runs the same."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from mopd.config.load import load_config
from mopd.config.schema import RunConfig
from mopd.errors import ArtifactError
from mopd.study.plot import plot_group
from mopd.study.results import Raw, Result, read_run
from mopd.study.settings import Defaults, same
from mopd.study.table import Column, cell, outcome_columns, replace_marked, spread

VALUES = [0.91, 0.97, 0.94, 0.99]


def result(arm: str, seed: int, after: float, **changes: object) -> Result:
    one = Result(
        arm=arm,
        seed=seed,
        status="done",
        overrides=[],
        settings={},
        domains={"sort": {"after": after, "headroom_recovered": after, "canonical_after": None}},
    )
    return replace(one, **changes)  # type: ignore[arg-type]


def test_spread_is_that_of_a_sample() -> None:
    found = spread(VALUES)
    assert found is not None and found.deviation is not None
    assert found.mean == pytest.approx(statistics.mean(VALUES))
    assert found.deviation == pytest.approx(statistics.stdev(VALUES))
    assert (found.lowest, found.highest, found.count) == (0.91, 0.99, 4)


def test_one_seed_has_no_deviation_and_none_no_spread() -> None:
    one = spread([0.5])
    assert one is not None and one.deviation is None and one.lowest == one.highest == 0.5
    assert spread([]) is None
    assert cell(None, percent=True) == "-" and cell(one, percent=True) == "50.0"


def test_a_cell_has_mean_deviation_and_range() -> None:
    assert cell(spread([0.9, 1.0]), percent=True) == "95.0 ± 7.1 (90.0-100.0)"
    assert cell(spread([61.2, 63.6]), percent=False) == "62 ± 2 (61-64)"


def test_runs_that_did_not_end_are_in_no_mean() -> None:
    runs = [result("a", 1, 0.5), result("a", 2, 0.0, status="stopped"), result("a", 3, 0.7)]
    found = outcome_columns(["sort"])[0].of(runs)
    assert found is not None and found.count == 2 and found.mean == pytest.approx(0.6)
    assert outcome_columns(["sort"])[2].of(runs) is None  # no canonical share was measured


def test_only_marked_parts_of_a_document_change() -> None:
    text = "a\n<!-- study:x -->\nold\n<!-- /study -->\nb\n<!-- study:y -->\nkept\n<!-- /study -->\n"
    once = replace_marked(text, {"x": "new\n", "z": "nowhere\n"})
    assert "old" not in once and "new" in once and "kept" in once
    assert once.startswith("a\n<!-- study:x -->") and "\nb\n" in once
    assert replace_marked(once, {"x": "new\n"}) == once


def test_of_several_lines_of_a_run_the_last_counts(tmp_path: Path) -> None:
    path = tmp_path / "raw.jsonl"
    raw = Raw(path)
    raw.add(result("b", 2, 0.1))
    raw.add(result("a", 1, 0.2))
    raw.add(result("b", 2, 0.3))
    raw.add(result("gone", 1, 0.4))
    again = Raw(path)
    assert again.results["b", 2].domains["sort"]["after"] == 0.3
    again.tidy(["a", "b"])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["arm"], line["seed"]) for line in lines] == [("a", 1), ("b", 2)]


def test_new_keys_keep_old_results_and_changed_defaults_do_not(tmp_path: Path) -> None:
    path = tmp_path / "defaults.json"
    config = load_config("mopd_ctkd", ["ctkd.gamma=0.1", "run.name=x", "checkpoint.keep_last=9"])
    then = Defaults(path)
    settings = then.settings(config)
    assert settings["ctkd.gamma"] == 0.1 and not {"run.name", "checkpoint.keep_last"} & set(
        settings
    )
    then.save()

    kept = json.loads(path.read_text())
    del kept["ctkd.interior_rows"]  # as if the key were new
    path.write_text(json.dumps(kept))
    assert same(settings, Defaults(path).settings(config))

    kept["ctkd.map"] = "exact"  # as if the default had been another
    path.write_text(json.dumps(kept))
    assert not same(settings, Defaults(path).settings(config))


def test_the_seed_is_part_of_what_a_run_was_given(tmp_path: Path) -> None:
    known = Defaults(tmp_path / "defaults.json")
    first, second = RunConfig(), load_config("base", ["run.seed=7"])
    assert not same(known.settings(first), known.settings(second))


def test_a_plot_has_a_dot_for_each_run_that_ended() -> None:
    arms = {
        "a": [result("a", 1, 0.5), result("a", 2, 0.75)],
        "b <": [result("b <", 1, 0.25, status="failed")],
    }
    column = Column(title="accuracy", read=lambda one: one.domains["sort"]["after"])
    text = plot_group("Title", arms, [column])
    assert text.count("<circle") == 2 and "b &lt;" in text and "seed 2: 75.0" in text


def test_what_a_killed_process_left_half_written(tmp_path: Path) -> None:
    path = tmp_path / "raw.jsonl"
    Raw(path).add(result("a", 1, 0.5))
    whole = path.read_text()
    path.write_text(whole + '{"arm": "b", "se')
    assert set(Raw(path).results) == {("a", 1)}
    assert path.read_text() == whole
    path.write_text(whole + "[]\n")
    with pytest.raises(ArtifactError, match=r"raw\.jsonl, line 2: .*delete that line"):
        Raw(path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 2.0, "masked": 0.5}\n{"step": 1,')
    found = read_run(tmp_path)
    assert (found["steps"], found["first_loss"], found["masked"]) == (1, 2.0, 0.5)
