"""The directory of a checkpoint: what is in it, whether it is intact, which ones there are.

No rank, no group and no tensor: a command line may use it alone.

`manifest.json` has the SHA-256 and the size of every other file, `manifest.sha256` the digest of
the manifest. Together they find every damaged, cut, swapped, added or missing file. They are no
signature: who may write to the directory may write new digests, too. What they cannot do is run
code, for everything in it is safetensors and JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mopd.errors import ArtifactError
from mopd.fault_points import fault_point
from mopd.storage.files import fsync_directory, replace_file, sha256, write_bytes

FORMAT = 2
MANIFEST, DIGEST = "manifest.json", "manifest.sha256"
INDEX, STATE = "index.json", "state.json"
_NAME = re.compile(r"step-(\d{6,})")

Files = dict[str, dict[str, Any]]  # name -> {"size": bytes, "sha256": hex}
Report = Callable[[str, int], None]  # a file's name, and how many more of its bytes were read


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """What the manifest of one checkpoint says; ``problem`` where it cannot be read."""

    path: Path
    step: int
    score: float | None  # of the evaluation it was saved at; higher is better
    layout: Mapping[str, int]  # sizes of the parallel axes that wrote it
    size: int  # bytes
    saved: float | None  # seconds since 1970
    problem: str | None


def step_name(step: int) -> str:
    return f"step-{step:06d}"


def is_checkpoint(path: Path) -> bool:
    """Whether it is a directory with the name of one."""
    return _NAME.fullmatch(path.resolve().name) is not None and path.is_dir()


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint's directory."""
    match = _NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


def list_checkpoints(directory: Path) -> list[CheckpointInfo]:
    """The published checkpoints, oldest first. Nothing is verified."""
    found = [_describe(path) for _, path in sorted(_published(directory).items())]
    # one that a run beside us has pruned meanwhile is no damaged one
    return [info for info in found if info.problem is None or info.path.is_dir()]


def find_latest(directory: Path) -> Path | None:
    """What `latest` names, or the newest before it where a crash came in between; None where there
    is none yet.

    Raises ArtifactError if `latest` points nowhere.
    """
    pointer = directory / "latest"
    if not pointer.exists():
        return None
    name = pointer.read_text(encoding="utf-8", errors="replace").strip()
    named = _NAME.fullmatch(name)
    if named:
        # `latest` is written just before the rename, so that it never names something older.
        steps = _published(directory)
        reachable = [step for step in steps if step <= int(named[1])]
        if reachable:
            return steps[max(reachable)]
        if not steps and (directory / f"{name}.part").is_dir():
            return None  # a crash in between, at the first checkpoint
    if pointer.read_text(encoding="utf-8", errors="replace").strip() != name:
        return find_latest(directory)  # a run saves meanwhile, and has pruned what it named
    raise ArtifactError(
        f"{pointer} names {name!r}, and there is no checkpoint of that step or before; write the "
        f"name of another checkpoint into it, or delete it to start afresh"
    )


def ranked(infos: Collection[CheckpointInfo]) -> list[CheckpointInfo]:
    """Those with a score, the best first; of equal ones the later."""
    scored = [info for info in infos if info.score is not None]
    return sorted(scored, key=lambda info: (info.score, info.step), reverse=True)


def oldest_step(directory: Path) -> int:
    """The step of the oldest checkpoint that is kept; 0 where there is none."""
    return min(_published(directory), default=0)


def verify(path: Path) -> None:
    """Reads every byte. Raises ArtifactError, one line, with the first file that is not right."""
    found = problem(path)
    if found is not None:
        raise ArtifactError(found)


def problem(path: Path, *, share: tuple[int, int] = (0, 1), contents: bool = True) -> str | None:
    """The first of `problems`, or None."""
    return next(problems(path, share=share, contents=contents), None)


def problems(
    path: Path,
    *,
    share: tuple[int, int] = (0, 1),
    contents: bool = True,
    report: Report | None = None,
) -> Iterator[str]:
    """What is wrong with a checkpoint, one line each.

    ``share`` (i, n) reads the i-th of n parts of its files only; without ``contents`` names and
    sizes are all that is compared. ``report`` hears of every piece that was read.
    """
    try:
        files = read_manifest(path)["files"]
        yield from _wrong_files(path, files, share=share if contents else None, report=report)
    except ArtifactError as error:
        yield str(error)
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield f"{path} cannot be read ({error!r})"


