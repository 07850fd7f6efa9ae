"""`mopd recipe import FILE`: another trainer's configuration as a recipe."""

from __future__ import annotations

import argparse
import dataclasses
import json
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mopd.cli.words import Parser
from mopd.config.load import load_config
from mopd.config.peers import PEERS
from mopd.config.peers.convert import Conversion, Entry, convert, guess
from mopd.config.peers.read import read_keys
from mopd.config.peers.table import key_rows, key_table
from mopd.config.peers.write import recipe_text
from mopd.errors import ConfigError
from mopd.metrics.text import printable, replace_file

KINDS = {
    "carried": "carried over",
    "changed": "carried over, with another meaning",
    "dropped": "dropped",
    "unknown": "not known",
}


def run(words: Sequence[str]) -> int:
    """0 all that matters was carried over, 1 something was not, 2 the file cannot be read."""
    options = parser().parse_args(words)
    return options.run(options)


def parser() -> argparse.ArgumentParser:
    found = Parser(prog="mopd recipe", description="Recipes from configurations of other trainers.")
    verbs = found.add_subparsers(dest="verb", metavar="VERB", required=True)
    source = verbs.add_parser("import", help="write a recipe that trains what FILE says")
    source.add_argument("file", type=Path, metavar="FILE", help="YAML, JSON, or a shell script")
    source.add_argument("--from", dest="peer", choices=tuple(PEERS), help="else told by the keys")
    source.add_argument(
        "--output", type=Path, metavar="FILE.yaml", help="default: FILE's name with .mopd.yaml"
    )
    source.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    source.add_argument(
        "--processes", type=int, metavar="N", help="data-parallel processes of their launch"
    )
    source.add_argument("--json", action="store_true", help="print the report as JSON")
    source.set_defaults(run=_import)
    keys = verbs.add_parser("keys", help="print a trainer's keys beside those of a recipe")
    keys.add_argument("--from", dest="peer", choices=tuple(PEERS), required=True)
    keys.add_argument("--json", action="store_true", help="a list of objects instead of a table")
    keys.set_defaults(run=_keys)
    return found


def _keys(options: argparse.Namespace) -> int:
    peer = PEERS[options.peer]
    print(json.dumps(key_rows(peer), indent=2) if options.json else key_table(peer), end="")
    return 0


def _import(options: argparse.Namespace) -> int:
    output = options.output or Path(f"{options.file.stem}.mopd.yaml")
    if output.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--output {output}: a recipe's name ends in .yaml; add that")
    if output.exists() and not options.overwrite:
        raise ConfigError(f"--output {output}: exists; give another name, or --overwrite")
    if options.processes is not None and not 1 <= options.processes <= 1 << 20:
        raise ConfigError(f"--processes {options.processes}: give a number of at least 1")
    given = read_keys(options.file)
    peer = PEERS[options.peer] if options.peer else guess(given)
    conversion = convert(peer, given, processes=options.processes)
    _write(output, recipe_text(conversion, origin=options.file.name))
    load_config(output)  # what was written is a recipe
    if options.json:
        print(json.dumps(_report(conversion, options.file, output), indent=2))
    else:
        print("\n".join(_lines(conversion, options.file, output)))
    return 0 if conversion.is_whole else 1


def _write(output: Path, content: str) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        replace_file(output, content)
    except OSError as error:
        raise ConfigError(f"--output {output}: cannot be written ({error.strerror})") from error


def _report(conversion: Conversion, file: Path, output: Path) -> dict[str, Any]:
    return {
        "from": conversion.peer.name,
        "file": str(file),
        "output": str(output),
        "whole": conversion.is_whole,
        "keys": [dataclasses.asdict(entry) for entry in conversion.entries],
        "defaults": [dataclasses.asdict(entry) for entry in conversion.defaults],
        "missing": conversion.missing,
        "problem": conversion.problem,
    }


def _lines(conversion: Conversion, file: Path, output: Path) -> Iterator[str]:
    title = conversion.peer.title
    yield f"{printable(str(output))}: a recipe from {printable(file.name)} ({title})"
    for kind, heading in KINDS.items():
        yield from _block(heading, [e for e in conversion.entries if e.kind == kind])
    yield from _block(f"not in the file: {title}'s defaults and ways", conversion.defaults)
    if conversion.missing:
        yield "\nstill to set:"
        yield from (f"  {printable(line)}" for line in conversion.missing)
    if conversion.problem is not None:
        yield f"\nrefused as it stands: {printable(conversion.problem)}"
    count = sum(entry.important for entry in conversion.entries)
    if count:
        yield f"\n{count} of {len(conversion.entries)} keys matter and are not carried over (!)"


def _block(heading: str, entries: list[Entry]) -> Iterator[str]:
    if not entries:
        return
    yield f"\n{heading} ({len(entries)}):"
    for entry in entries:
        value = "" if entry.value is None else f" = {_short(entry.value)}"
        ours = ", ".join(f"{key}={_short(made)}" for key, made in entry.targets.items())
        mark = "!" if entry.important else " "
        yield f"{mark} {printable(entry.key)}{value}" + (f" -> {printable(ours)}" if ours else "")
        if entry.note:
            yield textwrap.fill(
                printable(entry.note), 92, initial_indent=" " * 6, subsequent_indent=" " * 6
            )


def _short(value: Any) -> str:
    shown = printable(
        json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
    )
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
