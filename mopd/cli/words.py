"""Words that name a recipe and override its keys, beside a verb's own options."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from typing import Any, NoReturn

from mopd.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, as everything else here does."""

    def error(self, message: str) -> NoReturn:
        from mopd.metrics.text import printable

        self.exit(2, f"{self.prog}: {printable(message)}; see {self.prog} --help\n")


def add_words(parser: argparse.ArgumentParser) -> None:
    """``recipe=<name> [key=value ...]``, anywhere among the options."""
    parser.add_argument(
        "words", nargs="*", metavar="key=value", help="recipe=<name>, and keys that differ from it"
    )


def parse(
    parser: argparse.ArgumentParser, words: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """The verb's options, and all words with a recipe or a key.

    Raises:
        ConfigError: an option that the verb does not have.
    """
    options, unknown = parser.parse_known_args(words)
    for word in unknown:
        if word.startswith("-"):
            raise ConfigError(
                f"option `{word.partition('=')[0]}` is not known to {parser.prog}: see --help; "
                "keys of a recipe are written without dashes, as in train.steps=3"
            )
    return options, [*unknown, *options.words]


def said_aside(as_json: bool) -> AbstractContextManager[Any]:
    """Within it, what the parts of a run say on stdout goes to stderr: stdout is for JSON alone."""
    return redirect_stdout(sys.stderr) if as_json else nullcontext()
