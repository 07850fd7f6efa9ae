"""What an extra brings is asked for in one line where it is missing, and imported late."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mopd.config import load_config
from mopd.config.data_files import check_data_path
from mopd.device.npu import NpuDevice
from mopd.errors import ConfigError
from mopd.runtime.ray.launch import run_on_ray
from mopd.serving import launch
from mopd.serving.vllm_engine import LocalEngine
from tests.helpers.source import ROOT, Source, shipped

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# what a distribution is imported as, where that is another name
MODULES = {"megatron-core": {"megatron"}, "pyyaml": {"yaml"}, "datasets": {"datasets", "pyarrow"}}
# torch and transformers bring these
BROUGHT = {"jinja2", "markupsafe", "packaging"}
# looked for, and done without
OPTIONAL = {"mindspeed"}


def modules(requirements: list[str]) -> set[str]:
    found: set[str] = set()
    for requirement in requirements:
        name = re.split(r"[\s\[<>=!~;]", requirement)[0].lower()
        found |= MODULES.get(name, {name})
    return found


BASE = modules(PROJECT["dependencies"]) | BROUGHT
EXTRA = {name: modules(needs) for name, needs in PROJECT["optional-dependencies"].items()}
AT_RUN_TIME = set().union(*(EXTRA[name] for name in EXTRA if name not in ("dev", "docs")))


def libraries(source: Source) -> Iterator[str]:
    for name in source.imports():
        top = name.split(".")[0]
        if top not in sys.stdlib_module_names and top not in ("mopd", "launch", "tests"):
            yield top


def test_every_library_is_a_dependency_or_of_an_extra() -> None:
    strange = {
        (source.module, name)
        for source in shipped()
        for name in libraries(source)
        if name not in BASE | AT_RUN_TIME | OPTIONAL
    }
    assert not strange, "add it to pyproject.toml, or import it nowhere"


def test_extras_are_imported_inside_functions() -> None:
    """A module of an extra at the top of a file would make a plain install fail on import."""
    early = {
        (source.module, alias)
        for source in shipped()
        if not source.module.startswith(("mopd.runtime.ray", "launch.ray"))
        for node in source.tree.body
        for alias in _names(node)
        if alias in AT_RUN_TIME - BASE
    }
    assert not early


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        return [node.module.split(".")[0]]
    return []


def data(tmp_path: Path) -> str:
    (tmp_path / "rows.parquet").touch()
    (problem,) = check_data_path("data.path", str(tmp_path / "rows.parquet"))
    return problem


def vllm_server(tmp_path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        launch.find_python("teachers.a.backend", None, {})
    return str(caught.value)


def vllm_here(tmp_path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        LocalEngine(tmp_path, dtype="float32", memory_fraction=0.1, seed=0, eager=True)
    return str(caught.value)


def npu(tmp_path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        NpuDevice()
    return str(caught.value)


@pytest.mark.parametrize(
    ("extra", "ask"), [("data", data), ("vllm", vllm_server), ("vllm", vllm_here), ("npu", npu)]
)
def test_a_missing_extra_is_one_line(
    extra: str, ask: Callable[[Path], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in EXTRA[extra]:
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    monkeypatch.setattr(launch, "PACKAGE", tmp_path / "mopd")  # no .venv-vllm beside it
    problem = ask(tmp_path)
    assert f"mopd[{extra}]" in problem and "pip install" in problem and "\n" not in problem


def test_ray_is_asked_for_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    config = load_config(
        "mopd_ctkd", ["launcher=ray", f"run.dir={tmp_path}", "teachers.a.model=/nowhere"]
    )
    assert run_on_ray(config, world=None) == 2
    error = capsys.readouterr().err.strip()
    assert "mopd[ray]" in error and "\n" not in error
    assert not list(tmp_path.iterdir())
