"""`mopd check recipe=<name> [key=value ...] [--live]`: would this recipe start?

Exit codes: 0 nothing is wrong, 1 with --live a teacher or the sampler cannot be used, 2 the recipe,
its data, its tokenizers or its models are wrong.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from mopd.cli.words import Parser, add_words, parse, said_aside
from mopd.errors import ConfigError
from mopd.metrics.text import printable

if TYPE_CHECKING:
    from mopd.config.schema import RunConfig
    from mopd.runtime.preflight import Finding, Preflight

_ITEM = 26  # columns of a line


def parser() -> argparse.ArgumentParser:
    found = Parser(
        prog="mopd check", description="Validate a recipe as a run does, and say all that is wrong."
    )
    add_words(found)
    found.add_argument(
        "--live",
        action="store_true",
        help="load or reach every teacher and the sampler, with their start-up self tests",
    )
    found.add_argument("--json", action="store_true", help="print the findings as JSON")
    return found


def run(words: Sequence[str]) -> int:
    """Prints a line for each part as soon as it is known."""
    options, rest = parse(parser(), words)
    from mopd.config.load import parse_arguments

    recipe, overrides = parse_arguments(rest)  # a wrong command is no finding
    found: list[Finding] = []
    failed_live = False
    with said_aside(options.json):
        for finding, is_live in _findings(recipe, overrides, live=options.live):
            found.append(finding)
            failed_live |= is_live and finding.status == "problem"
            if not options.json:
                print(_line(finding), flush=True)
    problems = sum(finding.status == "problem" for finding in found)
    code = 0 if not problems else 1 if failed_live else 2
    if options.json:
        print(json.dumps({"ok": not problems, "findings": [asdict(one) for one in found]}))
    else:
        print(f"{recipe}: {f'{problems} problems' if problems else 'ok'}")
    return code


def _line(finding: Finding) -> str:
    return printable(f"{finding.item:<{_ITEM}}  {finding.status:<8}{finding.detail}")


def _findings(
    recipe: str, overrides: Sequence[str], *, live: bool
) -> Iterator[tuple[Finding, bool]]:
    """Each with whether it comes from a live check, which begins once nothing else is wrong."""
    from mopd.config.check import check_config
    from mopd.config.load import load_config
    from mopd.demo.fill import WorldFill
    from mopd.runtime.demand import student_ranks

    fill = WorldFill(announce=True)
    try:
        config = load_config(recipe, overrides, fill=fill)
        check_config(config, world_size=student_ranks(config))
    except ConfigError as error:
        from mopd.runtime.preflight import Finding

        yield Finding(item="recipe", status="problem", detail=str(error)), False
        return

    from mopd.runtime.preflight import Finding, Preflight

    detail = fill.announcement or "keys, types and what they say together"
    yield Finding(item="recipe", status="ok", detail=detail), False
    preflight, is_right = Preflight(config), True
    for finding in preflight.findings():
        is_right &= finding.status != "problem"
        yield finding, False
    if live and is_right:
        for finding in _live(config, preflight):
            yield finding, True
    elif live:
        why = "what is wrong above comes first"
        yield Finding(item="--live", status="skipped", detail=why), False


def _live(config: RunConfig, preflight: Preflight) -> Iterator[Finding]:
    from mopd.runtime.preflight_live import live_findings

    assert preflight.tokenizers is not None and preflight.data is not None
    yield from live_findings(
        config,
        preflight.tokenizers,
        preflight.data["data.path"],
        directory=Path(config.cache_dir) / "check" / config.run.name,
    )
