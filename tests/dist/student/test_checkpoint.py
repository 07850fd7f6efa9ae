"""Resuming changes no bit, and whatever is not restored shows; old checkpoints go."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from mopd.errors import ArtifactError
from mopd.storage import manifest
from mopd.student import checkpoint
from mopd.student.checkpoint import Saver, find_latest, list_checkpoints
from mopd.student.shard_files import PieceReader
from mopd.student.step import Companions, Student
from tests.dist.student import resharding, worlds
from tests.dist.student.resharding import Whole, advance, differences, whole
from tests.dist.student.worlds import Layout, Run
from tests.helpers.dist import RankError, run_ranks


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(worlds.make_model("qwen3", tmp_path_factory.mktemp("checkpoint") / "qwen3"))


STATE = {"step": 3, "position": [1, 2.5, "x"]}


def straight(run: Run, split: bool) -> Whole:
    student = resharding.build(run, distributed=split, noisy=True)
    return whole(student, advance(student, run, range(6))[3:])


def first_half(run: Run, split: bool, directory: str) -> None:
    student = resharding.build(run, distributed=split, noisy=True)
    advance(student, run, range(3))
    Saver(Path(directory), student=student, keep_last=2).save(STATE)


def second_half(run: Run, split: bool, directory: str, sabotage: str | None) -> Whole:
    """Resumes, with one thing that is not restored."""
    student = resharding.build(run, distributed=split, noisy=True)
    torch.rand(3)  # a restart need not have drawn the same numbers
    path = find_latest(Path(directory))
    assert path is not None
    with SABOTAGES[sabotage](student) if sabotage else contextlib.nullcontext():
        restored = checkpoint.load(path, student=student, seed=3)
    state = dict(restored.state)
    assert state == STATE and not restored.reseeded
    if sabotage == "cursor":
        state["step"] -= 1
    return whole(student, advance(student, run, range(state["step"], 6))[-3:])


def _skip(where: Any) -> Any:
    """Reads everything but the tensors for which ``where(key)`` holds."""
    fill = PieceReader.fill

    def fill_some(self: PieceReader, target: torch.Tensor, *, key: str, offset: Any) -> None:
        if not where(key):
            fill(self, target, key=key, offset=offset)

    return mock.patch.object(PieceReader, "fill", fill_some)


def _one_rank(student: Student) -> Any:
    rank = student.model.topology.rank
    return _skip(lambda key: rank == 1 and key.endswith("layers.1.mlp.linear_fc1.weight"))


# What a restore may forget (R10); `cursor` goes wrong after it.
SABOTAGES = {
    "generators": lambda student: mock.patch.object(checkpoint, "restore_rng"),
    "moment": lambda student: _skip(lambda key: key.startswith("optimizer.exp_avg.")),
    "schedule": lambda student: mock.patch.object(student.scheduler, "load_state_dict"),
    "rank": _one_rank,
    "cursor": lambda student: contextlib.nullcontext(),
    "count": lambda student: mock.patch.object(checkpoint, "set_optimizer_step"),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("layout", "split"),
    [(Layout(), False), (Layout(dp=2), False), (Layout(dp=2), True), (Layout(tp=2, pp=2), False)],
    ids=str,
)
def test_resume_is_bitwise(
    qwen3: str, tmp_path: Path, layout: Layout, split: bool, dtype: str
) -> None:
    run = Run(model_dir=qwen3, layout=layout, student={"dtype": dtype})
    expected = run_ranks(straight, layout.world_size, run, split)
    run_ranks(first_half, layout.world_size, run, split, str(tmp_path))
    resumed = run_ranks(second_half, layout.world_size, run, split, str(tmp_path), None)
    for want, got in zip(expected, resumed, strict=True):
        assert differences(got, want) == []


@pytest.mark.parametrize("sabotage", SABOTAGES)
def test_what_is_not_restored_shows(
    qwen3: str, tmp_path_factory: pytest.TempPathFactory, sabotage: str
) -> None:
    run = Run(model_dir=qwen3, layout=Layout(tp=2))
    directory = str(tmp_path_factory.getbasetemp() / "sabotaged")
    if not Path(directory).exists():
        run_ranks(first_half, 2, run, False, directory)
    expected = run_ranks(straight, 2, run, False)
    resumed = run_ranks(second_half, 2, run, False, directory, sabotage)
    assert any(differences(got, want) for got, want in zip(resumed, expected, strict=True))


def save_steps(run: Run, directory: str, steps: list[int], best: int = 0) -> None:
    student = resharding.build(run)
    saver = Saver(Path(directory), student=student, keep_last=2, keep_best=best)
    for step in steps:
        score = -abs(step - 25.0) if best and step != 20 else None
        saver.save({"step": step}, score=score)


def load_only(run: Run, path: str) -> str:
    student = resharding.build(run)
    try:
        checkpoint.load(Path(path), student=student, seed=3)
    except ArtifactError as error:
        return str(error)
    return ""


def test_prunes_and_points_to_the_latest(qwen3: str, tmp_path: Path) -> None:
    (tmp_path / "step-000001.part").mkdir()
    run_ranks(save_steps, 1, Run(model_dir=qwen3), str(tmp_path), [10, 20, 30, 30])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["latest", "step-000020", "step-000030"]
    assert find_latest(tmp_path) == tmp_path / "step-000030"
    assert checkpoint.oldest_step(tmp_path) == 20
    suffixes = {path.suffix for path in (tmp_path / "step-000030").iterdir()}
    assert suffixes == {".json", ".safetensors", ".sha256"}


def test_the_best_stay(qwen3: str, tmp_path: Path) -> None:
    """Scores -15, none, -5, -15, -25, -35 of steps 10 to 60; the newest two stay in any case."""
    steps = [10, 20, 30, 40, 50, 60]
    run_ranks(save_steps, 1, Run(model_dir=qwen3), str(tmp_path), steps, 2)
    found = list_checkpoints(tmp_path)
    assert [(info.step, info.score) for info in found] == [
        (30, -5.0),
        (40, -15.0),
        (50, -25.0),
        (60, -35.0),
    ]
    assert all(info.problem is None and info.size > 0 for info in found)
    assert found[0].layout["tensor"] == 1
    assert checkpoint.oldest_step(tmp_path) == 30


def test_a_saver_goes_back(qwen3: str, tmp_path: Path) -> None:
    """A run that continues from an older checkpoint replaces what it comes by again."""
    run = Run(model_dir=qwen3)
    run_ranks(save_steps, 1, run, str(tmp_path), [10, 20, 30])
    (tmp_path / "latest").write_text("step-000020")
    run_ranks(save_steps, 1, run, str(tmp_path), [25])
    assert find_latest(tmp_path) == tmp_path / "step-000025"
    assert [info.step for info in list_checkpoints(tmp_path)] == [20, 25, 30]


def test_damage_is_reported_on_every_rank(qwen3: str, tmp_path: Path) -> None:
    tmp_path = tmp_path / "student.ctkd.1"  # a name that looks like a key of the recipe
    run = Run(model_dir=qwen3, layout=Layout(tp=2))
    run_ranks(save_steps, 2, run, str(tmp_path), [10, 20])
    path = tmp_path / "step-000020"
    shard = path / "rank-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    for message in run_ranks(load_only, 2, run, str(path)):
        assert "rank-00001.safetensors does not match its SHA-256" in message
        assert message.endswith(f"delete {path}: step-000010 is intact and comes next")
    shard.unlink()
    (tmp_path / "step-000010" / "latest").touch()
    for message in run_ranks(load_only, 2, run, str(path)):
        assert "rank-00001.safetensors is missing" in message
        assert "no older checkpoint is intact" in message and "\n" not in message


def test_another_model_is_refused(qwen3: str, tmp_path: Path) -> None:
    run_ranks(save_steps, 1, Run(model_dir=qwen3), str(tmp_path), [10])
    other = Run(model_dir=qwen3, layout=Layout(dp=2), student={"dtype": "bfloat16"})
    for message in run_ranks(load_only, 2, other, str(tmp_path / "step-000010")):
        assert "F32, not" in message and "student.dtype" in message
        assert "delete" not in message  # it is intact


def test_latest_that_points_nowhere(tmp_path: Path) -> None:
    assert find_latest(tmp_path) is None
    (tmp_path / "latest").write_text("step-000007")
    with pytest.raises(ArtifactError, match="no checkpoint of that step or before"):
        find_latest(tmp_path)
    (tmp_path / "step-000003").mkdir()  # a crash came before step 7 got its name
    assert find_latest(tmp_path) == tmp_path / "step-000003"
    (tmp_path / "latest").write_text("stfp-000007")
    with pytest.raises(ArtifactError, match="no checkpoint of that step"):
        find_latest(tmp_path)


def test_a_run_beside_saves_and_prunes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is gone when it is looked at is neither damaged nor pointed to."""
    for step in (3, 5):
        (tmp_path / f"step-{step:06}").mkdir()
    read_manifest, published = manifest.read_manifest, manifest._published

    def read(path: Path) -> dict[str, Any]:
        if path.name == "step-000003":
            path.rmdir()
        return read_manifest(path)

    with monkeypatch.context() as patched:
        patched.setattr(manifest, "read_manifest", read)
        (listed,) = list_checkpoints(tmp_path)
    assert listed.step == 5 and listed.problem is not None

    def look(directory: Path) -> dict[int, Path]:
        if (directory / "step-000005").exists():
            (directory / "step-000005").rename(directory / "step-000007")
            (directory / "latest").write_text("step-000007")
        return published(directory)

    (tmp_path / "latest").write_text("step-000005")
    monkeypatch.setattr(manifest, "_published", look)
    assert find_latest(tmp_path) == tmp_path / "step-000007"


