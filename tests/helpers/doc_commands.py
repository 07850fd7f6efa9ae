"""The commands of a fenced block: how they are cut apart, shortened, and checked unrun."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mopd.cli.main import VERBS
from mopd.config import load_config
from mopd.config.check import check_config
from mopd.config.schema import RunConfig
from mopd.demo.fill import WorldFill
from mopd.runtime.demand import student_ranks
from tests.helpers.markdown import Fence
from tests.helpers.runs import ROOT

TRAIN = "launch/train.py"
OWN = ("mine", "mine.yaml")  # names that stand for a recipe of the reader's own
STAND_IN = "/models/Qwen3-8B"  # for a model of the reader's own
SHELL = re.compile(r"[&|<>$;`*]|^(until|for|while|if|cd|export|source|cat|ln|rm) ")


class Parsed(Exception):
    """The words of a command were understood."""


def commands(fence: Fence) -> list[str]:
    """One string a command, with its continued lines joined and comments left out."""
    joined = fence.text.replace("\\\n", " ")
    lines = [_uncommented(line).strip() for line in joined.splitlines()]
    return [re.sub(r"\s+", " ", line) for line in lines if line]


def _uncommented(line: str) -> str:
    """Without the comment, which begins with a # at the start of a word outside of quotes."""
    quote = ""
    for place, letter in enumerate(line):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter == "#" and (place == 0 or line[place - 1] in " \t"):
            return line[:place]
    return line


def is_training(command: str) -> bool:
    return TRAIN in command


def with_suffix(command: str, suffix: list[str]) -> str:
    """``suffix`` behind the words of a training, before what ends a command of the shell."""
    ending = re.search(r"\s*(&|\|.*|;.*|>.*)?$", command)
    assert ending is not None
    return f"{command[: ending.start()]} {shlex.join(suffix)}{ending[0]}"


def check_unrun(command: str) -> None:
    """What can be said of a command that is not run: files, recipes, keys, options.

    Raises AssertionError or ConfigError with the reason.
    """
    # where `...` stands for settings of the reader's own, a student is among them
    own = f" student.model={STAND_IN} " if "..." in command and TRAIN in command else " "
    words = shlex.split(re.sub(r"=\.\.\.", f"={STAND_IN}", command).replace(" ... ", own))
    for word in words:
        if re.fullmatch(r"(launch|docs|recipes)/[\w/.]+", word):
            assert (ROOT / word).exists(), f"{word} does not exist"
    if any(word.startswith("recipe=") for word in words):
        _check_recipe(words)
    verb = _verb(words)
    if verb is not None:
        _check_verb(verb)


def _check_recipe(words: list[str]) -> None:
    settings = [word for word in words if re.match(r"[a-z_]+[\w.-]*=", word)]
    recipe = next(word.removeprefix("recipe=") for word in settings if word.startswith("recipe="))
    overrides = [_known(word) for word in settings if not word.startswith("recipe=")]
    if recipe in OWN:
        recipe = "mopd_ctkd"
    config = load_config(recipe, overrides, fill=WorldFill(announce=False, build=False))
    check_config(config, world_size=_world_size(words, config), files=False)


def _known(word: str) -> str:
    """``word`` with a model whose shape is known for one that is the reader's own."""
    key, _, value = word.partition("=")
    is_known = (ROOT / "recipes" / "models" / Path(value).name).is_dir()
    return f"{key}={STAND_IN}" if key.endswith(".model") and not is_known else word


def _world_size(words: list[str], config: RunConfig) -> int:
    """How many ranks the command starts: of torchrun's options, or what the recipe asks for."""
    if TRAIN in words and config.launcher != "ray":
        size = 1
        for option in ("nproc-per-node", "nnodes"):
            for name in (f"--{option}", f"--{option.replace('-', '_')}"):
                if name in words:
                    size *= int(words[words.index(name) + 1])
        return size
    return student_ranks(config)


def _verb(words: list[str]) -> list[str] | None:
    """The words of ``mopd VERB ...``, behind variables and whatever ``.venv/bin/`` it has."""
    for place, word in enumerate(words):
        if Path(word).name == "mopd" and place + 1 < len(words):
            return words[place + 1 :]
        if "=" not in word:
            return None
    return None


def _check_verb(words: list[str]) -> None:
    if words[0] in ("--version", "--help"):
        return
    assert words[0] in VERBS, f"mopd {words[0]}: no such verb"
    run = importlib.import_module(f"mopd.cli.{words[0]}").run
    with _only_parsed():
        try:
            run(words[1:])
        except Parsed:
            return
        except SystemExit as ending:
            raise AssertionError(f"mopd {shlex.join(words)}: is not understood") from ending


@contextmanager
def _only_parsed() -> Iterator[None]:
    """The outermost parser stops the program as soon as it has understood its words."""
    understand, depth = argparse.ArgumentParser.parse_known_args, 0

    def parse(self: argparse.ArgumentParser, *args: Any, **options: Any) -> Any:
        nonlocal depth
        depth += 1
        try:
            found, unknown = understand(self, *args, **options)
        finally:
            depth -= 1
        if depth > 0:
            return found, unknown
        if any(word.startswith("-") for word in unknown):
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        raise Parsed

    argparse.ArgumentParser.parse_known_args = parse  # type: ignore[method-assign]
    try:
        yield
    finally:
        argparse.ArgumentParser.parse_known_args = understand  # type: ignore[method-assign]
