"""Checkpoints of a training run: written in any layout, read in any other, published whole.

`<dir>/step-000050/` holds `rank-<r>.safetensors` per rank (what it is the main holder of, and its
generators), `index.json` (where the parts of a tensor are), `state.json`, and the manifest
(`mopd.storage.manifest`). All ranks must see `<dir>` on one file system.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from mopd.errors import ArtifactError
from mopd.storage import manifest as manifests
from mopd.storage.manifest import (
    INDEX,
    STATE,
    CheckpointInfo,
    find_latest,
    list_checkpoints,
    newest_intact,
    oldest_step,
    verify,
)
from mopd.student.parallel import Topology
from mopd.student.rng import capture_rng, reseed, restore_rng
from mopd.student.save_job import SaveJob, host_copy, rank_file
from mopd.student.shard_files import PieceReader
from mopd.student.sharded import describe, optimizer_step, set_optimizer_step
from mopd.student.step import Companion, Student

__all__ = [
    "CheckpointInfo",
    "Restored",
    "Saver",
    "find_latest",
    "list_checkpoints",
    "load",
    "oldest_step",
    "verify",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """The loop's state. ``reseeded``: another layout wrote it, so the generators start anew."""

    state: dict[str, Any]
    reseeded: bool


class Saver:
    """Saves checkpoints into ``directory``, on request in the background.

    Besides the ``keep_last`` newest the ``keep_best`` of the best score stay. With ``async_save``
    a thread of every rank writes from a copy in host memory, and that of rank 0 publishes once
    all ranks have written; the ranks meet in files, never in a collective of a thread.
    """

    def __init__(
        self,
        directory: Path,
        *,
        student: Student,
        keep_last: int,
        keep_best: int = 0,
        async_save: bool = False,
    ) -> None:
        self._directory = directory
        self._student = student
        self._keep = {"keep_last": keep_last, "keep_best": keep_best}
        self._async = async_save
        self._job: SaveJob | None = None  # under way; None on all ranks or on none

    def save(self, state: dict[str, Any], *, score: float | None = None) -> None:
        """Publish `<directory>/step-<state["step"]>` and prune older ones. Collective.

        `state` is what `load` gives back: JSON values, with the step under "step". ``score``:
        higher is better. An earlier save is waited for first. Raises ArtifactError, on every rank,
        when that one or, without ``async_save``, this one cannot be written.
        """
        self._wait()
        self._job = job = self._begin(state, score)
        if self._async:
            job.start()
            return
        self._agree(job.write())
        self._agree(job.publish())
        self._job = None

    def check(self) -> None:
        """Raises ArtifactError, on every rank, when a save in the background went wrong.

        Collective while a save is under way, and then a few bytes; nothing otherwise.
        """
        if self._job is None:
            return
        reports = _gather((self._job.is_running(), self._job.problem))
        self._refuse([problem for _, problem in reports])
        if not any(running for running, _ in reports):
            self._job = None

    def close(self) -> None:
        """Waits until everything is published, or raises as `check`. Collective."""
        self._wait()

    def _wait(self) -> None:
        while self._job is not None:
            self._job.join(seconds=0.05)
            self.check()

    def _agree(self, problem: str | None) -> None:
        self._refuse(_gather(problem))

    def _refuse(self, problems: list[str | None]) -> None:
        for problem in problems:
            if problem is not None:
                if self._job is not None:
                    self._job.abandon()
                    self._job = None
                raise ArtifactError(problem)

    def _begin(self, state: dict[str, Any], score: float | None) -> SaveJob:
        """The snapshot; the directory for it is there on every rank when this returns."""
        student, topology = self._student, self._student.model.topology
        shards = [s for s in describe(student.model, student.optimizer) if s.is_main]
        tensors, values = capture_rng()
        extra = {f"rng.{name}": tensor for name, tensor in tensors.items()}
        extra |= _companion_tensors(student)
        job = SaveJob(
            directory=self._directory,
            rank=topology.rank,
            world_size=topology.world_size,
            header={"step": state["step"], "score": score, "layout": layout_of(topology)},
            keep=self._keep,
            shards=[host_copy(shard, is_lasting=self._async) for shard in shards],
            extra={name: tensor.detach().cpu().clone() for name, tensor in extra.items()},
        )
        reports = _gather((job.prepare(), optimizer_step(student.optimizer), values))
        self._refuse([problem for problem, _, _ in reports])
        job.content = {
            "state": json.loads(json.dumps(state)),  # as it is now
            "scheduler": student.scheduler.state_dict(),
            "optimizer_step": max(step for _, step, _ in reports),
            "generators": [values for _, _, values in reports],
        }
        return job


