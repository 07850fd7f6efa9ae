"""Values as they may appear in files and on terminals."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def printable(text: str) -> str:
    """Return `text` with line breaks and control characters escaped (names come from files)."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def json_safe(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` as strict JSON takes them, nested mappings included.

    A float that JSON cannot hold becomes null, and its name goes under `<key>/raw`.
    """
    safe: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            safe[key] = json_safe(value)
        elif isinstance(value, float) and not math.isfinite(value):
            safe[key] = None
            safe[f"{key}/raw"] = repr(float(value))
        else:
            safe[key] = value
    return safe


def json_line(values: Mapping[str, Any]) -> str:
    """One line of strict JSON."""
    return json.dumps(json_safe(values), allow_nan=False)


def replace_file(path: Path, content: str) -> None:
    """Write `content` so that `path` holds either the old or the new text, whenever killed."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
