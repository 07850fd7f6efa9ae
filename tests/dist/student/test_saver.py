"""Saving in the background, full disks, kills at every step of a save, damage of every byte."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import resource
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from mopd import fault_points
from mopd.errors import ArtifactError
from mopd.storage import manifest
from mopd.storage.manifest import problem
from mopd.student import checkpoint
from mopd.student.checkpoint import Saver, find_latest, list_checkpoints, verify
from mopd.student.save_job import SaveJob
from mopd.student.shard_files import PieceReader
from mopd.student.step import Student
from tests.dist.student import resharding, worlds
from tests.dist.student.resharding import advance, differences, shards_of, whole
from tests.dist.student.worlds import Layout, Run
from tests.helpers.dist import run_ranks

TWO = Layout(tp=2)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(worlds.make_model("qwen3", tmp_path_factory.mktemp("saver") / "qwen3"))


@contextmanager
def installed(handler: fault_points.Handler) -> Iterator[None]:
    fault_points.install(handler)
    try:
        yield
    finally:
        fault_points.install(None)


def snapshot(student: Student) -> list[torch.Tensor]:
    return [shard.data.clone() for shard in shards_of(student)]


def saved_in(path: Path, student: Student) -> list[torch.Tensor]:
    """What a checkpoint has for this rank, without loading it."""
    verify(path)
    found = []
    with PieceReader(path, json.loads((path / "index.json").read_text())) as reader:
        for shard in shards_of(student):
            target = torch.full_like(shard.data, float("nan"))
            reader.fill(target, key=shard.key, offset=shard.offset)
            found.append(target)
    return found


def train_while_saving(run: Run, directory: str, split: bool) -> tuple[int, int]:
    """Saves after each of 20 steps; writing begins only when the next step has changed weights.

    How many checkpoints equal the state at their snapshot, and how often the weights were others
    by the time they were written.
    """
    student = resharding.build(run, distributed=split)
    saver = Saver(Path(directory), student=student, keep_last=30, async_save=True)
    trained = threading.Event()

    def wait(point: str) -> None:
        if point == "save.shard.started":
            assert trained.wait(timeout=30)
            trained.clear()

    taken, changed = [], 0
    with installed(wait):
        advance(student, run, range(1))
        for step in range(1, 21):
            taken.append(snapshot(student))
            saver.save({"step": step})
            advance(student, run, range(step, step + 1))
            pairs = zip(snapshot(student), taken[-1], strict=True)
            changed += any(not torch.equal(now, then) for now, then in pairs)
            saver.check()
            trained.set()
        saver.close()
    equal = 0
    for step, expected in enumerate(taken, 1):
        found = saved_in(Path(directory) / f"step-{step:06d}", student)
        equal += all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    return equal, changed


def test_what_is_saved_is_the_state_at_its_step(qwen3: str, tmp_path: Path) -> None:
    run = Run(model_dir=qwen3, layout=Layout(dp=2))
    for equal, changed in run_ranks(train_while_saving, 2, run, str(tmp_path), True):
        assert (equal, changed) == (20, 20)
    assert [info.step for info in list_checkpoints(tmp_path)] == list(range(1, 21))
    assert find_latest(tmp_path) == tmp_path / "step-000020"


def fail_on_rank_1(number: int, point: str) -> fault_points.Handler:
    def handle(passed: str) -> None:
        if passed == point:
            raise OSError(number, os.strerror(number), "a file")

    return handle


def save_on_a_bad_disk(
    run: Run, directory: str, is_async: bool, number: int, where: tuple[int, str]
) -> list[str]:
    """Step 10 is saved; one rank cannot write step 20; step 30 is saved. What each rank is told."""
    student = resharding.build(run)
    saver = Saver(Path(directory), student=student, keep_last=2, async_save=is_async)
    messages = []
    saver.save({"step": 10})
    saver.close()
    rank, point = where
    broken = fail_on_rank_1(number, point) if student.model.topology.rank == rank else None
    fault_points.install(broken)
    try:
        saver.save({"step": 20})
        for step in itertools.count():  # the loop goes on until it is told
            advance(student, run, range(step, step + 1))
            saver.check()
    except ArtifactError as error:
        messages.append(str(error))
    fault_points.install(None)
    assert find_latest(Path(directory)) == Path(directory) / "step-000010"
    verify(Path(directory) / "step-000010")
    torch.distributed.barrier()
    saver.save({"step": 30})
    saver.close()
    return messages


@pytest.mark.parametrize("is_async", [False, True], ids=["at once", "in the background"])
@pytest.mark.parametrize(
    ("number", "where", "remedy"),
    [
        (errno.ENOSPC, (1, "save.shard.started"), "free some space"),
        (errno.EIO, (0, "save.shard.written"), "look at the disk"),
        (errno.EROFS, (0, "save.part.created"), "make it writable"),
        (errno.ENOSPC, (0, "save.manifest.written"), "checkpoint.keep_last"),
    ],
    ids=["full", "broken", "read-only", "full at the end"],
)
def test_a_bad_disk_is_told_on_every_rank(
    qwen3: str,
    tmp_path: Path,
    is_async: bool,
    number: int,
    where: tuple[int, str],
    remedy: str,
) -> None:
    run = Run(model_dir=qwen3, layout=TWO)
    arguments = (run, str(tmp_path), is_async, number, where)
    for messages in run_ranks(save_on_a_bad_disk, 2, *arguments):
        (message,) = messages
        assert remedy in message and "step-000020.part" in message and "\n" not in message
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["latest", "step-000010", "step-000030"]


def job_of(student: Student, directory: Path, step: int) -> SaveJob:
    saver = Saver(directory, student=student, keep_last=1)
    return saver._begin({"step": step}, None)


def in_a_child(action: Callable[[], int]) -> int:
    """The wait status of a forked process that runs ``action``."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = action()
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def kill_at_every_point(run: Run, directory: str) -> list[tuple[str, bool, bool]]:
    """A child saves and is killed; per point: was it killed, and is what then loads right?"""
    base, report = Path(directory), []
    student = resharding.build(run)
    advance(student, run, range(1))
    Saver(base, student=student, keep_last=1).save({"step": 10})
    before = whole(student)
    for number, point in enumerate(fault_points.SAVE_POINTS, 2):
        advance(student, run, range(1))
        after, job = whole(student), job_of(student, base, 10 * number)

        def save(job: SaveJob = job, point: str = point) -> int:
            fault_points.install(fault_points.killer(point))
            done = [job.prepare(), job.write(), job.publish()]
            return int(any(done))

        status = in_a_child(save)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert (base / "latest").read_text().startswith("step-")
        path = find_latest(base)
        assert path is not None
        restored = checkpoint.load(path, student=student, seed=3)
        is_new = (base / f"step-{10 * number:06d}").exists()
        expected = after if is_new else before
        right = not differences(whole(student), expected)
        right &= is_new == (point in _AFTER_RENAME)
        right &= restored.state["step"] == int(path.name.removeprefix("step-"))
        report.append((point, killed, right))
        before = expected
    Saver(base, student=student, keep_last=1).save({"step": 900})
    return report


