"""The command answers at once, and tells users what is wrong in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import mopd
from mopd.cli.main import main
from mopd.config import load
from mopd.errors import ArtifactError


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(load, "RECIPES", tmp_path)
    (tmp_path / "small.yaml").write_text("train: {steps: 7}")
    return "recipe=small"


def test_config_prints_a_recipe(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", recipe, "run.seed=9"]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    printed = load.load_config("printed")
    assert printed == load.load_config("small", ["run.seed=9"])
    assert printed.train.steps == 7


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["config"], "mopd: no recipe given"),
        (["config", "recipe=nope"], "mopd: recipe `nope` does not exist; recipes: small"),
        (["config", "recipe=small", "train.stpes=3"], "did you mean `train.steps`?"),
        (["config", "recipe=small", "--train.steps=3"], "without dashes"),
    ],
)
def test_a_wrong_recipe_is_one_line_and_exit_code_2(
    recipe: str, words: list[str], wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert wanted in captured.err


@pytest.mark.parametrize(
    "words",
    [[], ["frobnicate"], ["--nope"], ["world", "--nope"], ["recipe"], ["recipe", "import"]],
)
def test_a_wrong_command_is_one_line_and_exit_code_2(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.endswith(" --help\n")


def test_a_full_disk_is_one_line() -> None:
    """Also where the text is only written when the process ends."""
    code = "import sys; from mopd.cli.main import main; sys.exit(main())"
    with open("/dev/full", "w") as full:
        found = subprocess.run(
            [sys.executable, "-c", code, "recipe", "keys", "--from", "twinkle"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert found.returncode == 1
    assert found.stderr.count("\n") == 1 and "No space left" in found.stderr


@pytest.mark.parametrize("words", [["--help"], ["config", "--help"], ["world", "--help"]])
def test_help_is_exit_code_0(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("usage: mopd")


def test_an_interrupt_is_exit_code_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ensure_world(root: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "mopd.demo", SimpleNamespace(ensure_world=ensure_world))
    assert main(["world"]) == 130
    assert capsys.readouterr().err == ""


def test_programs_get_json(
    recipe: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def ensure_world(root: Path, *, progress: bool) -> SimpleNamespace:
        assert not progress
        return SimpleNamespace(student="s", teachers={"sort": "t"}, data="d", heldout="h")

    monkeypatch.setitem(sys.modules, "mopd.demo", SimpleNamespace(ensure_world=ensure_world))
    assert main(["world", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "student.model": "s",
        "teachers.sort.model": "t",
        "data.path": "d",
        "data.heldout_path": "h",
    }
    assert main(["config", recipe, "--json", "run.seed=9"]) == 0
    found = load.RunConfig.model_validate(json.loads(capsys.readouterr().out))
    assert found == load.load_config("small", ["run.seed=9"])


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"mopd {mopd.__version__}\n"


def test_world_prints_overrides(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def ensure_world(root: Path) -> SimpleNamespace:
        return SimpleNamespace(
            student=root / "student", teachers={"sort": root / "sort"}, data="d", heldout="h"
        )

    monkeypatch.setitem(sys.modules, "mopd.demo", SimpleNamespace(ensure_world=ensure_world))
    assert main(["world", "--dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"student.model={tmp_path / 'student'}",
        f"teachers.sort.model={tmp_path / 'sort'}",
        "data.path=d",
        "data.heldout_path=h",
    ]


def test_a_failure_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ensure_world(root: Path) -> None:
        raise ArtifactError("the world is damaged")

    monkeypatch.setitem(sys.modules, "mopd.demo", SimpleNamespace(ensure_world=ensure_world))
    assert main(["world"]) == 1
    assert capsys.readouterr().err == "mopd: ArtifactError: the world is damaged\n"


def test_the_parser_imports_nothing_heavy() -> None:
    probe = "import sys, mopd.cli.main; print(sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True, timeout=60
    )
    for name in ("torch", "omegaconf", "pydantic", "rich", "numpy"):
        assert f"'{name}'" not in done.stdout
