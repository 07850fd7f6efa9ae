"""`mopd report RUN`: a run as one HTML page that needs no network."""

from __future__ import annotations

import argparse
import json
import time
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mopd.cli.words import Parser
from mopd.errors import ConfigError
from mopd.metrics.text import json_safe, printable, replace_file


def run(words: Sequence[str]) -> int:
    """Reads the run's files, writes the page, prints where it is."""
    options = parser().parse_args(words)
    from mopd.report.model import build_report
    from mopd.report.page import render_report
    from mopd.report.read import read_run

    report = build_report(read_run(options.run_dir, now=time.time()))
    path = options.output or options.run_dir / "report.html"
    write_page(path, render_report(report), report.headline(), options=options)
    return 0


def write_page(
    path: Path, page: str, headline: dict[str, Any], *, options: argparse.Namespace
) -> None:
    """Writes the page whole, prints its place or ``headline`` as JSON, and opens it if asked to.

    Raises:
        ConfigError: it cannot be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, page)
    except OSError as error:
        raise ConfigError(
            f"--output {path}: {error.strerror or error}; name another file"
        ) from error
    size = path.stat().st_size
    if options.json:
        print(json.dumps(json_safe({"page": str(path), "bytes": size, **headline}), indent=2))
    else:
        print(printable(f"{path}: {size / 1e6:.1f} MB; open it in a browser"))
    if options.open:
        webbrowser.open(path.resolve().as_uri())


def add_page_options(parser: argparse.ArgumentParser, *, default: str) -> None:
    """``--output``, ``--open`` and ``--json``."""
    parser.add_argument("--output", type=Path, metavar="FILE", help=f"default: {default}")
    parser.add_argument("--open", action="store_true", help="show it in the browser")
    parser.add_argument("--json", action="store_true", help="print the numbers of its head as JSON")


def parser() -> argparse.ArgumentParser:
    found = Parser(
        prog="mopd report", description="Show a run as one HTML page that needs no network."
    )
    found.add_argument("run_dir", type=Path, metavar="RUN", help="its directory: runs/<name>")
    add_page_options(found, default="report.html in the run's directory")
    return found
