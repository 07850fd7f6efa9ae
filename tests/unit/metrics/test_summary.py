"""The summary says what a run achieved, in a file and in a table."""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path

import pytest
from rich.console import Console

from mopd.metrics.summary import DomainResult, Summary, print_summary, write_summary

SUMMARY = Summary(
    steps=300,
    seconds=61.4,
    domains={
        "sort": DomainResult(before=0.2, after=0.6, teacher=1.0),
        "[red]x[/red]\x1b": DomainResult(before=0.2, after=0.1),
    },
    chunks={
        "sort": {
            "chunks 1-1": 6,
            "chunks 1-n": 2,
            "tokens 1-1": 6,
            "tokens 1-n": 2,
            "tokens unaligned": 2,
        },
    },
)


@pytest.mark.parametrize(
    ("result", "recovered"),
    [
        (DomainResult(before=0.2, after=0.6, teacher=1.0), 0.5),
        (DomainResult(before=0.2, after=0.1, teacher=0.4), -0.5),
        (DomainResult(before=0.2, after=0.6, teacher=0.2), None),
        (DomainResult(before=0.2, after=0.6, teacher=math.nan), None),
        (DomainResult(before=0.2, after=0.6), None),
    ],
)
def test_headroom(result: DomainResult, recovered: float | None) -> None:
    assert result.headroom_recovered == (None if recovered is None else pytest.approx(recovered))


def test_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run" / "summary.json"
    write_summary(path, SUMMARY)
    content = json.loads(path.read_text())
    assert content["domains"]["sort"] == {
        "before": 0.2,
        "after": 0.6,
        "teacher": 1.0,
        "canonical_before": None,
        "canonical_after": None,
        "headroom_recovered": pytest.approx(0.5),
    }
    assert content["chunks"]["sort"] == pytest.approx(
        {
            "chunks 1-1": 0.75,
            "chunks 1-n": 0.25,
            "tokens 1-1": 0.6,
            "tokens 1-n": 0.2,
            "tokens unaligned": 0.2,
            "tokens_outside_1_1": 0.25,
        }
    )
    assert (content["steps"], content["seconds"]) == (300, 61.4)
    assert [child.name for child in path.parent.iterdir()] == ["summary.json"]


def test_a_killed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "summary.json"
    write_summary(path, SUMMARY)
    before = path.read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_summary(path, Summary(steps=1, seconds=1.0, domains={}, chunks={}))
    assert path.read_bytes() == before


def test_a_number_that_json_cannot_hold(tmp_path: Path) -> None:
    domains = {"sort": DomainResult(before=math.nan, after=0.5)}
    write_summary(
        tmp_path / "summary.json", Summary(steps=1, seconds=1.0, domains=domains, chunks={})
    )
    sort = json.loads((tmp_path / "summary.json").read_text())["domains"]["sort"]
    assert sort["before"] is None
    assert sort["before/raw"] == "nan"


def test_the_table_reads_no_markup() -> None:
    screen = io.StringIO()
    print_summary(SUMMARY, Console(file=screen, width=120))
    shown = screen.getvalue()
    row = next(line for line in shown.splitlines() if "sort" in line)
    assert [word for word in row.split() if "%" in word] == ["20.0%", "60.0%", "100.0%", "50.0%"]
    assert "[red]x[/red]\\x1b" in shown
    assert "sort: 25% of the tokens lie in chunks other than 1-1" in shown
    assert "300 steps in 61 s" in shown
