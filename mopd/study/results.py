"""What a finished run comes to: one line of raw results, and the file of all of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from mopd.errors import ArtifactError
from mopd.metrics.text import json_line, replace_file

Status = Literal["done", "failed", "stopped"]
LAST_STEPS = 0.1  # the share of a run that "at the end" means, in what was sampled


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One arm with one seed.

    ``domains``: per domain accuracy before and after, the teacher's, headroom, canonical shares.
    ``masked``: mean share of response tokens that no teacher judged. ``sampled_canonical``: of the
    answers sampled in the last tenth of the steps. ``stopped``: the limit ended it.
    ``settings``: the keys that differ from the defaults in defaults.json. ``cpu_seconds`` is None
    where an earlier start of the run is not in it.
    """

    arm: str
    seed: int
    status: Status
    overrides: list[str]
    settings: dict[str, Any]
    domains: dict[str, dict[str, float | None]] = field(default_factory=dict)
    masked: float | None = None
    sampled_canonical: dict[str, float] = field(default_factory=dict)
    first_loss: float | None = None
    steps: int = 0
    seconds: float | None = None
    cpu_seconds: float | None = None
    error: str | None = None
    code: str = ""

    def mean(self, name: str) -> float | None:
        """Over the domains, of ``after``, ``headroom_recovered`` or ``canonical_after``."""
        values = [found[name] for found in self.domains.values()]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None


def read_run(directory: Path) -> dict[str, Any]:
    """The measured part of a `Result`, from summary.json and metrics.jsonl of a run."""
    found: dict[str, Any] = {}
    metrics = directory / "metrics.jsonl"
    whole, _ = _whole_lines(metrics) if metrics.exists() else ([], "")
    lines = [json.loads(line) for line in whole]
    steps = [line for line in lines if "loss" in line]
    if steps:
        masked = [line["masked"] for line in steps if line.get("masked") is not None]
        found = {
            "steps": steps[-1]["step"] + 1,
            "first_loss": steps[0]["loss"],
            "masked": sum(masked) / len(masked) if masked else None,
            "sampled_canonical": _at_the_end(steps, "canonical/"),
        }
    summary = directory / "summary.json"
    if summary.exists():
        values = json.loads(summary.read_text(encoding="utf-8"))
        found |= {k: values[k] for k in ("steps", "seconds", "domains")}
    return found


def _whole_lines(path: Path) -> tuple[list[str], str]:
    """The lines, and what a process that was killed left behind them."""
    *whole, torn = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return whole, torn


def _result(line: str, *, origin: str) -> Result:
    try:
        return Result(**json.loads(line))
    except (ValueError, TypeError):
        raise ArtifactError(
            f"{origin}: is no result of a study; delete that line, and its run is made again"
        ) from None


def _at_the_end(steps: list[dict[str, Any]], prefix: str) -> dict[str, float]:
    last = steps[-max(1, round(LAST_STEPS * len(steps))) :]
    names = sorted({name for line in last for name in line if name.startswith(prefix)})
    means = {}
    for name in names:
        values = [line[name] for line in last if line.get(name) is not None]
        means[name.removeprefix(prefix)] = sum(values) / len(values)
    return means


class Raw:
    """raw.jsonl: one line a run; of several with one arm and seed the last one counts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results: dict[tuple[str, int], Result] = {}
        whole, torn = _whole_lines(path) if path.exists() else ([], "")
        for number, line in enumerate(whole, start=1):
            result = _result(line, origin=f"{path}, line {number}")
            self.results[result.arm, result.seed] = result
        if torn:
            replace_file(path, "".join(f"{line}\n" for line in whole))

    def find(self, arm: str, seed: int) -> Result | None:
        return self.results.get((arm, seed))

    def add(self, result: Result) -> None:
        """On disk before this returns."""
        self.results[result.arm, result.seed] = result
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json_line(asdict(result)) + "\n")

    def tidy(self, arms: Iterable[str]) -> None:
        """Writes the file anew: in the order of ``arms``, one line a run, no other arms."""
        order = {name: place for place, name in enumerate(arms)}
        kept = [one for one in self.results.values() if one.arm in order]
        kept.sort(key=lambda one: (order[one.arm], one.seed))
        self.results = {(one.arm, one.seed): one for one in kept}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.path, "".join(json_line(asdict(one)) + "\n" for one in kept))
