"""What the policy tests need to know about a source file: its imports, calls and functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One file. `module` is its dotted name; files of launch/ are called `launch.<name>`."""

    module: str
    text: str
    is_package: bool = False

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def package(self) -> str:
        """What the file belongs to: `mopd.losses` for mopd/losses/ctkd.py, `mopd.types`."""
        return ".".join(self.module.split(".")[:2])

    def imports(self) -> Iterator[str]:
        """Every imported name, dotted: `from a import b` gives `a.b`; dynamic ones included."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from (f"{self._origin(node)}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.Call) and _called_name(node) in (
                "import_module",
                "__import__",
            ):
                for argument in node.args[:1]:
                    yield from _leading_text(argument)

    def _origin(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = self.module.split(".")
        parts = parts[: len(parts) - node.level + self.is_package]
        return ".".join([*parts, node.module] if node.module else parts)

    def dotted_names(self) -> Iterator[str]:
        """Every name or attribute chain in use, with its first part replaced by its import."""
        origins = self._origins()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Attribute | ast.Name) and (chain := _chain(node)):
                head, *rest = chain
                yield ".".join([origins.get(head, head), *rest])

    def _origins(self) -> dict[str, str]:
        origins: dict[str, str] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                origins |= {alias.asname: alias.name for alias in node.names if alias.asname}
            elif isinstance(node, ast.ImportFrom):
                origin = self._origin(node)
                origins |= {a.asname or a.name: f"{origin}.{a.name}" for a in node.names}
        return origins

    def functions(self) -> Iterator[tuple[str, Function]]:
        """Functions and methods with their qualified names, nested ones included."""
        yield from _functions(self.tree, self.module)


def shipped() -> list[Source]:
    """Every Python file under mopd/ and launch/."""
    paths = sorted([*(ROOT / "mopd").rglob("*.py"), *(ROOT / "launch").rglob("*.py")])
    return [read_source(path) for path in paths]


def read_source(path: Path) -> Source:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    is_package = parts[-1] == "__init__"
    module = ".".join(parts[:-1] if is_package else parts)
    return Source(module, path.read_text(encoding="utf-8"), is_package)


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}.{child.name}", child
        name = getattr(child, "name", None)
        is_scope = isinstance(child, Function | ast.ClassDef)
        yield from _functions(child, f"{prefix}.{name}" if is_scope else prefix)


def _chain(node: ast.expr) -> list[str]:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id, *reversed(parts)] if isinstance(node, ast.Name) else []


def _called_name(node: ast.Call) -> str:
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _leading_text(node: ast.expr) -> Iterator[str]:
    """The module a dynamic import names, as far as it is written out (`f"mopd.cli.{verb}"`)."""
    if isinstance(node, ast.JoinedStr):
        node = node.values[0]
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value.rstrip(".")
