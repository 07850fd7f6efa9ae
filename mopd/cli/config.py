"""`mopd config recipe=<name> [key=value ...]`: print the resolved recipe."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mopd.config.load import dump_config, load_config, parse_arguments


def run(words: Sequence[str]) -> int:
    """Print the YAML that `load_config` makes of the words; it can be used as a recipe again."""
    parser = argparse.ArgumentParser(
        prog="mopd config", description="Print a recipe, resolved and validated."
    )
    parser.add_argument("words", nargs="*", metavar="key=value", help="recipe=<name>, overrides")
    options, unknown = parser.parse_known_args(words)
    recipe, overrides = parse_arguments([*unknown, *options.words])
    print(dump_config(load_config(recipe, overrides)), end="")
    return 0
