"""Files that appear whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

_PIECE = 2**24


def sha256(path: Path, *, report: Callable[[str, int], None] | None = None) -> str:
    """Hex digest of a file, read in pieces; ``report`` gets its name and each piece's size."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            if report is not None:
                report(path.name, len(piece))
    return digest.hexdigest()


def write_bytes(path: Path, data: bytes) -> None:
    """Write and fsync."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Write next to `path` and rename over it: a reader sees the old file or the new one."""
    part = path.with_name(path.name + ".part")
    write_bytes(part, data)
    os.replace(part, path)
    fsync_directory(path.parent)


def fsync_file(path: Path) -> None:
    """Flush a closed file to the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def fsync_directory(path: Path) -> None:
    """Make renames and new names in a directory survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_directory(part: Path, target: Path) -> None:
    """Rename `part` to `target`; an old target stays readable until the new one is complete."""
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(part, target)
    fsync_directory(target.parent)
    shutil.rmtree(old, ignore_errors=True)
