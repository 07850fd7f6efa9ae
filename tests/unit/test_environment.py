"""Switches of the environment."""

from __future__ import annotations

import ast

import pytest

from mopd.environment import FALSE, TRUE, flag
from mopd.errors import ConfigError
from tests.helpers.source import shipped


@pytest.mark.parametrize("word", [*FALSE, "No", "FALSE", " 0 "])
def test_words_for_no(word: str) -> None:
    assert flag("SWITCH", {"SWITCH": word}, default=True) is False


@pytest.mark.parametrize("word", [*TRUE, "Yes", "TRUE", " 1 "])
def test_words_for_yes(word: str) -> None:
    assert flag("SWITCH", {"SWITCH": word}) is True


@pytest.mark.parametrize("default", [True, False])
def test_what_is_not_set_is_the_default(default: bool) -> None:
    assert flag("SWITCH", {"OTHER": "1"}, default=default) is default


@pytest.mark.parametrize("word", ["2", "perhaps", "nope", "truee", "a\nb"])
def test_nonsense_is_refused_in_one_line(word: str) -> None:
    with pytest.raises(ConfigError, match=r"SWITCH.*set it to 1 or 0") as caught:
        flag("SWITCH", {"SWITCH": word})
    assert "\n" not in str(caught.value)


# Every variable that mopd reads, and what it is. A switch is read by `flag` alone.
VARIABLES = {
    "RANK": "a number",
    "LOCAL_RANK": "a number",
    "WORLD_SIZE": "a number",
    "LOCAL_WORLD_SIZE": "a number",
    "MOPD_FAULT_POINT": "a name",
    "MOPD_MINDSPEED": "a switch",
    "CUDA_DEVICE_MAX_CONNECTIONS": "a number, of Megatron's",
    "PYTHONPATH": "folders, of Python's",
    "RAY_ADDRESS": "an address, of Ray's",
    "COMP_LINE": "what was typed, of argcomplete",
    "RAY_USAGE_STATS_ENABLED": "set for Ray, which reads it",
}


def read_variables(tree: ast.AST) -> dict[str, str]:
    """Literal names that are read from the environment, and with which function."""
    constants = {
        target.id: node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        text = ast.unparse(node.func)
        if not text.endswith(("environ.get", "environ.setdefault", "getenv")) and text != "flag":
            continue
        name = node.args[0]
        if isinstance(name, ast.Name):
            found[str(constants.get(name.id, ""))] = text
        elif isinstance(name, ast.Constant):
            found[str(name.value)] = text
    return {name: text for name, text in found.items() if name}


def test_every_variable_is_in_the_table() -> None:
    found: dict[str, str] = {}
    for source in shipped():
        found |= read_variables(source.tree)
    assert set(found) == set(VARIABLES)
    switches = {name for name, kind in VARIABLES.items() if kind == "a switch"}
    assert {name for name, text in found.items() if text == "flag"} == switches


def test_a_switch_that_is_read_as_text_is_caught() -> None:
    tree = ast.parse("import os\nif os.environ.get('MOPD_NEW'): ...\nflag('MOPD_OLD', os.environ)")
    assert read_variables(tree) == {"MOPD_NEW": "os.environ.get", "MOPD_OLD": "flag"}
