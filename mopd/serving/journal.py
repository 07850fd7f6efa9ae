"""Rollouts on disk, one JSON line each: what a run sampled can be replayed and resumed."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mopd.errors import ArtifactError
from mopd.types import Rollout

Record = dict[str, Any]


class Journal:
    """Appends the rollouts of a step and makes them durable before anybody trains on them."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = path.open("a", encoding="ascii")
        self._recorded: dict[int, list[Record]] = {}

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        return self._file.tell()

    def append(self, step: int, rollouts: Sequence[Rollout]) -> None:
        """One line a rollout, one fsync a step."""
        for rollout in rollouts:
            record = _record(step, rollout)
            self._file.write(json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def resume_from(self, step: int, *, size: int) -> None:
        """Keeps what was written before ``step``, and every whole later step for `recorded`.

        A crash may have cut the last step short: it has less than ``size`` lines, and goes.
        """
        self._file.close()
        kept: list[str] = []
        later: dict[int, list[tuple[str, Record]]] = {}
        for line, record in _lines(self._path):
            if record["step"] < step:
                kept.append(line)
            else:
                later.setdefault(record["step"], []).append((line, record))
        whole = {number: found for number, found in later.items() if len(found) == size}
        kept += [line for found in whole.values() for line, _ in found]
        self._recorded = {n: [record for _, record in found] for n, found in whole.items()}
        temporary = self._path.with_suffix(".tmp")
        with temporary.open("w", encoding="ascii") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._path)
        self._file = self._path.open("a", encoding="ascii")

    def recorded(self, step: int) -> list[Record] | None:
        """What `resume_from` found of ``step``, once: it stays on disk as it is."""
        return self._recorded.pop(step, None)

    def close(self) -> None:
        self._file.close()


def _record(step: int, rollout: Rollout) -> Record:
    return {
        "step": step,
        "prompt": rollout.prompt.id,
        "sample": rollout.sample_index,
        "version": rollout.policy_version,
        "finish": rollout.finish_reason,
        "source": rollout.source,
        "ids": rollout.token_ids.tolist(),
        # NaN, of an answer that was not sampled, is no JSON
        "logprobs": [None if math.isnan(x) else x for x in rollout.logprobs.tolist()],
    }


def journal_path(run: Path, replica: int) -> Path:
    """Where the lead of a replica writes."""
    return run / "journal" / f"rollouts-{replica}.jsonl"


def drop_stale_journals(run: Path, *, num_replicas: int) -> None:
    """Removes what a start with more replicas left behind; it would be replayed otherwise."""
    for path in list((run / "journal").glob("*")):
        kind, _, replica = path.name.partition(".")[0].partition("-")
        if kind in ("rollouts", "replies") and int(replica) >= num_replicas:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def read_journal(path: Path) -> dict[tuple[int, str, int], Record]:
    """(step, prompt id, sample index) -> record, over every journal file of a run.

    Raises:
        ArtifactError: there is no journal at ``path`` (a run directory, its journal, or one file).
    """
    for folder in (path / "journal", path):
        files = sorted(folder.glob("rollouts-*.jsonl")) if folder.is_dir() else []
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


def _lines(path: Path) -> Iterator[tuple[str, Record]]:
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