def read_manifest(path: Path) -> dict[str, Any]:
    """Raises ArtifactError where it does not match its digest, format or directory."""
    try:
        content = (path / MANIFEST).read_bytes()
        digest = (path / DIGEST).read_bytes()
    except OSError as error:
        raise ArtifactError(f"{error.filename} cannot be read ({error.strerror})") from error
    if digest != _digest_line(content):
        raise ArtifactError(f"{path / MANIFEST} does not match its SHA-256 in {DIGEST}")
    manifest = json.loads(content)
    if manifest["format"] != FORMAT:
        raise ArtifactError(
            f"{path} has format {manifest['format']}, not {FORMAT}; use the mopd that wrote it"
        )
    if step_name(manifest["step"]) != path.name:
        raise ArtifactError(f"{path} holds the checkpoint of step {manifest['step']}; rename it")
    return manifest


def newest_intact(directory: Path, *, before: int) -> Path | None:
    """The newest checkpoint of a step below ``before`` that verifies."""
    for step, path in sorted(_published(directory).items(), reverse=True):
        if step < before and problem(path) is None:
            return path
    return None


def prepare(part: Path) -> None:
    """An empty directory to write into; leftovers of a crash go."""
    part.parent.mkdir(parents=True, exist_ok=True)
    if part.exists():
        shutil.rmtree(part)
    part.mkdir()
    fault_point("save.part.created")


def publish(part: Path, *, header: Mapping[str, Any], files: Files) -> Path:
    """Write the manifest into ``part`` and make it the checkpoint of ``header["step"]``."""
    content = to_json({"format": FORMAT, **header, "files": files})
    write_bytes(part / MANIFEST, content)
    write_bytes(part / DIGEST, _digest_line(content))
    fault_point("save.manifest.written")
    fsync_directory(part)
    fault_point("save.part.synced")
    target = part.with_name(step_name(header["step"]))
    old = part.with_name(target.name + ".old")
    if target.exists():  # of a branch that the run has left
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
    fault_point("save.replaced.moved")
    replace_file(part.parent / "latest", target.name.encode())
    fault_point("save.latest.written")
    os.rename(part, target)
    fsync_directory(part.parent)
    fault_point("save.renamed")
    return target


def prune(directory: Path, *, step: int, keep_last: int, keep_best: int) -> None:
    """Keep the ``keep_last`` newest up to ``step`` and the ``keep_best`` of the best score.

    Leftovers of crashed saves go; later steps, of a branch the run has left, stay.
    """
    infos = [info for info in list_checkpoints(directory) if info.step <= step]
    kept = {info.step for info in (*infos[-keep_last:], *ranked(infos)[:keep_best])}
    for info in infos:
        if info.step not in kept:
            # Under its own name a half-deleted checkpoint would pass for a damaged one.
            os.rename(info.path, info.path.with_name(info.path.name + ".old"))
            fault_point("save.pruning")
    for path in directory.glob("step-*.*"):
        if path.suffix in (".part", ".old"):
            shutil.rmtree(path, ignore_errors=True)
    fault_point("save.pruned")


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _published(directory: Path) -> dict[int, Path]:
    """Directories that were renamed into place, by step."""
    found = [path for path in directory.glob("step-*") if _NAME.fullmatch(path.name)]
    return {step_of(path): path for path in found if path.is_dir()}


def _describe(path: Path) -> CheckpointInfo:
    manifest: dict[str, Any] = {}
    trouble, saved = None, None
    try:
        manifest = read_manifest(path)
        saved = (path / MANIFEST).stat().st_mtime
    except (ArtifactError, OSError, ValueError, KeyError, TypeError) as error:
        trouble = str(error)
    return CheckpointInfo(
        path=path,
        step=step_of(path),
        score=manifest.get("score"),
        layout=manifest.get("layout", {}),
        size=sum(entry["size"] for entry in manifest.get("files", {}).values()),
        saved=saved,
        problem=trouble,
    )


def _wrong_files(
    path: Path, files: Files, *, share: tuple[int, int] | None, report: Report | None
) -> Iterator[str]:
    there = {entry.name for entry in path.iterdir()}
    expected = {*files, MANIFEST, DIGEST}
    for name in sorted(there ^ expected):
        trouble = "is missing" if name in expected else "is not in the manifest"
        yield f"{path / name} {trouble}"
    cut = set()
    for name in sorted(there & files.keys()):
        size = (path / name).stat().st_size
        if size != files[name]["size"]:
            cut.add(name)
            yield f"{path / name} has {size} bytes, the manifest says {files[name]['size']}"
    for name in _share(files, *share) if share is not None else ():
        if name not in there or name in cut:
            continue
        if sha256(path / name, report=report) != files[name]["sha256"]:
            yield f"{path / name} does not match its SHA-256 in the manifest"


def _share(files: Files, index: int, count: int) -> Collection[str]:
    """The largest files first, dealt in turns, so that all readers have as much to do."""
    return sorted(files, key=lambda name: (-files[name]["size"], name))[index::count]


def _digest_line(content: bytes) -> bytes:
    return f"{hashlib.sha256(content).hexdigest()}  {MANIFEST}\n".encode()
