"""Files of other trainers as flat keys: YAML, JSON, or a shell script with arguments.

Nothing that is read is run: YAML knows plain values alone, a script is only cut into words, and its
variables are looked up in the script itself.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from mopd.config.keys import printable
from mopd.errors import ConfigError

MAX_BYTES = 1 << 20
MAX_KEYS = 5000
MAX_DEPTH = 20
ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?::?-([^${}]*))?\})")
SEPARATORS = frozenset(";&|\n")
COMMENT = re.compile(r"(?:^[ \t]*#|[ \t]#[ \t]).*$", re.MULTILINE)
LAUNCHERS = ("torchrun", "accelerate", "deepspeed")  # their own options stand before the script


class _Loader(yaml.SafeLoader):
    """Plain values; a key that stands twice is an error instead of a value that vanishes."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            name = str(getattr(key, "value", ""))
            if name in seen and name != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"`{name}` stands twice", key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep=deep)


def read_keys(path: Path) -> dict[str, Any]:
    """Dotted keys of a file and their values. Raises ConfigError of one line.

    Positions in lists of sections are numbers (teachers.0.weight); other lists are values.
    Variables that a script sets stand under their own names.
    """
    shown = printable(path.name)
    content = _text(path, shown)
    if path.suffix.lower() == ".json":
        values = _json(content, shown)
    elif path.suffix.lower() in (".yaml", ".yml") or not _is_script(content):
        values = _yaml(content, shown)
    else:
        values = _script(content, shown)
    if not isinstance(values, dict) or not values:
        raise ConfigError(f"{shown}: has no keys; give a YAML, JSON or shell file with settings")
    flat: dict[str, Any] = {}
    try:
        for key, value in _flatten(values, "", 0):
            if key in flat:
                raise ConfigError(f"{shown}: `{printable(key)}` stands twice; keep one of them")
            flat[key] = value
            if len(flat) > MAX_KEYS:
                raise ConfigError(f"{shown}: has more than {MAX_KEYS} keys; is it a configuration?")
    except RecursionError:
        raise ConfigError(f"{shown}: is nested deeper than {MAX_DEPTH}; flatten it") from None
    return flat


def _text(path: Path, shown: str) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise ConfigError(
                f"{shown}: is larger than {MAX_BYTES >> 20} MiB; give a configuration"
            )
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{shown}: is not UTF-8 text; give a configuration") from error
    except OSError as error:
        reason = printable(error.strerror or str(error))
        raise ConfigError(
            f"{printable(str(path))}: cannot be read ({reason}); correct it"
        ) from error


def _json(content: str, shown: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key stands twice")
        return dict(pairs)

    try:
        return json.loads(content, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{shown}: is not valid JSON ({printable(str(error))})") from error


def _yaml(content: str, shown: str) -> Any:
    try:
        loader = _Loader(content)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        cause = printable(error.problem or "syntax error")
        raise ConfigError(f"{shown}: is not valid YAML{line} ({cause})") from error
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        cause = printable(str(error))[:200]
        raise ConfigError(f"{shown}: is not valid YAML ({cause})") from error


def _is_script(content: str) -> bool:
    lines = [line.strip() for line in content.splitlines() if not line.lstrip().startswith("#")]
    return content.startswith("#!") or any(
        line.startswith(("--", "export ")) or re.search(r"\s--\w", line) or ASSIGNMENT.match(line)
        for line in lines
    )


def _script(content: str, shown: str) -> dict[str, Any]:
    """Arguments `--key value ...` and variables of a script, in order."""
    try:
        joined_lines = re.sub(r"\\[ \t]*\r?\n", " ", COMMENT.sub("", content))
        lexer = shlex.shlex(joined_lines, posix=True, punctuation_chars=";&|\n")
        lexer.whitespace, lexer.commenters, lexer.whitespace_split = " \t\r", "", True
        words = list(lexer)
    except ValueError as error:
        raise ConfigError(f"{shown}: is not a shell script ({printable(str(error))})") from error
    found: dict[str, Any] = {}
    variables: dict[str, str] = {}
    name: str | None = None
    launcher = False
    for word in words:
        if word and set(word) <= SEPARATORS:
            name, launcher = None, False
        elif re.match(r"--?[A-Za-z]", word):
            name, joined, value = word.lstrip("-").partition("=")
            name = ("launch." if launcher else "") + name.replace("-", "_")
            if name in found:
                raise ConfigError(f"{shown}: `--{printable(name)}` stands twice; keep one command")
            found[name] = _filled(value, variables) if joined else True
            name = None if joined else name
        elif name is not None and not (launcher and _is_target(word)):
            before = found[name]
            value = _filled(word, variables)
            found[name] = value if before is True else [*_listed(before), value]
        elif (match := ASSIGNMENT.fullmatch(word)) is not None:
            variables[match[1]] = found[match[1]] = _filled(match[2], variables)
        else:
            launcher = (launcher or word in LAUNCHERS) and not _is_target(word)
            name = None
    return found


def _is_target(word: str) -> bool:
    return word.endswith(".py")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _filled(word: str, variables: dict[str, str]) -> str:
    """The word with the script's own variables put in; others stay as they are written."""

    def fill(match: re.Match[str]) -> str:
        known = variables.get(match[1] or match[2])
        return known if known is not None else (match[3] if match[3] is not None else match[0])

    return VARIABLE.sub(fill, word)[:MAX_BYTES]


def _flatten(value: Any, prefix: str, depth: int) -> Iterator[tuple[str, Any]]:
    if depth > MAX_DEPTH:
        raise RecursionError
    if isinstance(value, dict) and value:
        for key, child in value.items():
            name = str(key)
            yield from _flatten(child, f"{prefix}.{name}" if prefix else name, depth + 1)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for place, child in enumerate(value):
            yield from _flatten(child, f"{prefix}.{place}", depth + 1)
    elif isinstance(value, list):
        yield prefix, [_plain(item, depth) for item in value[:MAX_KEYS]]
    else:
        yield prefix, _plain(value, depth)


def _plain(value: Any, depth: int) -> Any:
    """What JSON has; dates, bytes and sets of YAML as text, lists in lists with a limit."""
    if depth > MAX_DEPTH:
        raise RecursionError
    if isinstance(value, list):
        if len(value) > 100:
            raise RecursionError
        return [_plain(item, depth + 4) for item in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
