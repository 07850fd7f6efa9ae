"""The hooks run offline with the project's own tools, and see what `make lint` sees."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.helpers.source import ROOT

CONFIG = ROOT / ".pre-commit-config.yaml"
BIN = Path(sys.executable).parent


def test_every_hook_is_local_and_of_the_environment() -> None:
    config = OmegaConf.to_container(OmegaConf.load(CONFIG))
    assert isinstance(config, dict)
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    hooks = {hook["id"]: hook for repo in config["repos"] for hook in repo["hooks"]}
    assert set(hooks) == {"ruff", "ruff-format", "basedpyright"}
    for hook in hooks.values():
        program = hook["entry"].split()[0]
        assert hook["language"] == "system" and program.startswith(".venv/bin/")
        assert (BIN / Path(program).name).is_file()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A git repository with the hooks, the tools and one module."""
    home = tmp_path / "repository"
    (home / "mopd").mkdir(parents=True)
    (home / ".venv").mkdir()
    (home / ".venv" / "bin").symlink_to(BIN)
    for name in (".pre-commit-config.yaml", "pyproject.toml"):
        shutil.copy(ROOT / name, home / name)
    subprocess.run(["git", "init", "-q", str(home)], check=True)
    return home


@pytest.mark.parametrize(
    ("text", "failing"),
    [
        ('"""Nothing."""\n', None),
        ('"""Nothing."""\n\nimport os\n', "F401"),
        ('"""Nothing."""\n\nx = [1,2]\n', "1 file would be reformatted"),
    ],
)
def test_the_hooks_find_what_lint_finds(repository: Path, text: str, failing: str | None) -> None:
    (repository / "mopd" / "module.py").write_text(text)
    subprocess.run(["git", "add", "mopd", ".pre-commit-config.yaml"], cwd=repository, check=True)
    done = subprocess.run(
        [sys.executable, "-m", "pre_commit", "run", "--all-files"],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=120,
        # types of the whole package take too long for a test, and `make types` looks at them
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith("GIT_")},
            "SKIP": "basedpyright",
            "PRE_COMMIT_HOME": str(repository.parent / "cache"),
            "http_proxy": "http://127.0.0.1:9",
            "https_proxy": "http://127.0.0.1:9",
        },
    )
    assert (done.returncode != 0) == (failing is not None), done.stdout + done.stderr
    assert failing is None or failing in done.stdout
