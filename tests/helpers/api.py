"""The library's signatures; ``python -m tests.helpers.api`` rewrites tests/golden/api.json."""

from __future__ import annotations

import dataclasses
import inspect
import json
from functools import cached_property
from pathlib import Path
from typing import Any, is_typeddict

import mopd.api

PATH = Path(__file__).resolve().parents[1] / "golden" / "api.json"


def signatures() -> dict[str, Any]:
    """Every public name: parameters with kind, default and annotation; fields and properties."""
    return {name: _described(getattr(mopd.api, name)) for name in sorted(mopd.api.__all__)}


def _described(thing: Any) -> Any:
    if is_typeddict(thing):
        return {name: _named(kind) for name, kind in thing.__annotations__.items()}
    if not inspect.isclass(thing):
        return _function(thing)
    if issubclass(thing, Exception):
        return [base.__name__ for base in thing.__mro__[1:-2]]
    found: dict[str, Any] = {}
    if dataclasses.is_dataclass(thing):
        found = {f.name: str(f.type) for f in dataclasses.fields(thing) if f.name[0] != "_"}
    for name, member in vars(thing).items():
        if name.startswith("_"):
            continue
        if isinstance(member, property):
            found[name] = f"property -> {inspect.signature(member.fget).return_annotation}"  # pyright: ignore
        elif isinstance(member, cached_property):
            found[name] = f"property -> {inspect.signature(member.func).return_annotation}"
        elif inspect.isfunction(member):
            found[name] = _function(member)
    return found


def _function(function: Any) -> dict[str, str]:
    signature = inspect.signature(function)
    found = {
        parameter.name: f"{parameter.kind.description}: {parameter.annotation}"
        + ("" if parameter.default is parameter.empty else f" = {parameter.default!r}")
        for parameter in signature.parameters.values()
    }
    return {**found, "return": str(signature.return_annotation)}


def _named(annotation: Any) -> str:
    return getattr(annotation, "__forward_arg__", None) or str(annotation)


if __name__ == "__main__":
    PATH.write_text(json.dumps(signatures(), indent=2) + "\n")
