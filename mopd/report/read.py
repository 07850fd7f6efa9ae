"""The directory of a run, read as far as it is written: finished, under way or killed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mopd.errors import ArtifactError, ConfigError
from mopd.storage.manifest import find_latest

RUNNING_S = 600.0  # a run that wrote nothing for longer is not shown as running
_SECRET = re.compile(
    r"(?i)(?<![a-z])(api[-_]?key|secret|password|passwd|credential|bearer"
    r"|(hf|auth|access|api)[-_]?token(?!i))"  # no tokenizer
)
_NOT_SECRET = re.compile(r"_env$")  # the name of a variable, not what is in it
_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")
HIDDEN = "(hidden)"
SCORES = ("before", "after")  # that every domain of a summary has

Record = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """What the files of a run say.

    ``lines`` are step lines in order, ``samples`` answers in order. ``state`` is the newest
    checkpoint's, {} without one; ``summary`` is {} until the run is finished. ``age_s`` are the
    seconds since its last line. ``problems`` say in words what could not be read.
    """

    directory: Path
    name: str
    config: Mapping[str, Any]
    lines: list[Record] = field(default_factory=list)
    samples: list[Record] = field(default_factory=list)
    summary: Mapping[str, Any] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    age_s: float | None = None
    problems: tuple[str, ...] = ()

    @property
    def num_steps(self) -> int:
        """Steps that are done."""
        return int(self.lines[-1]["step"]) + 1 if self.lines else int(self.state.get("step", 0))

    @property
    def planned_steps(self) -> int:
        return int(section(self.config, "train").get("steps", 0))

    @property
    def status(self) -> str:
        """finished, stopped early, running or unfinished."""
        if self.summary:
            return "finished" if self.summary.get("stopped_early") is None else "stopped early"
        return "running" if self.age_s is not None and self.age_s < RUNNING_S else "unfinished"


def section(config: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """A nested mapping of a configuration, {} where it is not there."""
    found: Any = config
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def read_run(directory: Path, *, now: float) -> RunData:
    """Reads ``directory``; ``now`` is the time in seconds since the epoch.

    Raises:
        ConfigError: no directory of a run.
    """
    path = directory / "config.yaml"
    if not path.is_file():
        raise ConfigError(
            f"{directory}: is no run, it has no config.yaml; name the directory of one, such as "
            "runs/default"
        )
    problems: list[str] = []
    metrics = directory / "metrics.jsonl"
    return RunData(
        directory=directory,
        name=directory.resolve().name,
        config=_config(path),
        lines=_step_lines(metrics, problems),
        samples=_step_lines(directory / "samples.jsonl", problems),
        summary=_summary(directory / "summary.json", problems),
        state=_state(directory, problems),
        versions=_object(directory / "versions.json", problems),
        age_s=now - metrics.stat().st_mtime if metrics.exists() else None,
        problems=tuple(problems),
    )


def without_secrets(value: Any, key: str = "") -> Any:
    """A configuration without passwords: values of keys that hold one, words after such an option,
    users in URLs."""
    if isinstance(value, Mapping):
        return {name: without_secrets(inner, str(name)) for name, inner in value.items()}
    if isinstance(value, list):
        return list(_words(value))
    if isinstance(value, str) and _SECRET.search(key) and not _NOT_SECRET.search(key):
        return HIDDEN
    return _IN_URL.sub(f"{HIDDEN}@", value) if isinstance(value, str) else value


def _words(values: list[Any]) -> Iterator[Any]:
    """``--api-key X`` and ``--api-key=X`` of a server's arguments."""
    hide = False
    for value in values:
        is_option = isinstance(value, str) and bool(_SECRET.search(value.partition("=")[0]))
        if hide:
            yield HIDDEN
        elif is_option and "=" in value:
            yield f"{value.partition('=')[0]}={HIDDEN}"
        else:
            yield without_secrets(value)
        hide = is_option and "=" not in value and value.startswith("-")


def _config(path: Path) -> Mapping[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not readable as YAML; write it again by `mopd config`") from (
            error
        )
    if not _is_config(found):
        raise ConfigError(f"{path}: is no recipe of a run; write it again by `mopd config`")
    return without_secrets(found)


def _is_config(found: Any) -> bool:
    """As far as a page needs it: runs of earlier versions have other keys."""
    if not isinstance(found, dict) or not _all_mappings(found.get("teachers", {})):
        return False
    numbers = (("train", "steps"), ("rollout", "max_staleness"))
    return all(isinstance(section(found, one).get(key, 0), int) for one, key in numbers)


def _all_mappings(found: Any) -> bool:
    return isinstance(found, Mapping) and all(isinstance(v, Mapping) for v in found.values())


def _summary(path: Path, problems: list[str]) -> Mapping[str, Any]:
    """{} where its parts are not what a run writes."""
    found = _object(path, problems)
    domains, evaluations = found.get("domains", {}), found.get("evaluations") or []
    whole = (
        _all_mappings(domains)
        and all(type(one.get(k)) in (int, float) for one in domains.values() for k in SCORES)
        and _all_mappings(found.get("chunks", {}))
        and isinstance(evaluations, list)
        and all(isinstance(one, dict) and "step" in one for one in evaluations)
    )
    if not whole:
        problems.append(f"{path.name}: not what a run writes, left out")
    return found if whole else {}


def _bytes(path: Path, problems: list[str]) -> bytes | None:
    """None where it is not there, or cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        problems.append(f"{path.name}: cannot be read ({error.strerror}), left out")
        return None


def _step_lines(path: Path, problems: list[str]) -> list[Record]:
    """Whole lines with a step; a torn last line of a run that writes or was killed is left out."""
    *whole, _ = (_bytes(path, problems) or b"").split(b"\n")
    found: list[Record] = []
    bad = 0
    for text in whole:
        try:
            record = json.loads(text)
            found += [record] if isinstance(record["step"], int) else []
        except (ValueError, KeyError, TypeError, RecursionError):
            bad += 1
    if bad:
        problems.append(f"{path.name}: {bad} lines are not readable and are left out")
    return found


def _object(path: Path, problems: list[str]) -> Mapping[str, Any]:
    if (text := _bytes(path, problems)) is None:
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        problems.append(f"{path.name}: not readable, left out")
        return {}
    return found


def _state(directory: Path, problems: list[str]) -> Mapping[str, Any]:
    try:
        latest = find_latest(directory / "checkpoints")
    except ArtifactError as error:
        problems.append(str(error))
        return {}
    if latest is None:
        return {}
    return section(_object(latest / "state.json", problems), "state")
