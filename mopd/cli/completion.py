"""`mopd completion bash | zsh | fish`: what a shell needs to complete `mopd`.

The script asks `mopd` itself (argcomplete's protocol), so completions are those of the installed
version: verbs, options, names of recipes, keys of the schema, and the values of keys that have a
fixed set of them.
"""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Iterator, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from mopd.cli.words import Parser
from mopd.errors import ConfigError

SHELLS = ("bash", "zsh", "fish")


def parser() -> argparse.ArgumentParser:
    found = Parser(
        prog="mopd completion",
        description="Print the completion script of a shell: source <(mopd completion bash) in "
        "~/.bashrc, `mopd completion fish > ~/.config/fish/completions/mopd.fish`, and for zsh a "
        "file _mopd in $fpath.",
    )
    found.add_argument("shell", choices=SHELLS)
    return found


def run(words: Sequence[str]) -> int:
    options = parser().parse_args(words)
    from argcomplete.shell_integration import shellcode

    print(shellcode(["mopd"], True, options.shell))
    return 0


def complete() -> None:
    """Answers the shell that asked through the environment, and ends the process."""
    import argcomplete

    argcomplete.autocomplete(
        whole_parser(os.environ.get("COMP_LINE", "")), always_complete_options=False
    )


def whole_parser(line: str) -> argparse.ArgumentParser:
    """The command with the words of the one verb that ``line`` names, which alone is imported."""
    from mopd.cli import main

    found = main.parser()
    (verbs,) = (a for a in found._actions if isinstance(a, argparse._SubParsersAction))
    verb = next((word for word in line.split()[1:] if word in main.VERBS), None)
    if verb is not None:
        own: argparse.ArgumentParser = importlib.import_module(f"mopd.cli.{verb}").parser()
        verbs._name_parser_map[verb] = own
        for action in own._actions:
            if action.dest == "words":
                action.completer = _Words()  # pyright: ignore[reportAttributeAccessIssue]
    return found


class _Words:
    """``recipe=<name>`` and ``key=value``."""

    def __call__(self, prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
        key, is_value, _value = prefix.partition("=")
        given = [word for word in getattr(parsed_args, "words", None) or [] if "=" in word]
        if is_value:
            return [f"{key}={value}" for value in values_of(key)]
        named = any(word.startswith("recipe=") for word in given)
        keys = [f"{found}=" for found in keys_of(given)]
        return keys if named else ["recipe=", *keys]


def keys_of(given: Sequence[str]) -> Iterator[str]:
    """Every key of the schema; the teachers and pools are those that the recipe has."""
    from mopd.config.keys import key_paths

    names = _names(given)
    for path, _ in key_paths():
        section, mark, rest = path.partition(".<name>.")
        if not mark:
            yield path
        for name in names.get(section, ()):
            yield f"{section}.{name}.{rest}"


def _names(given: Sequence[str]) -> dict[str, list[str]]:
    from mopd.config.load import load_config, parse_arguments

    try:
        recipe, _ = parse_arguments([word for word in given if word.startswith("recipe=")])
        config = load_config(recipe)
    except ConfigError:
        return {}
    return {"teachers": list(config.teachers), "pools": list(config.pools)}


def values_of(key: str) -> list[str]:
    """Names of recipes for ``recipe``; else what the key can be, where that is a fixed set."""
    from mopd.config.keys import key_paths
    from mopd.config.load import recipe_names

    if key == "recipe":
        return recipe_names()
    for path, field in key_paths():
        section, mark, rest = path.partition(".<name>.")
        fits = key.startswith(f"{section}.") and key.endswith(f".{rest}") if mark else key == path
        if fits:
            return list(dict.fromkeys(_values(field.annotation)))
    return []


def _values(annotation: Any) -> Iterator[str]:
    kind, parts = get_origin(annotation), get_args(annotation)
    if annotation is bool:
        yield from ("true", "false")
    elif annotation is NoneType:
        yield "null"
    elif kind is Literal:
        yield from (str(part) for part in parts)
    elif kind is Annotated:
        yield from _values(parts[0])
    elif kind in (Union, UnionType):
        for part in parts:
            yield from _values(part)
