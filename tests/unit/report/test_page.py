"""The page as text: what is in it, what is escaped, what a command prints."""

from __future__ import annotations

import builtins
import html.parser
import json
from pathlib import Path
from typing import Any

import pytest

from mopd.cli.main import main
from mopd.report.page import embedded
from tests.helpers.report_runs import EVIL, config, finished, sample, step_line, write_run


class Elements(html.parser.HTMLParser):
    """Start tags with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def evil_run(directory: Path) -> Path:
    settings = config("r", (EVIL,))
    settings["student"]["model"] = EVIL
    summary = finished()
    summary["domains"] = {EVIL: summary["domains"]["a"]}
    lines = [step_line(step, (EVIL,), **{f"{EVIL}/x": 0.1 * step}) for step in range(20)]
    samples = [sample(0, domain=EVIL, teacher=EVIL, text=EVIL)]
    return write_run(directory, lines=lines, samples=samples, settings=settings, summary=summary)


def test_text_of_a_run_never_becomes_markup(tmp_path: Path) -> None:
    assert main(["report", str(evil_run(tmp_path / "r"))]) == 0
    page = (tmp_path / "r" / "report.html").read_text(encoding="utf-8")
    found = Elements(page).found
    assert not [tag for tag, _ in found if tag in ("img", "link", "iframe", "object", "embed")]
    for tag, attributes in found:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith("#"), (tag, value)
    assert page.count("</script>") == 3  # the data's, plotly's and the page's own


def test_data_is_json_without_angle_brackets() -> None:
    text = embedded({"a": EVIL + "&"})
    assert not set("<>&") & set(text)
    assert json.loads(text) == {"a": EVIL + "&"}


@pytest.mark.parametrize("lines", [0, 1])
def test_a_minimal_run_has_a_page(tmp_path: Path, lines: int) -> None:
    run = write_run(tmp_path / "r", lines=[{"step": step, "loss": 1.0} for step in range(lines)])
    assert main(["report", str(run), "--output", str(tmp_path / "sub" / "page.html")]) == 0
    assert (tmp_path / "sub" / "page.html").stat().st_size < 10e6


def test_ten_thousand_steps_make_a_page_under_10_mb(tmp_path: Path) -> None:
    lines = [
        step_line(s, **{f"new/{n}": float(s % (n + 2)) for n in range(20)}) for s in range(10_000)
    ]
    samples = [sample(step, text="long " * 400) for step in range(0, 10_000, 10)]
    run = write_run(tmp_path / "r", lines=lines, samples=samples)
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").stat().st_size < 10e6


def test_json_is_for_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "r", lines=[step_line(0), step_line(1)], summary=finished())
    assert main(["report", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["page"] == str(run / "report.html")
    assert found["status"] == "finished" and found["steps"] == 2
    assert found["domains"]["a"]["headroom_recovered"] == pytest.approx(0.625)
    assert found["last"]["loss"] == 1.0


def test_compare_writes_one_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        write_run(tmp_path / name, lines=[step_line(0)], summary=finished())
    assert main(["compare", "a", "b"]) == 0
    assert "compare.html" in capsys.readouterr().out
    assert "2 runs" in (tmp_path / "compare.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("words", [["report", "nowhere"], ["compare", "nowhere", "nobody"]])
def test_a_wrong_directory_is_one_line(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("library", ["plotly", "jinja2"])
def test_a_missing_extra_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    library: str,
) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] == library:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest, **more)

    run = write_run(tmp_path / "r", lines=[step_line(0)])
    monkeypatch.setattr(builtins, "__import__", refuse)
    assert main(["report", str(run)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "pip install 'mopd[report]'" in said and library in said
