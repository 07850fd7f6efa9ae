"""Directories of runs as a training leaves them, without a training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mopd.config.schema import RunConfig

EVIL = '</script><img src=x onerror="window.hacked=1">'


def config(name: str, teachers: Sequence[str] = ("a",), **sections: Any) -> dict[str, Any]:
    found = RunConfig.model_validate(
        {"run": {"name": name}, "train": {"steps": 50}, **sections}
    ).model_dump(mode="json")
    plain = RunConfig.model_validate({"teachers": {"t": {"model": "nowhere"}}})
    settings = plain.model_dump(mode="json")["teachers"]["t"]
    found["teachers"] = {teacher: {**settings, "domains": [teacher]} for teacher in teachers}
    return found


def step_line(step: int, teachers: Sequence[str] = ("a",), **more: float) -> dict[str, Any]:
    line: dict[str, Any] = {
        "step": step,
        "loss": 2.0 / (1 + step),
        "grad_norm": 1.0 + step % 3,
        "tokens_per_second": 1000.0 + step,
        "time/step": 1.0,
        "time/gather": 0.5,
        "time/rollout": 0.25,
        "time/teachers": 0.125,
        "time/align": 0.125,
        "time/train": 0.25,
        "skipped": 0.0,
        **{f"loss/{name}": 1.0 / (1 + step) for name in teachers},
        **{f"scored/{name}": 1.0 for name in teachers},
    }
    return line | more


def sample(step: int, *, domain: str = "a", teacher: str = "a", text: str = "1") -> dict[str, Any]:
    """Two student tokens against three of the teacher's: a 1-n chunk, then one without a number."""
    return {
        **{"step": step, "id": f"{domain}-{step}", "sample": 0, "domain": domain},
        **{"source": "student", "policy_version": step, "finish": "stop", "correct": step > 0},
        **{"trained": True, "prompt": [{"role": "user", "content": text}], "answer": text},
        **{"tokens": [text, {"hex": "e4"}], "logprobs": [-0.5, None], "omitted": 0},
        "teachers": {
            teacher: {
                "tokens": [text, {"special": "<end>"}, "x"],
                "logprobs": [-1.0, -2.0, None],
                "chunks": [
                    {"student": [0, 1], "teacher": [0, 2], "kind": "1-n", "divergence": 2.5},
                    {"student": [1, 2], "teacher": [2, 3], "kind": "1-1", "divergence": None},
                ],
            }
        },
    }


def write_run(
    directory: Path,
    *,
    lines: Sequence[Mapping[str, Any]] = (),
    samples: Sequence[Mapping[str, Any]] = (),
    settings: Mapping[str, Any] | None = None,
    summary: Mapping[str, Any] | None = None,
    torn: str = "",
) -> Path:
    """``torn`` follows the last whole line of both files of lines."""
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(dict(settings or config("r"))))
    for name, records in (("metrics", lines), ("samples", samples)):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (directory / f"{name}.jsonl").write_text(text + torn)
    if summary is not None:
        (directory / "summary.json").write_text(json.dumps(summary))
    return directory


def finished(before: float = 0.2, after: float = 0.7, **more: Any) -> dict[str, Any]:
    """A summary with one domain, whose teacher is always right."""
    domain = {"before": before, "after": after, "teacher": 1.0}
    return {"steps": 50, "seconds": 12.5, "learned": True, "domains": {"a": domain}, **more}
