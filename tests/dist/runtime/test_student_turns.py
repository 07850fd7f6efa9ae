"""The student's ranks and an engine on one lease: no rank computes while the engine does."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from mopd.config.schema import RunConfig
from mopd.errors import MopdError
from mopd.runtime import student_turns
from mopd.runtime.student_turns import StudentTurns
from mopd.serving.lease import DeviceLease, lease_path
from mopd.serving.turns import Turns
from mopd.student.away import StudentState
from tests.dist.student import worlds
from tests.dist.student.worlds import Layout, Run, step_batch
from tests.helpers.dist import RankError, run_ranks

BACKEND = {"type": "vllm", "server": {"python": "never-started"}}


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(worlds.make_model("llama", tmp_path_factory.mktemp("turns") / "llama"))


def recipe(*, shared: bool) -> RunConfig:
    return RunConfig.model_validate(
        {
            "student": {"model": "s"},
            "teachers": {"a": {"model": "a", "pool": "student", "backend": BACKEND}},
            "pools": {"student": {"shared": shared}},
        }
    )


def begun(run: Run, directory: Path, *, shared: bool) -> tuple[StudentTurns, Callable[[int], None]]:
    """Turns of a student that is built, and one step of its training."""
    turns = StudentTurns(recipe(shared=shared), directory=directory)
    student = worlds.build(run)
    turns.begin(StudentState(student.model, student.optimizer), student.model.topology)

    def step(number: int) -> None:
        dp_rank = student.model.topology.dp_rank
        student.train_step(step_batch(number, run=run, dp_rank=dp_rank))

    return turns, step


def train_beside_an_engine(run: Run, directory: Path) -> tuple[int, int]:
    """How often the engine of rank 0 came to the devices, and how often a rank met it there."""
    on_device, moves, met, end = directory / "engine", [], 0, threading.Event()
    turns, step = begun(run, directory, shared=True)
    thread = engine = None
    if os.environ["RANK"] == "0":

        def load() -> None:
            moves.append("load")
            on_device.touch()

        lease = DeviceLease(lease_path(directory, "student"), owner="teachers.a")
        engine = Turns(lease, load=load, release=on_device.unlink, quantum_s=0.02, linger_s=0.0)

        def keep_asking() -> None:
            while not end.is_set():
                with engine.turn():
                    end.wait(0.005)

        thread = threading.Thread(target=keep_asking)
        thread.start()
    for number in range(6):
        with turns.turn(), turns.turn():
            met += on_device.exists()
            step(number)
            met += on_device.exists()
        dist.barrier()  # as a rank that waits for answers
    end.set()
    if thread is not None and engine is not None:
        thread.join()
        engine.close()
    turns.close()
    return len(moves), met


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(dp=2)], ids=["tp2", "dp2"])
def test_ranks_and_an_engine_never_have_the_devices_together(
    llama: str, tmp_path: Path, layout: Layout
) -> None:
    run = Run(model_dir=llama, layout=layout)
    (came, met), (_, met_too) = run_ranks(train_beside_an_engine, 2, run, tmp_path)
    assert met == met_too == 0 and came >= 3


def wait_for_a_holder(run: Run, directory: Path) -> None:
    turns, _ = begun(run, directory, shared=True)
    student_turns.WAIT_S = 0.2
    other = DeviceLease(lease_path(directory, "student"), owner="teachers.a")
    if os.environ["RANK"] == "0":
        other.acquire(wait_s=10.0)
    dist.barrier()
    try:
        with turns.turn():
            raise AssertionError("somebody else has the devices")
    except MopdError as error:
        raise MopdError(f"rank {os.environ['RANK']}: {error}") from error
    finally:
        student_turns.WAIT_S = 540.0
        other.release()


def test_every_rank_says_that_the_devices_did_not_come_free(llama: str, tmp_path: Path) -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(wait_for_a_holder, 2, Run(model_dir=llama, layout=Layout(tp=2)), tmp_path)
    text = str(caught.value)
    assert "rank 0: student: waited 0.2 s" in text and "teachers.a (process" in text
    assert "rank 1: pools.student.shared: another rank has no turn" in text


def train_alone(run: Run, directory: Path) -> list[bool]:
    turns, step = begun(run, directory, shared=False)
    with turns.turn():
        step(0)
    turns.close()
    return [lease_path(directory, "student").exists(), turns._lease is not None]


def test_without_a_shared_pool_there_is_no_lease(llama: str, tmp_path: Path) -> None:
    assert run_ranks(train_alone, 1, Run(model_dir=llama), tmp_path) == [[False, False]]
