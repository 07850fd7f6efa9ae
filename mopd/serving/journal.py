"""Rollouts on disk, one JSON line each: what a run sampled can be replayed and resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mopd.errors import ArtifactError
from mopd.types import Rollout


class Journal:
    """Appends the rollouts of a step and makes them durable before the optimizer runs."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = path.open("a", encoding="ascii")

    def append(self, step: int, rollouts: Sequence[Rollout]) -> None:
        """One line a rollout, one fsync a step."""
        for rollout in rollouts:
            record = {
                "step": step,
                "prompt": rollout.prompt.id,
                "sample": rollout.sample_index,
                "version": rollout.policy_version,
                "finish": rollout.finish_reason,
                "ids": rollout.token_ids.tolist(),
                "logprobs": [float(np.float64(x)) for x in rollout.logprobs],
            }
            self._file.write(json.dumps(record, separators=(",", ":")) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def truncate_from(self, step: int) -> None:
        """Drops the lines of ``step`` and later, and a line that a crash cut short."""
        self._file.close()
        kept = [line for line, record in _lines(self._path) if record["step"] < step]
        temporary = self._path.with_suffix(".tmp")
        with temporary.open("w", encoding="ascii") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._path)
        self._file = self._path.open("a", encoding="ascii")

    def close(self) -> None:
        self._file.close()


def journal_path(run: Path, replica: int) -> Path:
    """Where the lead of a replica writes."""
    return run / "journal" / f"rollouts-{replica}.jsonl"


def drop_stale_journals(run: Path, *, num_replicas: int) -> None:
    """Removes what a start with more replicas left behind; it would be replayed otherwise."""
    current = {journal_path(run, replica) for replica in range(num_replicas)}
    for path in (run / "journal").glob("*.jsonl"):
        if path not in current:
            path.unlink()


def read_journal(path: Path) -> dict[tuple[int, str, int], dict[str, Any]]:
    """(step, prompt id, sample index) -> record, over every journal file of a run.

    Raises:
        ArtifactError: there is no journal at ``path`` (a run directory, its journal, or one file).
    """
    for folder in (path / "journal", path):
        files = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
        if files:
            break
    else:
        files = [path] if path.is_file() else []
    if not files:
        raise ArtifactError(f"{path}: no journal there; name the directory of a run")
    return {
        (record["step"], record["prompt"], record["sample"]): record
        for file in files
        for _, record in _lines(file)
    }


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="ascii") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return  # a crash cut the last line short
            try:
                yield line, json.loads(line)
            except json.JSONDecodeError as error:
                raise ArtifactError(
                    f"{path}:{number}: damaged; restore the file or start the run afresh"
                ) from error
