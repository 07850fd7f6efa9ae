"""A built mopd in an environment that holds nothing of the checkout."""

from __future__ import annotations

import re
import shutil
import site
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import mopd
from mopd.config.recipe_files import RECIPES, recipes_of
from mopd.demo import World
from tests.helpers.source import ROOT

SOURCES = ("pyproject.toml", "README.md", "LICENSE", "mopd", "recipes")
RUN_S = 120.0


@dataclass(frozen=True)
class Installed:
    """A virtual environment with the wheel in it; commands run in a folder without sources."""

    bin: Path
    home: Path

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        program, *rest = words
        return subprocess.run(
            [str(self.bin / program), *rest],
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=RUN_S,
            env={"PATH": "/usr/bin:/bin", "HOME": str(self.home), "OMP_NUM_THREADS": "1"},
        )

    def output(self, *words: str) -> str:
        done = self.run(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout


def checked(words: Sequence[str], *, cwd: Path) -> None:
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=RUN_S)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Source distribution and wheel, the wheel made of the source distribution alone."""
    home = tmp_path_factory.mktemp("build")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, home / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, home / name)
    checked([sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", "."], cwd=home)
    found = {path.suffix: path for path in (home / "dist").iterdir()}
    assert set(found) == {".whl", ".gz"}
    return found


@pytest.fixture(scope="module")
def installed(built: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Dependencies are those of this environment, whose own mopd is not on the path."""
    place = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(place, with_pip=False)
    python = place / "bin" / "python"
    words = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    checked([*words, "install", "--no-deps", "--no-index", str(built[".whl"])], cwd=place)
    (own,) = place.glob("lib/python*/site-packages")
    # a folder named in a .pth file joins the path behind `own`, and its own .pth files are not read
    packages = [path for path in site.getsitepackages() if Path(path).is_dir()]
    (own / "dependencies.pth").write_text("\n".join(packages) + "\n")
    home = place.parent / "home"
    home.mkdir()
    return Installed(bin=place / "bin", home=home)


def test_every_package_is_named() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "mopd").rglob("*.py")
        if "recipes" not in path.parts
    }
    assert set(listed) == found | {"mopd.recipes"} and len(listed) == len(set(listed))


def test_the_wheel_holds_what_is_needed_at_run_time(built: dict[str, Path]) -> None:
    with zipfile.ZipFile(built[".whl"]) as wheel:
        names = set(wheel.namelist())
    wanted = {"mopd/py.typed", f"mopd-{mopd.__version__}.dist-info/licenses/LICENSE"}
    wanted |= {str(path.relative_to(ROOT)) for path in (ROOT / "mopd").rglob("*.py")}
    wanted |= {
        str("mopd" / path.relative_to(ROOT))
        for path in RECIPES.rglob("*")
        if path.suffix in (".yaml", ".json")
    }
    assert not wanted - names
    extra = {name for name in names if not name.startswith(("mopd/", "mopd-"))}
    assert not extra, "a wheel puts nothing beside the package"


def test_the_source_distribution_holds_the_licence_and_the_readme(built: dict[str, Path]) -> None:
    with tarfile.open(built[".gz"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "recipes/mopd_ctkd.yaml"} <= names


def test_commands_of_an_installed_mopd(installed: Installed) -> None:
    assert installed.output("mopd", "--version").split() == ["mopd", mopd.__version__]
    assert "projection" in installed.output("mopd", "--help")
    shown = installed.output("mopd", "config", "recipe=mopd_ctkd", "train.steps=7")
    assert re.search(r"^  steps: 7$", shown, re.MULTILINE) and "loss: ctkd" in shown
    failed = installed.run("mopd", "config", "recipe=mopd_ctdk")
    assert failed.returncode == 2 and "gpu/single_gpu" in failed.stderr
    plan = installed.run("mopd", "plan", "recipe=gpu/qwen3_llama_8gpu_dedicated")
    assert plan.returncode == 0, plan.stderr


def test_the_installed_package_is_the_one_that_runs(installed: Installed) -> None:
    where = installed.output("python", "-c", "import mopd; print(mopd.__file__)")
    assert Path(where.strip()).is_relative_to(installed.bin.parent)


def test_the_readmes_library_lines(installed: Installed, tiny_world: World) -> None:
    """In a folder where the README's models lie, as a notebook would have them."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition("## In a notebook")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    for name, path in {"student": tiny_world.student, **tiny_world.teachers}.items():
        (installed.home / name).symlink_to(path)
    code = f"{block}\nprint(float(loss.loss.detach()), logits.grad.norm())"
    shown = installed.output("python", "-c", code)
    assert shown.startswith("9 student tokens") or "student |" in shown
    assert float(shown.split()[-2].rstrip(",")) > 0


def test_a_checkouts_recipes_and_a_packages(tmp_path: Path) -> None:
    package = tmp_path / "site-packages" / "mopd"
    (tmp_path / "site-packages" / "recipes").mkdir(parents=True)  # of another project
    (package / "recipes").mkdir(parents=True)
    assert recipes_of(package) == package / "recipes"
    assert RECIPES == ROOT / "recipes"
