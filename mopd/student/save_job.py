"""One save: this rank's files, and on rank 0 the publication. No collective: a thread may run it.

The steps, each with a fault point: files of every rank, `.done-<rank>` beside them, index, state,
manifest, `latest`, rename, pruning. Until the rename the previous checkpoint is the newest one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mopd.errors import ArtifactError
from mopd.fault_points import fault_point
from mopd.storage.files import write_bytes
from mopd.storage.manifest import INDEX, STATE, Files, prepare, prune, publish, step_name, to_json
from mopd.student.shard_files import Piece, build_index, dtype_code, write_tensors
from mopd.student.sharded import Shard

_POLL_S = 0.02
_WAIT_S = 1800.0  # for the slowest rank's files

_REMEDIES = {
    errno.ENOSPC: "free some space, or lower checkpoint.keep_last",
    errno.EDQUOT: "free some space of your quota, or lower checkpoint.keep_last",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
    errno.EROFS: "make it writable, or set run.dir to another directory",
    errno.EACCES: "make it writable, or set run.dir to another directory",
    errno.EPERM: "make it writable, or set run.dir to another directory",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "raise the system's limit on open files",
    errno.EIO: "look at the disk, or set run.dir to another one",
}


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def host_copy(shard: Shard, *, is_lasting: bool) -> Shard:
    """The shard in host memory, contiguous; in memory of its own where it must outlast a step."""
    data = shard.data.to("cpu", copy=True) if is_lasting else shard.data.cpu()
    return replace(shard, data=data.contiguous())


class SaveJob:
    """A snapshot on its way to the disk. Methods return why they failed, in one line, or None."""

    def __init__(
        self,
        *,
        directory: Path,
        rank: int,
        world_size: int,
        header: Mapping[str, Any],
        keep: Mapping[str, int],
        shards: Sequence[Shard],
        extra: Mapping[str, torch.Tensor],
    ) -> None:
        self._directory = directory
        self._rank, self._world_size = rank, world_size
        self._header, self._keep = header, keep
        self._shards, self._extra = shards, extra
        self._part = directory / f"{step_name(header['step'])}.part"
        self._thread: threading.Thread | None = None
        self._abandoned = False
        self.content: Mapping[str, Any] = {}  # of state.json
        self.problem: str | None = None  # of `start`, so far

    def prepare(self) -> str | None:
        """Rank 0 makes the directory; the ranks have to meet after it."""
        return self._guarded(lambda: prepare(self._part)) if self._rank == 0 else None

    def write(self) -> str | None:
        """This rank's files, and the note that they are there."""
        return self._guarded(self._write)

    def publish(self) -> str | None:
        """Rank 0: once every rank has written, the checkpoint appears and older ones go."""
        return self._guarded(self._publish) if self._rank == 0 else None

    def start(self) -> None:
        """`write` and `publish` in a thread."""

        def run() -> None:
            # Type and cause reach the training thread by `check`, whatever it is.
            try:
                self.problem = self.write() or self.publish()
            except BaseException as error:
                self.problem = f"{self._part} cannot be saved ({error!r})"

        self._thread = threading.Thread(target=run, name="save", daemon=True)
        self._thread.start()

    def is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def join(self, *, seconds: float) -> None:
        if self._thread is not None:
            self._thread.join(seconds)

    def abandon(self) -> None:
        """Another rank failed: nothing will be published."""
        self._abandoned = True

    def _guarded(self, action: Callable[[], None]) -> str | None:
        try:
            action()
        except ArtifactError as error:
            return str(error)
        except OSError as error:
            remedy = _REMEDIES.get(error.errno or 0, "look at the disk")
            why = error.strerror or str(error)
            return f"{self._part} cannot be written ({why}): {remedy}; earlier checkpoints stay"
        except ValueError as error:  # of the index
            return f"{self._part} is not whole ({error}); report this layout, and resume in another"
        return None

    def _write(self) -> None:
        tensors = dict(self._extra)
        pieces = []
        for number, shard in enumerate(self._shards):
            name = f"{number}:{shard.key}"
            tensors[name] = shard.data
            pieces.append(
                Piece(
                    key=shard.key,
                    dtype=dtype_code(shard.data.dtype),
                    whole=shard.whole,
                    offset=shard.offset,
                    shape=tuple(shard.data.shape),
                    name=name,
                ).to_json()
            )
        file = rank_file(self._rank)
        entry = write_tensors(self._part / file, tensors)
        # Rank 0 reads it as soon as it has its name.
        note = self._part / f".done-{self._rank}"
        unfinished = self._part / f".writing-{self._rank}"
        unfinished.write_bytes(to_json({"file": file, "entry": entry, "pieces": pieces}))
        os.rename(unfinished, note)
        fault_point("save.done.written")

    def _publish(self) -> None:
        notes = [self._await(rank) for rank in range(self._world_size)]
        files: Files = {note["file"]: note["entry"] for note in notes}
        index = build_index({note["file"]: note["pieces"] for note in notes})
        self._add(INDEX, index, files)
        fault_point("save.index.written")
        self._add(STATE, self.content, files)
        fault_point("save.state.written")
        for rank in range(self._world_size):
            os.unlink(self._part / f".done-{rank}")
        publish(self._part, header=self._header, files=files)
        prune(self._directory, step=self._header["step"], **self._keep)

    def _add(self, name: str, value: Any, files: Files) -> None:
        content = to_json(value)
        write_bytes(self._part / name, content)
        # as of the tensors: of what was handed over, not of what a disk made of it
        files[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    def _await(self, rank: int) -> dict[str, Any]:
        path = self._part / f".done-{rank}"
        deadline = time.monotonic() + _WAIT_S
        while not path.exists():
            if self._abandoned:
                raise ArtifactError(f"{self._part} was given up: another rank could not write")
            if time.monotonic() > deadline:
                raise ArtifactError(
                    f"{self._part} has no files of rank {rank} after {_WAIT_S:.0f} s; use one file "
                    "system for all ranks, or a faster one"
                )
            time.sleep(_POLL_S)
        return json.loads(path.read_text(encoding="utf-8"))
