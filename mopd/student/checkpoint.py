"""Checkpoints of a training run: safetensors and JSON, published whole or not at all.

`<dir>/step-000050/` holds `shard-tp0-pp0.safetensors` (weights and optimizer state of one place in
the replica), `rng-0.safetensors` per rank, `state.json` and `manifest.json` with the SHA-256 of the
rest. `<dir>/latest` names the newest. All ranks must see `<dir>` on one file system.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from mopd.errors import ArtifactError
from mopd.student.files import (
    fsync_directory,
    fsync_file,
    replace_directory,
    replace_file,
    sha256,
    write_bytes,
)
from mopd.student.parallel import Topology
from mopd.student.rng import capture_rng, restore_rng
from mopd.student.step import Companion, Student

FORMAT = 1
_STEP = re.compile(r"step-(\d{6,})")


def save(directory: Path, *, student: Student, state: dict[str, Any], keep_last: int) -> Path:
    """Publish `<directory>/step-<state["step"]>` and prune older ones. Collective over all ranks.

    `state` is what the loop wants back from `load`: JSON values, with the step under "step".
    """
    topology = student.model.topology
    target = directory / f"step-{state['step']:06d}"
    part = target.with_name(target.name + ".part")
    if topology.rank == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    dist.barrier()
    digests: list[dict[str, str]] = [{} for _ in range(topology.world_size)]
    dist.all_gather_object(digests, _write_own_files(part, student))
    if topology.rank == 0:
        content = {"state": state, "scheduler": student.scheduler.state_dict()}
        write_bytes(part / "state.json", _json(content))
        files = {name: digest for own in digests for name, digest in own.items()}
        files["state.json"] = sha256(part / "state.json")
        manifest = {"format": FORMAT, "layout": _layout(topology), "files": files}
        write_bytes(part / "manifest.json", _json(manifest))
        fsync_directory(part)
        replace_directory(part, target)
        replace_file(directory / "latest", target.name.encode())
        _prune(directory, keep_last)
    dist.barrier()
    return target


def load(path: Path, *, student: Student) -> dict[str, Any]:
    """Restore weights, optimizer, schedule and generators; the loop's `state`. Collective.

    Raises ArtifactError, on every rank, when a file is damaged or of another layout.
    """
    topology = student.model.topology
    problem = _problem(path, topology)
    problems: list[str | None] = [None] * topology.world_size
    dist.all_gather_object(problems, problem)
    for found in problems:
        if found is not None:
            raise ArtifactError(found)
    device = str(topology.device)
    with safe_open(path / _shard_name(topology), framework="pt", device=device) as file:
        _load_shard({name: file.get_tensor(name) for name in file.keys()}, student)  # noqa: SIM118
    content = json.loads((path / "state.json").read_text(encoding="utf-8"))
    # Megatron adds the saved count of steps to the present one.
    student.scheduler.num_steps = 0
    student.scheduler.load_state_dict(content["scheduler"])
    with safe_open(path / _rng_name(topology), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        restore_rng(tensors, json.loads(file.metadata()["values"]))
    return content["state"]


def find_latest(directory: Path) -> Path | None:
    """The newest complete checkpoint, or None. Raises ArtifactError if `latest` points nowhere."""
    pointer = directory / "latest"
    if not pointer.exists():
        return None
    path = directory / pointer.read_text(encoding="utf-8").strip()
    if not (path / "manifest.json").exists():
        raise ArtifactError(
            f"{pointer} names {path.name}, which has no manifest.json; write the name of an older "
            f"checkpoint into {pointer}, or delete it to start afresh"
        )
    return path


def oldest_step(directory: Path) -> int:
    """The step of the oldest checkpoint that is kept; 0 where there is none."""
    found = [_STEP.fullmatch(path.name) for path in directory.glob("step-*")]
    return min((int(match[1]) for match in found if match), default=0)


def _write_own_files(part: Path, student: Student) -> dict[str, str]:
    """This rank's files and their digests."""
    topology = student.model.topology
    tensors, values = capture_rng()
    names = [_rng_name(topology)]
    save_file(tensors, part / names[0], metadata={"values": json.dumps(values)})
    if topology.dp_rank == 0 and topology.cp_rank == 0:
        names.append(_shard_name(topology))
        save_file(_shard_tensors(student), part / names[1])
    for name in names:
        fsync_file(part / name)
    return {name: sha256(part / name) for name in names}


