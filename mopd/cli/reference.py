"""Tables of every verb's words and options, for docs/cli.md.

``python -m mopd.cli.reference docs/cli.md`` writes them between ``<!-- options: <verb> -->`` and
``<!-- end -->``.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from mopd.cli.main import VERBS

BLOCK = re.compile(r"(<!-- options: (?P<verb>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def parser_of(verb: str) -> argparse.ArgumentParser | None:
    """None where the verb is not installed."""
    name = f"mopd.cli.{verb}"
    return importlib.import_module(name).parser() if importlib.util.find_spec(name) else None


def reference(verb: str) -> str:
    """A Markdown table for the verb, or for each of its own verbs."""
    parser = parser_of(verb)
    if parser is None:
        return ""
    below = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not below:
        return _table(parser)
    return "\n".join(
        f"`mopd {verb} {name}`\n\n{_table(one)}" for name, one in below[0].choices.items()
    )


def filled(page: str) -> str:
    """The page with every block as the parsers are now."""

    def block(match: re.Match[str]) -> str:
        return f"{match[1]}{reference(match['verb'])}{match[3]}"

    return BLOCK.sub(block, page)


def _table(parser: argparse.ArgumentParser) -> str:
    lines = [f"| {_name(action)} | {_meaning(action)} |" for action in _shown(parser)]
    return "\n".join(["| word | |", "|---|---|", *lines, ""])


def _shown(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if not isinstance(action, argparse._HelpAction) and action.help != argparse.SUPPRESS:
            yield action


def _name(action: argparse.Action) -> str:
    value = action.metavar or ""
    if not value and action.choices is not None:
        value = " or ".join(str(choice) for choice in action.choices)
    elif not value and action.nargs != 0:
        value = action.dest.upper()
    if isinstance(action, argparse.BooleanOptionalAction):
        value = ""
    names = " or ".join(action.option_strings)
    return f"`{' '.join(part for part in (names, str(value)) if part)}`".replace("|", r"\|")


def _meaning(action: argparse.Action) -> str:
    text = (action.help or "").replace("%%", "%")
    default = action.default
    is_set = default is not None and default != [] and default != argparse.SUPPRESS
    if is_set and action.nargs != 0 and "default" not in text:
        text = f"{text} (default {default})".strip()
    needed = action.required and bool(action.option_strings)
    text = f"{text} (required)".strip() if needed else text
    return text.replace("|", r"\|").replace("<", "&lt;")


def main(path: Path) -> None:
    path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
    missing = [verb for verb in VERBS if f"<!-- options: {verb} -->" not in path.read_text()]
    print(f"{path}: {len(VERBS)} verbs" + (f", without a block: {missing}" if missing else ""))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