class Learned:
    """A companion of one vocabulary shard that remembers what it was restored from."""

    def __init__(self, value: float) -> None:
        self.gradient = torch.zeros(2)
        self.array = np.full(2, value, dtype=np.float32)

    def step(self, lr: float) -> None:
        raise NotImplementedError

    def state(self) -> dict[str, np.ndarray]:
        return {"log_weight": self.array}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        self.array = state["log_weight"]


def with_companion(run: Run, value: float) -> Student:
    """``value`` plus the tensor-parallel rank, in a shard of the learned projection."""
    student = resharding.build(run)
    learned = Learned(value + student.model.topology.tp_rank)
    student.companions = Companions(members={"sort": learned}, lr=0.0)
    return student


def save_companion(run: Run, directory: str) -> None:
    student = with_companion(run, 1.0)
    Saver(Path(directory), student=student, keep_last=1).save({"step": 1})


def load_companion(run: Run, directory: str) -> list[float] | str:
    student = with_companion(run, 7.0)
    try:
        checkpoint.load(Path(directory) / "step-000001", student=student, seed=3)
    except ArtifactError as error:
        return str(error)
    assert student.companions is not None
    return student.companions.members["sort"].state()["log_weight"].tolist()


def test_a_learned_projection_keeps_its_parts(qwen3: str, tmp_path: Path) -> None:
    two = Run(model_dir=qwen3, layout=Layout(tp=2))
    run_ranks(save_companion, 2, two, str(tmp_path))
    assert run_ranks(load_companion, 2, two, str(tmp_path)) == [[1.0, 1.0], [2.0, 2.0]]
    pipeline = Run(model_dir=qwen3, layout=Layout(tp=2, pp=2))
    found = run_ranks(load_companion, 4, pipeline, str(tmp_path))
    assert found == [[1.0, 1.0], [2.0, 2.0]] * 2
    (message,) = run_ranks(load_companion, 1, Run(model_dir=qwen3), str(tmp_path))
    assert "set student.parallel.tensor_model_parallel_size=2" in str(message)


def load_unverified(run: Run, path: str) -> bool:
    student = resharding.build(run)
    return checkpoint.load(Path(path), student=student, seed=3, verify=False).reseeded


def test_without_verify_only_names_and_sizes_are_compared(qwen3: str, tmp_path: Path) -> None:
    run = Run(model_dir=qwen3)
    run_ranks(save_steps, 1, run, str(tmp_path), [10])
    path = tmp_path / "step-000010"
    shard = path / "rank-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert "SHA-256" in run_ranks(load_only, 1, run, str(path))[0]
    assert run_ranks(load_unverified, 1, run, str(path)) == [False]
    shard.write_bytes(data[:-1])
    with pytest.raises(RankError, match="the manifest says"):
        run_ranks(load_unverified, 1, run, str(path))
