"""A real headless browser on a local file, with every request and complaint written down."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.helpers.missing import missing

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@dataclass
class Opened:
    """A page, and what happened on it: URLs it asked for, errors of its scripts and console."""

    page: Any
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def browser_path() -> str:
    """`MOPD_BROWSER` or a Chromium on the path; skips where there is none, and fails in CI."""
    named = os.environ.get("MOPD_BROWSER")
    found = named if named and Path(named).is_file() else None
    found = found or next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        missing("no Chromium or Chrome here: install one, or name it by MOPD_BROWSER")
    return found


@contextmanager
def headless() -> Iterator[Any]:
    """A browser with a fresh profile. One at a time: playwright's loop is the thread's own."""
    executable = browser_path()
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("no playwright here: pip install 'mopd[dev]'")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable, headless=True, args=list(FLAGS)
        )
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def open_page(
    browser: Any, path: Path, *, width: int = 1200, height: int = 900, dark: bool = False
) -> Iterator[Opened]:
    """A file in a profile of its own, once all of its plots are drawn."""
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
    )
    try:
        opened = Opened(context.new_page())
        opened.page.on("request", lambda request: opened.requests.append(request.url))
        opened.page.on("pageerror", lambda error: opened.errors.append(str(error)))
        opened.page.on("console", lambda message: _note(opened, message))
        opened.page.goto(path.resolve().as_uri())
        opened.page.wait_for_selector("html[data-drawn]", timeout=60_000, state="attached")
        yield opened
    finally:
        context.close()


def _note(opened: Opened, message: Any) -> None:
    if message.type in ("error", "warning"):
        opened.errors.append(f"{message.type}: {message.text}")