def load(path: Path, *, student: Student, seed: int, verify: bool = True) -> Restored:
    """Restore weights, optimizer, schedule and generators from a checkpoint of any layout.

    Collective. With ``verify`` all ranks together read every byte of every file first. Generators
    are restored rank by rank where the layout is the one that wrote them; otherwise they are
    seeded anew by (``seed``, the step, the pipeline stage).

    Raises ArtifactError, on every rank, when a file is damaged or something is missing in it.
    """
    topology = student.model.topology
    share = (topology.rank, topology.world_size)
    _agree_on(path, lambda: manifests.problem(path, share=share, contents=verify))
    manifest = manifests.read_manifest(path)
    content = json.loads((path / STATE).read_text(encoding="utf-8"))
    index = json.loads((path / INDEX).read_text(encoding="utf-8"))
    same_layout = manifest["layout"] == layout_of(topology)
    with PieceReader(path, index) as reader:
        _agree_on(
            path, lambda: _mismatch(path, reader, student, manifest["layout"]), has_remedy=True
        )
        _agree_on(path, lambda: _fill(reader, student))
        if same_layout:
            names = [n for n in reader.names(rank_file(topology.rank)) if n.startswith("rng.")]
            tensors = {
                name.removeprefix("rng."): reader.whole(rank_file(topology.rank), name)
                for name in names
            }
            restore_rng(tensors, content["generators"][topology.rank])
        else:
            reseed(seed, step=manifest["step"], pp_rank=topology.pp_rank)
    set_optimizer_step(student.optimizer, content["optimizer_step"])
    # Megatron adds the saved count of steps to the present one.
    student.scheduler.num_steps = 0
    student.scheduler.load_state_dict(content["scheduler"])
    return Restored(state=content["state"], reseeded=not same_layout)


def layout_of(topology: Topology) -> dict[str, int]:
    """Sizes of the parallel axes: what decides which generators belong to a rank."""
    return {
        "tensor": topology.tp_size,
        "pipeline": topology.pp_size,
        "virtual": topology.vp_size,
        "context": topology.cp_size,
        "expert": topology.ep_size,
        "data": topology.dp_size,
    }


def _fill(reader: PieceReader, student: Student) -> str | None:
    with torch.no_grad():
        for shard in describe(student.model, student.optimizer):
            reader.fill(shard.data, key=shard.key, offset=shard.offset)
    topology = student.model.topology
    for owner, companion in _companions(student).items():
        arrays = {}
        for name in companion.state():
            key = _companion_key(owner, name, topology)
            file = reader.file_of(key)
            assert file is not None  # or `_mismatch` had said so
            arrays[name] = reader.whole(file, key).numpy()
        companion.restore(arrays)
    return None


def _mismatch(
    path: Path, reader: PieceReader, student: Student, layout: Mapping[str, int]
) -> str | None:
    """Why this model cannot be filled from the checkpoint, or None."""
    for shard in describe(student.model, student.optimizer):
        trouble = reader.missing(shard.key, whole=shard.whole, dtype=shard.data.dtype)
        if trouble is not None:
            return (
                f"{path} {trouble}: another model, student.dtype, student.lora or student.freeze "
                "wrote it; set them as they were, or start afresh with another run.name"
            )
    topology = student.model.topology
    for owner, companion in _companions(student).items():
        for name in companion.state():
            if reader.file_of(_companion_key(owner, name, topology)):
                continue
            if layout["tensor"] != topology.tp_size:
                return (
                    f"{path} has the learned projection of {owner} in {layout['tensor']} tensor-"
                    f"parallel parts; set student.parallel.tensor_model_parallel_size="
                    f"{layout['tensor']}"
                )
            return (
                f"{path} has no learned projection of {owner}: it was written without "
                "ctkd.learned; set ctkd.learned.enabled=false, or start afresh"
            )
    return None


def _companions(student: Student) -> Mapping[str, Companion]:
    return student.companions.members if student.companions is not None else {}


def _companion_tensors(student: Student) -> dict[str, torch.Tensor]:
    """What is trained beside the model, of the last stage: the only one that trains it."""
    topology = student.model.topology
    if not topology.is_last_stage or topology.dp_rank or topology.cp_rank:
        return {}
    return {
        _companion_key(owner, name, topology): torch.from_numpy(array)
        for owner, companion in _companions(student).items()
        for name, array in companion.state().items()
    }


def _companion_key(owner: str, name: str, topology: Topology) -> str:
    return f"companion.{owner}.{name}.{topology.tp_rank}-of-{topology.tp_size}"


def _gather(value: Any) -> list[Any]:
    """The value of every rank, on every rank."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def _agree_on(path: Path, attempt: Callable[[], str | None], *, has_remedy: bool = False) -> None:
    """Raises ArtifactError on every rank where ``attempt`` finds a problem on one of them.

    The line names the checkpoint that comes next, if there is one that is intact. ``has_remedy``:
    what ``attempt`` returns is about a checkpoint that is intact, and says what to do.
    """
    try:
        problem, is_complete = attempt(), has_remedy
    except ArtifactError as error:
        problem, is_complete = str(error), False
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        problem, is_complete = f"{path} cannot be read ({error!r})", False
    found = [one for one in _gather((problem, is_complete)) if one[0] is not None]
    if not found:
        return
    first, is_complete = found[0]
    if is_complete:
        raise ArtifactError(first)
    older = None
    if dist.get_rank() == 0:
        older = newest_intact(path.parent, before=manifests.step_of(path))
    older = _gather(older)[0]
    raise ArtifactError(
        f"{first}; delete {path}: {older.name} is intact and comes next"
        if older is not None
        else f"{first}; no older checkpoint is intact: delete {path.parent} to start afresh"
    )
