"""What a run was given, short: the keys that differ from defaults which are kept beside it.

A key that is new since then has its default in an old run, and a default that changed does not
make an old run a run of the new one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mopd.config.schema import RunConfig
from mopd.metrics.text import replace_file
from mopd.study.spec import flat

# What changes nothing that is computed, but for rounding, and where things lie.
_FREE = (
    *("run.name", "run.dir", "run.threads", "run.overwrite", "run.stall_s", "cache_dir"),
    *("logging.", "checkpoint.", "journal.", "debug."),
)


def defaults() -> dict[str, Any]:
    """Every key of the schema that matters, with its default."""
    return _kept(flat(RunConfig().model_dump(mode="json")))


class Defaults:
    """The defaults at the time of the first run, in a file beside the raw results."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._then: dict[str, Any] = {}
        if path.exists():
            self._then = json.loads(path.read_text(encoding="utf-8"))
        self._now = defaults()

    def settings(self, config: RunConfig) -> dict[str, Any]:
        """The keys of ``config`` that differ from the defaults kept."""
        base = {**self._now, **self._then}
        values = _kept(flat(config.model_dump(mode="json")))
        return {k: _relative(v) for k, v in values.items() if base.get(k, _MISSING) != v}

    def save(self) -> None:
        """Writes the defaults, those of new keys too; known ones stay as they were."""
        self._then = {**self._now, **self._then}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self._path, json.dumps(self._then, indent=1, sort_keys=True) + "\n")


def same(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two runs were given the same."""
    return json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)


_MISSING = object()


def _kept(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if not k.startswith(_FREE)}


def _relative(value: Any) -> Any:
    """A path inside the embedded world or another run counts from there, on any machine."""
    for place in ("/world/", "/study-"):
        if isinstance(value, str) and place in value:
            return value[value.rindex(place) + 1 :]
    return value
