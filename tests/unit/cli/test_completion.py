"""The completion script in a real bash, and what the command tells a shell."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mopd.cli.completion import values_of
from mopd.cli.main import VERBS, main
from tests.helpers.runs import ROOT

# What bash sets before it calls a completion function, and what it reads after.
ASK = """
source <(mopd completion bash)
ask() {
    COMP_LINE="$1"; COMP_POINT=${#1}; COMP_TYPE=9; COMP_KEY=9; COMPREPLY=()
    $(complete -p mopd | sed 's/.*-F \\([^ ]*\\).*/\\1/') mopd
    printf '%s\\n' "${COMPREPLY[*]}"
}
"""
RECIPE = """
teachers: {math: {model: m}, code: {model: c}}
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the installed script, as pip writes it."""
    directory = tmp_path_factory.mktemp("bin")
    script = directory / "mopd"
    script.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from mopd.cli.main import main\nsys.exit(main())\n"
    )
    script.chmod(0o755)
    (directory / "two.yaml").write_text(RECIPE)
    return directory


@pytest.fixture(scope="module")
def answers(command: Path) -> dict[str, list[str]]:
    """What bash would offer at the end of each line; one shell for all."""
    two = command / "two.yaml"
    lines = {
        "verb": "mopd ch",
        "sub-verb": "mopd checkpoint ",
        "option": "mopd check --l",
        "sub-option": "mopd checkpoint verify --a",
        "recipe": "mopd check recipe=mopd_o",
        "key": "mopd plan recipe=mopd_ctkd train.num_pro",
        "value": "mopd plan recipe=mopd_ctkd distillation.loss=",
        "teacher": f"mopd plan recipe={two} teachers.math.weig",
        "teacher's value": f"mopd plan recipe={two} teachers.code.loss=c",
        "first word": "mopd check ru",
        "shell": "mopd completion ",
    }
    asks = "\n".join(f"ask {line!r}" for line in lines.values())
    done = subprocess.run(
        ["bash", "--norc", "-c", ASK + asks],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PATH": f"{command}:{os.environ['PATH']}"},
    )
    told = done.stdout.splitlines()
    assert len(told) == len(lines), done
    return {name: one.split() for name, one in zip(lines, told, strict=True)}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("verb", ["check", "checkpoint"]),
        ("sub-verb", ["list", "verify"]),
        ("option", ["--live"]),
        ("sub-option", ["--all"]),
        ("recipe", ["mopd_offpolicy", "mopd_opd"]),
        ("key", ["train.num_prompts_per_step="]),
        ("value", ["ctkd", "gold", "uld", "kl", "opd"]),
        ("teacher", ["teachers.math.weight="]),
        ("teacher's value", ["ctkd"]),
        ("shell", ["bash", "zsh", "fish"]),
    ],
)
def test_bash_offers(name: str, wanted: list[str], answers: dict[str, list[str]]) -> None:
    assert answers[name] == wanted


def test_keys_are_offered_before_a_recipe_is_named(answers: dict[str, list[str]]) -> None:
    assert "run.seed=" in answers["first word"] and "run.name=" in answers["first word"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_has_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "mopd" in script and "_ARGCOMPLETE" in script
    found = shutil.which(shell)
    if found is not None:  # the ones that are here can read it
        subprocess.run([found, "-n"], input=script, text=True, check=True, timeout=30)


def test_values_of_keys() -> None:
    assert values_of("student.dtype") == ["float32", "bfloat16"]
    assert values_of("train.packing") == ["true", "false"]
    assert values_of("teachers.x.backend.type")[:1] == ["hf"]
    assert "null" in values_of("distillation.top_k")
    assert values_of("student.model") == ["null"] and values_of("no.such.key") == []
    assert "mopd_ctkd" in values_of("recipe") and "base" not in values_of("recipe")


def test_verbs_complete_in_the_order_of_the_help() -> None:
    assert list(VERBS) == sorted(VERBS)
