"""A converted recipe as YAML whose comments say where each key comes from."""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import yaml

from mopd.config.keys import printable
from mopd.config.peers.convert import Conversion, Write, nested
from mopd.config.schema import RunConfig

WIDTH = 96
WORD = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*")
NO_WORDS = ("true", "false", "null", "yes", "no", "on", "off", "y", "n", "inf", "nan")


def recipe_text(conversion: Conversion, *, origin: str) -> str:
    """The recipe; `load_config` reads it as what was converted.

    Args:
        origin: the name of the file it comes from.
    """
    lines = [
        f"# From {printable(origin)}, a configuration of {conversion.peer.title} "
        "(docs/coming_from.md).",
    ]
    if conversion.missing:
        lines += ["#", "# Still to set:"]
        lines += [part for line in conversion.missing for part in _comment(f"- {line}", "")]
    tree = nested(conversion.writes)
    order = list(RunConfig.model_fields)
    for section in sorted(tree, key=order.index):
        lines += _lines(section, tree[section], "")
    return "\n".join(lines) + "\n"


def _lines(key: str, value: Any, indent: str) -> Iterator[str]:
    if isinstance(value, Write):
        if value.note:
            yield from _comment(value.note, indent)
        yield f"{indent}{_scalar(key)}: {_scalar(value.value)}  # {printable(value.origin)}"
        return
    yield f"{indent}{_scalar(key)}:"
    for name, child in value.items():
        yield from _lines(name, child, f"{indent}  ")


def _comment(note: str, indent: str) -> list[str]:
    return textwrap.wrap(
        printable(note),
        width=WIDTH,
        initial_indent=f"{indent}# ",
        subsequent_indent=f"{indent}#   " if note.startswith("- ") else f"{indent}# ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _scalar(value: Any) -> str:
    """Plain words without quotes, other text in double ones, with what OmegaConf would look up
    escaped; numbers as in JSON."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(_scalar(item) for item in value)}]"
    if isinstance(value, str) and WORD.fullmatch(value) and value.lower() not in NO_WORDS:
        return value
    if isinstance(value, str):
        # not JSON's escapes: YAML has no surrogates
        return yaml.safe_dump(_escaped(value), default_style='"', width=sys.maxsize).rstrip("\n")
    return json.dumps(value)


def _escaped(text: str) -> str:
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
