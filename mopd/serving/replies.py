"""Teachers' replies on disk, one file a step, so that a killed run goes on with the same ones.

``replies-<replica>/<step>.safetensors`` holds the arrays of all `TeacherScores` of a step;
``replies-<replica>.jsonl`` a line a step: which answers they are about, the file's SHA-256, and per
teacher what a new score of the same answers is compared with. Steps before the oldest checkpoint
are removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from mopd.errors import ArtifactError
from mopd.types import Rollout, TeacherScores

Level = Literal["full", "digest", "off"]
Scores = Sequence[Mapping[str, TeacherScores]]

_ROWS = ("token_ids", "byte_ends", "logprobs", "log_tail", "valid")
_TOP_K = ("topk_ids", "topk_logprobs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How a new score of a step differs from what was noted: other tokens, nats per answer."""

    other_tokens: int
    nats: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Replies:
    """What teachers said of a step's answers, in their order, and what they left out."""

    scores: list[dict[str, TeacherScores]]
    missing: dict[str, int]


class ReplyJournal:
    """``full`` keeps replies up to ``max_bytes`` and digests beyond, ``digest`` only those.

    One thread appends while another prunes.
    """

    def __init__(self, folder: Path, replica: int, *, level: Level, max_bytes: float) -> None:
        self._folder = folder / f"replies-{replica}"
        self._digests = folder / f"replies-{replica}.jsonl"
        self._level = level
        self._max_bytes = max_bytes
        self._notes: dict[int, dict[str, Any]] = {}
        self._sizes: dict[int, int] = {}
        self._lock = threading.Lock()
        if level != "off":
            self._folder.mkdir(parents=True, exist_ok=True)
            self._sizes = {
                int(p.stem): p.stat().st_size for p in self._folder.glob("*.safetensors")
            }
            self._notes = _read_notes(self._digests)

    @property
    def num_bytes(self) -> int:
        """Size of the replies on disk."""
        with self._lock:
            return sum(self._sizes.values())

    def append(self, step: int, rollouts: Sequence[Rollout], replies: Replies) -> None:
        """Durable when this returns."""
        if self._level == "off":
            return
        note: dict[str, Any] = {
            "step": step,
            "answers": _answers(rollouts),
            "teachers": _digest(replies.scores),
            "missing": replies.missing,
        }
        with self._lock:
            if self._level == "full":
                content = _encode(replies.scores)
                if sum(self._sizes.values()) + len(content) <= self._max_bytes:
                    _write(self._file(step), content)
                    self._sizes[step] = len(content)
                    note["sha256"] = hashlib.sha256(content).hexdigest()
            self._notes[step] = note
            with self._digests.open("a", encoding="ascii") as file:
                file.write(_line(note))
                file.flush()
                os.fsync(file.fileno())

    def read(self, step: int, rollouts: Sequence[Rollout]) -> Replies | None:
        """What was said of ``rollouts``; None where it was not kept, or is about other answers.

        Raises:
            ArtifactError: the file is not what was written.
        """
        with self._lock:
            note = self._about(step, rollouts)
            digest = note.get("sha256")
            if digest is None or step not in self._sizes:
                return None
            path = self._file(step)
            content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise ArtifactError(
                f"{path}: damaged; delete it, and the answers of step {step} are scored again"
            )
        scores = _decode(content, len(rollouts), path)
        return Replies(scores=scores, missing=dict(note["missing"]))

    def _about(self, step: int, rollouts: Sequence[Rollout]) -> dict[str, Any]:
        """The note of ``step``; empty where it is about other answers, of another layout."""
        note = self._notes.get(step, {})
        return note if note.get("answers") == _answers(rollouts) else {}

    def compare(self, step: int, rollouts: Sequence[Rollout], scores: Scores) -> Difference | None:
        """New scores against the digest of the old; None where there is none."""
        with self._lock:
            noted = self._about(step, rollouts).get("teachers")
        if noted is None:
            return None
        other, nats = 0, 0.0
        for name, found in _digest(scores).items():
            before = noted.get(name, {"ids": [], "logprobs": []})
            other += sum(a != b for a, b in zip(before["ids"], found["ids"], strict=False))
            for old, new in zip(before["logprobs"], found["logprobs"], strict=False):
                nats = max(nats, abs(old - new))
        return Difference(other_tokens=other, nats=nats)

    def prune(self, oldest: int) -> None:
        """Forgets the steps before ``oldest``: no checkpoint needs them."""
        if self._level == "off":
            return
        with self._lock:
            for step in [step for step in self._sizes if step < oldest]:
                self._file(step).unlink(missing_ok=True)
                del self._sizes[step]
            self._notes = {step: note for step, note in self._notes.items() if step >= oldest}
            _write(self._digests, "".join(map(_line, self._notes.values())).encode("ascii"))

    def _file(self, step: int) -> Path:
        return self._folder / f"{step:08d}.safetensors"


