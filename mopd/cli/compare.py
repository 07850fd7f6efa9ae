"""`mopd compare RUN RUN ...`: runs side by side, as one HTML page that needs no network."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from mopd.cli.report import add_page_options, write_page
from mopd.cli.words import Parser


def run(words: Sequence[str]) -> int:
    """Reads the runs' files, writes the page, prints where it is."""
    options = parser().parse_args(words)
    from mopd.report.compare import compare
    from mopd.report.model import build_report
    from mopd.report.page import render_comparison
    from mopd.report.read import read_run

    now = time.time()
    reports = [build_report(read_run(path, now=now), audit=False) for path in options.run_dirs]
    found = compare(reports)
    path = options.output or Path("compare.html")
    write_page(path, render_comparison(found), found.headline(), options=options)
    return 0


def parser() -> argparse.ArgumentParser:
    found = Parser(
        prog="mopd compare",
        description="Show runs side by side; those that differ in run.seed alone are one group.",
    )
    found.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN", help="runs/<name>")
    add_page_options(found, default="compare.html here")
    return found
