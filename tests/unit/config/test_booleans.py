"""Every boolean of a recipe: what counts as no, as yes, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_origin

import pytest
from pydantic import BaseModel

from mopd.config.load import load_config
from mopd.config.schema import RunConfig
from mopd.errors import ConfigError

RECIPE = "student: {model: s}\nteachers: {math: {model: t}}\npools: {big: {num_devices: 1}}\n"
NAMES = {"teachers": "math", "pools": "big"}  # keys of mappings by name
NO = ("0", "false", "False", "no", "off", "'0'", '"false"', '"no"')
YES = ("1", "true", "True", "yes", "on", "'1'", '"true"', '"yes"')
NONSENSE = ("2", "perhaps", "-1", "[true]")


def booleans(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted keys of all fields that are booleans, by the types of the schema."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if get_origin(kind) is dict:
            kind, name = get_args(kind)[1], f"{name}.{NAMES.get(name, '')}"
        if kind is bool or bool in get_args(kind):
            yield prefix + name
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from booleans(kind, f"{prefix}{name}.")


KEYS = sorted(booleans(RunConfig))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def values(recipe: Path, word: str, *keys: str) -> set[object]:
    """What ``keys`` are once all of them are overridden with ``word``."""
    config = load_config(recipe, [f"{key}={word}" for key in keys])
    return {_value(config, key) for key in keys}


def _value(found: object, key: str) -> object:
    for part in key.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    return found


def test_the_schema_has_the_booleans_that_are_known() -> None:
    assert {"run.overwrite", "checkpoint.verify", "pools.big.shared"} <= set(KEYS)
    assert "teachers.math.backend.offload" in KEYS and len(KEYS) > 15


@pytest.mark.parametrize("word", NO)
def test_words_for_no(recipe: Path, word: str) -> None:
    assert values(recipe, word, *KEYS) == {False}


@pytest.mark.parametrize("word", YES)
def test_words_for_yes(recipe: Path, word: str) -> None:
    assert values(recipe, word, *KEYS) == {True}


@pytest.mark.parametrize(
    ("word", "expected"),
    [("0", False), ("false", False), ("no", False), ("", False), ("1", True), ("yes", True)],
)
def test_variables_of_the_environment(
    recipe: Path, word: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWITCH", word)
    assert values(recipe, "${oc.env:SWITCH}", *KEYS) == {expected}
    assert values(recipe, '"${oc.env:SWITCH}"', *KEYS) == {expected}


@pytest.mark.parametrize("key", KEYS)
def test_nonsense_is_refused_with_key_and_remedy(recipe: Path, key: str) -> None:
    for word in NONSENSE:
        with pytest.raises(ConfigError) as caught:
            values(recipe, word, key)
        message = str(caught.value)
        assert message.startswith(f"{key}: ") and "\n" not in message, word
        assert message.endswith("; write true or false"), word


def test_nothing_is_no_for_switches_alone(recipe: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.steps: expected a valid integer"):
        values(recipe, "''", "train.steps")