_AFTER_RENAME = ("save.renamed", "save.pruning", "save.pruned")


def test_a_kill_at_any_step_of_a_save_leaves_a_checkpoint(qwen3: str, tmp_path: Path) -> None:
    (report,) = run_ranks(kill_at_every_point, 1, Run(model_dir=qwen3), str(tmp_path))
    assert report == [(point, True, True) for point in fault_points.SAVE_POINTS]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["latest", "step-000900"]


def save_with_limit(run: Run, directory: str, limit: int, value: int, word: str) -> int:
    student = resharding.build(run)
    base = Path(directory)
    Saver(base, student=student, keep_last=1).save({"step": 10})
    job = job_of(student, base, 20)

    def save() -> int:
        os.close(os.open("/dev/null", os.O_RDONLY))
        resource.setrlimit(limit, (value, resource.getrlimit(limit)[1]))
        return 0 if word in (job.write() or "") else 1

    return in_a_child(save)


@pytest.mark.parametrize(
    ("limit", "value", "word"),
    [
        (resource.RLIMIT_FSIZE, 20_000, "File too large): raise the limit on the size"),
        (resource.RLIMIT_NOFILE, 3, "Too many open files): raise the limit on open files"),
    ],
    ids=["EFBIG", "EMFILE"],
)
def test_limits_of_the_system_are_told(
    qwen3: str, tmp_path: Path, limit: int, value: int, word: str
) -> None:
    run = Run(model_dir=qwen3)
    assert run_ranks(save_with_limit, 1, run, str(tmp_path), limit, value, word) == [0]
    verify(tmp_path / "step-000010")


