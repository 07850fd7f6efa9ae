"""The pages in a real headless browser: drawn, usable, and silent on the network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mopd.cli.main import main
from tests.helpers.browser import Opened, headless, open_page
from tests.helpers.report_runs import EVIL, config, finished, sample, step_line, write_run


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with headless() as found:
        yield found


@pytest.fixture(scope="module")
def page_file(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose teacher, domain, model and answers are hostile."""
    directory = tmp_path_factory.mktemp("page") / "r"
    settings = config("r", ("a", EVIL))
    settings["student"]["model"] = EVIL
    summary = finished(chunks={EVIL: {"tokens 1-1": 0.5, "tokens 1-n": 0.5}})
    summary["domains"][EVIL] = summary["domains"]["a"]
    lines = [step_line(s, ("a", EVIL), **{f"new/{EVIL}": float(s % 5)}) for s in range(60)]
    samples = [
        sample(step, domain=who, teacher=who, text=f"{EVIL} step {step}")
        for step in (0, 30, 59)
        for who in ("a", EVIL)
    ]
    write_run(directory, lines=lines, samples=samples, settings=settings, summary=summary)
    assert main(["report", str(directory)]) == 0
    return directory / "report.html"


@pytest.fixture(scope="module")
def opened(browser: Any, page_file: Path) -> Iterator[Opened]:
    with open_page(browser, page_file) as found:
        yield found


def test_nothing_is_asked_for_but_the_file(opened: Opened, page_file: Path) -> None:
    assert [url for url in opened.requests if not url.startswith(("data:", "blob:"))] == [
        page_file.resolve().as_uri()
    ]
    assert opened.errors == []


def test_every_plot_has_drawn_data(opened: Opened) -> None:
    """Every curve and every running mean has a line in the picture, as wide as a plot."""
    found: list[dict[str, Any]] = opened.page.evaluate(
        """() => [...document.querySelectorAll(".plots:not(#time-plot) .figure")].map((box) => ({
            title: box.querySelector("h3").textContent,
            paths: [...box.querySelectorAll(".scatterlayer path.js-line")].map(
                (path) => path.getBBox().width),
            wanted: JSON.parse(document.getElementById("data").textContent).figures
                .find((one) => one.title === box.querySelector("h3").textContent)
                .curves.reduce((sum, curve) => sum + (curve.smooth ? 2 : 1), 0),
        }))"""
    )
    assert {"Loss", "Gradient norm", "Tokens per second", "new"} <= {one["title"] for one in found}
    for one in found:
        assert len(one["paths"]) == one["wanted"] > 0 and min(one["paths"]) > 200, one
    bars = opened.page.evaluate("() => document.querySelectorAll('#time-plot .bars path').length")
    assert bars >= 4 * 60


def test_the_step_that_is_chosen_is_shown(opened: Opened) -> None:
    page = opened.page
    assert "step 59" in page.inner_text("#answers")
    assert page.locator("#answers .answer").count() == 2
    page.locator("#step").evaluate("(e) => { e.value = 0; e.dispatchEvent(new Event('input')); }")
    assert page.inner_text("#step-value") == "0"
    text = page.inner_text("#answers")
    assert "step 0" in text and "step 59" not in text
    page.select_option("#domain", "a")
    assert page.locator("#answers .answer").count() == 1
    page.select_option("#which", "right")
    assert page.locator("#answers .answer").count() == 0
    page.select_option("#which", "all")
    page.select_option("#domain", "")


def test_tokens_lie_chunk_by_chunk_and_tell_their_numbers(opened: Opened) -> None:
    chunk = opened.page.locator("#answers .chunk").first
    assert chunk.locator(".row").count() == 2
    assert chunk.locator(".row").nth(0).locator(".tok").count() == 1
    assert chunk.locator(".row").nth(1).locator(".tok").count() == 2
    shade = chunk.locator(".row").first.evaluate("(e) => e.style.background")
    assert shade.startswith("rgba(213, 94, 0, 0.5"), shade
    unknown = opened.page.locator("#answers .chunk.unknown").first
    assert unknown.locator(".row").first.evaluate("(e) => e.style.background") == ""
    chunk.hover()
    tip = opened.page.inner_text("#tip")
    assert "log q - log p = 2.500 nats" in tip and "1-n" in tip and "-0.500" in tip


def test_hostile_text_is_shown_and_does_not_run(opened: Opened) -> None:
    assert opened.page.evaluate("window.hacked") is None
    assert opened.page.locator("img").count() == 0
    assert EVIL in opened.page.inner_text("#headroom")
    assert EVIL in opened.page.inner_text("#answers")
    opened.page.locator("#config summary").click()
    assert EVIL in opened.page.inner_text("#config pre").replace("''", "'")


@pytest.mark.parametrize("dark", [False, True])
def test_a_narrow_screen_needs_no_sideways_scrolling(
    browser: Any, page_file: Path, dark: bool
) -> None:
    with open_page(browser, page_file, width=400, dark=dark) as found:
        width = found.page.evaluate("document.documentElement.scrollWidth")
        ground = found.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert width <= 400
    assert ground == ("rgb(18, 23, 29)" if dark else "rgb(255, 255, 255)")
    assert found.errors == []


def test_runs_side_by_side(browser: Any, tmp_path: Path) -> None:
    for name in ("one", EVIL.replace("/", "")):
        lines = [step_line(s) for s in range(60)]
        write_run(tmp_path / name, lines=lines, summary=finished(), settings=config("r"))
    runs = [str(path) for path in tmp_path.iterdir()]
    page = tmp_path / "compare.html"
    assert main(["compare", *runs, "--output", str(page)]) == 0
    with open_page(browser, page) as found:
        lines = found.page.evaluate(
            "() => [...document.querySelectorAll('.figure')].map("
            "(box) => box.querySelectorAll('.scatterlayer path.js-line').length)"
        )
        assert found.page.evaluate("window.hacked") is None
        assert found.requests == [page.resolve().as_uri()]
        assert found.errors == []
    assert lines and min(lines) >= 2
