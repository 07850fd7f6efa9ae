"""The tree of keys that the schema defines, and the complaint about a key that is not in it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mopd.config.schema import RunConfig
from mopd.errors import ConfigError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # of a teacher or a pool


def printable(text: str) -> str:
    """Return `text` on one line, with control characters escaped: it may come from any file."""
    squeezed = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in squeezed)


def check_keys(values: Mapping[Any, Any], *, origin: str) -> None:
    """Raise ConfigError at the first key that no section has, and at a value of `???`."""
    _check_section(values, RunConfig, prefix="", origin=origin)


def _check_section(
    values: Mapping[Any, Any], section: type[BaseModel], *, prefix: str, origin: str
) -> None:
    for key, value in values.items():
        path = f"{prefix}{key}"
        if not isinstance(key, str) or key not in section.model_fields:
            raise ConfigError(_unknown_key(str(key), section, prefix=prefix, origin=origin))
        if value == "???":
            # OmegaConf lets the layer below show through, so "must be given" would mean nothing.
            raise ConfigError(f"{printable(path)}: is `???`; give it a value, or null ({origin})")
        annotation = section.model_fields[key].annotation
        nested, named = _subsection(annotation)
        if nested is None and isinstance(value, Mapping) and get_origin(annotation) is not dict:
            shown = printable(repr(dict(value)))
            raise ConfigError(f"{printable(path)}: expected a value, got keys {shown} ({origin})")
        if nested is None or value is None:
            continue
        children = _mapping(value, path, origin)
        if not named:
            _check_section(children, nested, prefix=f"{path}.", origin=origin)
            continue
        for name, child in children.items():
            if child is not None:
                child_path = f"{path}.{name}"
                table = _mapping(child, child_path, origin)
                _check_section(table, nested, prefix=f"{child_path}.", origin=origin)


def _subsection(annotation: object) -> tuple[type[BaseModel] | None, bool]:
    """The section a key opens, if any, and whether user-chosen names stand between the two."""
    named = get_origin(annotation) is dict
    candidate = get_args(annotation)[1] if named else annotation
    if isinstance(candidate, type) and issubclass(candidate, BaseModel):
        return candidate, named
    return None, False


def _mapping(value: object, path: str, origin: str) -> Mapping[Any, Any]:
    if isinstance(value, Mapping):
        return value
    shown = printable(repr(value))
    raise ConfigError(f"{printable(path)}: expected a section of keys, got {shown} ({origin})")


def _unknown_key(key: str, section: type[BaseModel], *, prefix: str, origin: str) -> str:
    known = list(section.model_fields)
    close = difflib.get_close_matches(key, known, n=1)
    if close:
        hint = f"did you mean `{printable(prefix)}{close[0]}`?"
    else:
        elsewhere = [path for path, _ in key_paths() if path.rpartition(".")[2] == key]
        places = " or ".join(f"`{path}`" for path in elsewhere)
        hint = f"did you mean {places}?" if elsewhere else f"known keys: {', '.join(known)}"
    return f"unknown key `{printable(prefix + key)}` ({origin}): {hint}"


def key_paths(
    section: type[BaseModel] = RunConfig, prefix: str = ""
) -> Iterator[tuple[str, FieldInfo]]:
    """Every key of a recipe that takes a value; ``<name>`` stands for a name that users choose."""
    for key, field in section.model_fields.items():
        nested, named = _subsection(field.annotation)
        if nested is None:
            yield prefix + key, field
        else:
            yield from key_paths(nested, f"{prefix}{key}.<name>." if named else f"{prefix}{key}.")