def save_two(run: Run, directory: str) -> None:
    student = resharding.build(run)
    saver = Saver(Path(directory), student=student, keep_last=2)
    for step in (10, 20):
        advance(student, run, range(1))
        saver.save({"step": step})


@pytest.fixture(scope="module")
def intact(qwen3: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("intact")
    run_ranks(save_two, 2, Run(model_dir=qwen3, layout=Layout(dp=2)), str(directory))
    return directory


def flips_that_pass(path: Path, count: int) -> list[tuple[str, int]]:
    """Random bytes of random files that may be changed without anybody seeing it."""
    draw, unseen = random.Random(5), []
    files = sorted(path.iterdir())
    contents = {file: bytearray(file.read_bytes()) for file in files}
    for _ in range(count):
        file = draw.choice(files)
        data = contents[file]
        place, bit = draw.randrange(len(data)), 1 << draw.randrange(8)
        with open(file, "r+b") as target:
            target.seek(place)
            target.write(bytes([data[place] ^ bit]))
            if problem_after(target, path) is None:
                unseen.append((file.name, place))
            target.seek(place)
            target.write(bytes([data[place]]))
    assert problem(path) is None
    return unseen


def problem_after(target: Any, path: Path) -> str | None:
    target.flush()
    return problem(path)


def test_a_changed_byte_is_seen(intact: Path) -> None:
    assert flips_that_pass(intact / "step-000020", 60) == []


@pytest.mark.slow
def test_two_thousand_changed_bytes_are_seen(intact: Path) -> None:
    assert flips_that_pass(intact / "step-000020", 2000) == []


def _append(path: Path) -> None:
    with open(path / "rank-00000.safetensors", "ab") as file:
        file.write(b"\0")


def _truncate(path: Path) -> None:
    os.truncate(path / "rank-00000.safetensors", 100)


def _swap(path: Path, name: str) -> None:
    shutil.copy(path.with_name("step-000010") / name, path / name)


def _rename(path: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(path.with_name("step-000010"), path)


def _all_but_names(path: Path) -> None:
    """Somebody puts another step's files and manifest in, but forgets the digest."""
    for name in ("rank-00000.safetensors", "index.json", "state.json", "manifest.json"):
        _swap(path, name)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "appended": _append,
    "truncated": _truncate,
    "emptied": lambda path: os.truncate(path / "state.json", 0),
    "weights of another step": lambda path: _swap(path, "rank-00000.safetensors"),
    "state of another step": lambda path: _swap(path, "state.json"),
    "manifest of another step": lambda path: _swap(path, "manifest.json"),
    "all of another step": _all_but_names,
    "directory of another step": _rename,
    "added": lambda path: (path / "notes.txt").touch(),
    "added pickle": lambda path: (path / "common.pt").touch(),
    "dropped": lambda path: (path / "rank-00001.safetensors").unlink(),
    "dropped index": lambda path: (path / "index.json").unlink(),
    "dropped manifest": lambda path: (path / "manifest.json").unlink(),
    "dropped digest": lambda path: (path / "manifest.sha256").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_seen(intact: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(intact, tmp_path / "copy")
    path = tmp_path / "copy" / "step-000020"
    verify(path)
    DAMAGES[damage](path)
    with pytest.raises(ArtifactError) as caught:
        verify(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert checkpoint.newest_intact(path.parent, before=20) == path.with_name("step-000010")


@pytest.mark.parametrize(
    "point", ["save.part.created", "save.manifest.written", "save.part.synced"]
)
def test_a_kill_before_the_first_name_is_a_start(point: str, tmp_path: Path) -> None:
    assert first_save_killed(tmp_path, point) is None


def test_a_kill_between_the_first_name_and_its_directory_is_a_start(tmp_path: Path) -> None:
    assert first_save_killed(tmp_path, "save.latest.written") is None
    assert (tmp_path / "latest").read_text() == "step-000002"


def first_save_killed(directory: Path, point: str) -> Path | None:
    def save() -> int:
        fault_points.install(fault_points.killer(point))
        manifest.prepare(directory / "step-000002.part")
        manifest.publish(directory / "step-000002.part", header={"step": 2}, files={})
        return 0

    assert os.WIFSIGNALED(in_a_child(save))
    return find_latest(directory)
