"""Published wheels as text: fetched once with pip, read from the archive, never installed."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from functools import cached_property
from pathlib import Path

from tests.helpers.missing import missing
from tests.helpers.source import ROOT

CACHE = ROOT / ".cache" / "wheels"
LINUX = ("--platform", "manylinux_2_28_x86_64", "--python-version", "3.11")
FETCH_S = 300.0


def fetch(requirement: str, *, pattern: str, options: tuple[str, ...] = ()) -> Path:
    """The wheel of ``requirement`` in the cache; skips (or fails in CI) where none can be had.

    Args:
        pattern: of its file's name, for one that was fetched before.
    """
    if found := sorted(CACHE.glob(pattern)):
        return found[-1]
    CACHE.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    words += ["--only-binary", ":all:", "--dest", str(CACHE), *options, requirement]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=FETCH_S)
    except subprocess.TimeoutExpired:
        missing(f"no wheel of {requirement}: pip took longer than {FETCH_S:.0f} s")
    if done.returncode:
        last = next(reversed(done.stderr.strip().splitlines()), "pip failed")
        missing(f"no wheel of {requirement} can be fetched here: {last}")
    return sorted(CACHE.glob(pattern))[-1]


class Wheel:
    """The Python files of a wheel, and which names they define."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._names: dict[str, frozenset[str]] = {}

    @cached_property
    def _files(self) -> frozenset[str]:
        with zipfile.ZipFile(self._path) as archive:
            return frozenset(name for name in archive.namelist() if name.endswith(".py"))

    def _text(self, file: str) -> str:
        with zipfile.ZipFile(self._path) as archive:
            return archive.read(file).decode("utf-8")

    def has(self, dotted: str) -> bool:
        """Whether ``dotted`` is a module of the wheel, or a name at the top of one."""
        if self._file(dotted) is not None:
            return True
        module, _, name = dotted.rpartition(".")
        return bool(module) and name in self._top(module)

    def _file(self, module: str) -> str | None:
        base = module.replace(".", "/")
        for name in (f"{base}/__init__.py", f"{base}.py"):
            if name in self._files:
                return name
        return None

    def _top(self, module: str) -> frozenset[str]:
        if module not in self._names:
            self._names[module] = frozenset()  # for modules that import each other
            self._names[module] = frozenset(self._defined(module))
        return self._names[module]

    def _defined(self, module: str) -> set[str]:
        file = self._file(module)
        if file is None:
            return set()
        package = module if file.endswith("__init__.py") else module.rpartition(".")[0]
        found: set[str] = set()
        for node in ast.parse(self._text(file)).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
            elif isinstance(node, ast.ImportFrom):
                parents = package.split(".")[: len(package.split(".")) + 1 - node.level]
                origin = ".".join([*parents, node.module or ""]) if node.level else node.module
                for alias in node.names:
                    if alias.name == "*":
                        found |= self._top((origin or "").rstrip("."))
                    else:
                        found.add(alias.asname or alias.name)
        return found
