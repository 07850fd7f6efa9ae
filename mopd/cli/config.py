"""`mopd config recipe=<name> [key=value ...]`: print the resolved recipe."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from mopd.cli.words import Parser, add_words, parse
from mopd.config.load import dump_config, load_config, parse_arguments


def run(words: Sequence[str]) -> int:
    """Print the YAML that `load_config` makes of the words; it can be used as a recipe again."""
    options, rest = parse(parser(), words)
    recipe, overrides = parse_arguments(rest)
    config = load_config(recipe, overrides)
    if options.json:
        print(json.dumps(config.model_dump(mode="json"), indent=2))
    else:
        print(dump_config(config), end="")
    return 0


def parser() -> argparse.ArgumentParser:
    found = Parser(prog="mopd config", description="Print a recipe, resolved and validated.")
    add_words(found)
    found.add_argument("--json", action="store_true", help="JSON instead of YAML")
    return found