def _shard_tensors(student: Student) -> dict[str, torch.Tensor]:
    """`model.<name>`, `main.<name>` where it differs, `optim.<key>.<name>` of every parameter,
    `companion.<owner>.<name>` of what is trained beside them."""
    tensors = {}
    states = student.optimizer.optimizer.state
    for name, parameter in student.model.named_parameters():
        main = getattr(parameter, "main_param", parameter)
        tensors["model." + name] = parameter.detach().contiguous()
        if main is not parameter:
            tensors["main." + name] = main.detach().contiguous()
        for key, value in states.get(main, {}).items():
            tensors[f"optim.{key}.{name}"] = value.detach().contiguous()
    for owner, companion in _companions(student).items():
        for name, array in companion.state().items():
            tensors[f"companion.{owner}.{name}"] = torch.from_numpy(array)
    return tensors


def _companions(student: Student) -> Mapping[str, Companion]:
    return student.companions.members if student.companions is not None else {}


def _load_shard(tensors: dict[str, torch.Tensor], student: Student) -> None:
    states = student.optimizer.optimizer.state
    with torch.no_grad():
        for name, parameter in student.model.named_parameters():
            main = getattr(parameter, "main_param", parameter)
            parameter.copy_(tensors["model." + name])
            if main is not parameter:
                main.copy_(tensors["main." + name])
            states[main] = {
                key.split(".")[1]: value.clone()
                for key, value in tensors.items()
                if key.startswith("optim.") and key.split(".", 2)[2] == name
            }
    for owner, companion in _companions(student).items():
        prefix = f"companion.{owner}."
        own = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        if not own:
            raise ArtifactError(
                f"the checkpoint has no learned projection of {owner}: it was written without "
                "ctkd.learned; set ctkd.learned.enabled=false, or start afresh"
            )
        companion.restore({name: tensor.cpu().numpy() for name, tensor in own.items()})


def _problem(path: Path, topology: Topology) -> str | None:
    """Why this rank cannot load `path`, or None."""
    remedy = f"delete {path} and resume from an older checkpoint"
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return (
                f"{path} has format {manifest['format']}, not {FORMAT}; use the mopd that wrote it"
            )
        if manifest["layout"] != _layout(topology):
            return (
                f"{path} was written with {manifest['layout']}, this run has {_layout(topology)}; "
                "resume with the same sizes"
            )
        for name in (_shard_name(topology), _rng_name(topology), "state.json"):
            if sha256(path / name) != manifest["files"][name]:
                return f"{path / name} does not match its SHA-256 in the manifest; {remedy}"
    except (OSError, ValueError, KeyError) as error:
        return f"{path} cannot be read ({error!r}); {remedy}"
    return None


def _layout(topology: Topology) -> dict[str, int]:
    return {
        "tensor": topology.tp_size,
        "pipeline": topology.pp_size,
        "context": topology.cp_size,
        "data": topology.dp_size,
    }


def _shard_name(topology: Topology) -> str:
    return f"shard-tp{topology.tp_rank}-pp{topology.pp_rank}.safetensors"


def _rng_name(topology: Topology) -> str:
    return f"rng-{topology.rank}.safetensors"


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _prune(directory: Path, keep_last: int) -> None:
    """Keep the newest `keep_last` checkpoints; leftovers of crashed saves go too."""
    steps = {}
    for path in directory.iterdir():
        match = _STEP.match(path.name)
        if match is None:
            continue
        if match.end() < len(path.name):
            shutil.rmtree(path, ignore_errors=True)
        else:
            steps[int(match[1])] = path
    for step in sorted(steps)[:-keep_last]:
        shutil.rmtree(steps[step])