def _line(note: dict[str, Any]) -> str:
    return json.dumps(note, separators=(",", ":")) + "\n"


def _answers(rollouts: Sequence[Rollout]) -> list[int]:
    """A checksum of each answer: its prompt, its number, its tokens."""
    return [
        zlib.crc32(
            rollout.token_ids.astype("<i4").tobytes(),
            zlib.crc32(f"{rollout.prompt.id}|{rollout.sample_index}".encode()),
        )
        for rollout in rollouts
    ]


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _read_notes(path: Path) -> dict[int, dict[str, Any]]:
    """The last note of a step counts; a line that a crash cut is dropped."""
    notes: dict[int, dict[str, Any]] = {}
    if not path.exists():
        return notes
    kept = 0
    content = path.read_bytes()
    for line in content.splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        kept += len(line)
        note = json.loads(line)
        notes[note["step"]] = note
    if kept < len(content):
        os.truncate(path, kept)
    return notes


def _digest(scores: Scores) -> dict[str, dict[str, Any]]:
    """Per teacher: which model, and of each answer a checksum of its tokens and its log-prob."""
    found: dict[str, dict[str, Any]] = {}
    for per_teacher in scores:
        for name, one in per_teacher.items():
            entry = found.setdefault(
                name, {"model": one.model_fingerprint, "ids": [], "logprobs": []}
            )
            entry["ids"].append(zlib.crc32(one.token_ids.astype("<i4").tobytes()))
            entry["logprobs"].append(round(float(one.logprobs[one.valid].sum(dtype="f8")), 4))
    return found


def _encode(scores: Scores) -> bytes:
    arrays: dict[str, np.ndarray] = {}
    header: dict[str, str] = {}
    names = list(dict.fromkeys(name for per_teacher in scores for name in per_teacher))
    for place, name in enumerate(names):
        index = [i for i, per_teacher in enumerate(scores) if name in per_teacher]
        parts = [scores[i][name] for i in index]
        listed = all(part.topk_ids is not None for part in parts)
        with_lse = all(part.lse is not None for part in parts)
        shape = [part.topk_logprobs.shape for part in parts]
        columns = {"index": np.array(index), "shape": np.array(shape).reshape(-1, 2)}
        columns |= {key: np.concatenate([getattr(p, key) for p in parts]) for key in _ROWS}
        for key in _TOP_K[0 if listed else 1 :]:
            columns[key] = np.concatenate([getattr(part, key).ravel() for part in parts])
        if with_lse:
            columns["lse"] = np.concatenate([part.lse for part in parts])  # pyright: ignore
        arrays |= {f"{place}.{key}": array for key, array in columns.items()}
        header[str(place)] = json.dumps({"name": name, "model": parts[0].model_fingerprint})
    return save(arrays, metadata={"teachers": json.dumps(header)})


def _decode(content: bytes, num_rollouts: int, path: Path) -> list[dict[str, TeacherScores]]:
    results: list[dict[str, TeacherScores]] = [{} for _ in range(num_rollouts)]
    try:
        arrays = load(content)
        # safetensors for numpy does not hand out the metadata of bytes
        size = int.from_bytes(content[:8], "little")
        said = json.loads(content[8 : 8 + size])["__metadata__"]["teachers"]
        for place, entry in json.loads(said).items():
            teacher = json.loads(entry)
            own = {k.partition(".")[2]: a for k, a in arrays.items() if k.startswith(f"{place}.")}
            for i, one in _split(own, teacher["name"], teacher["model"]):
                results[i][teacher["name"]] = one
    except (SafetensorError, ValueError, KeyError, IndexError) as error:
        raise ArtifactError(f"{path}: not a file of replies ({error}); delete it") from error
    return results


def _split(arrays: dict[str, np.ndarray], name: str, model: str) -> list[tuple[int, TeacherScores]]:
    index, shape = arrays.pop("index"), arrays.pop("shape")
    rows = np.cumsum(shape[:-1, 0])
    entries = np.cumsum(shape[:-1].prod(axis=1))
    cut = {key: np.split(a, entries if key in _TOP_K else rows) for key, a in arrays.items()}
    found = []
    for n, i in enumerate(index.tolist()):
        own = {key: parts[n] for key, parts in cut.items()}
        for key in _TOP_K:
            if key in own:
                own[key] = own[key].reshape(shape[n])
        optional = {"topk_ids": own.pop("topk_ids", None), "lse": own.pop("lse", None)}
        scores = TeacherScores(teacher=name, model_fingerprint=model, **optional, **own)
        found.append((i, scores))
    return found
