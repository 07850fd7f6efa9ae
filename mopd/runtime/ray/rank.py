"""One rank of the student as an actor: the same session as under torchrun."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

import psutil
import ray

from mopd.config.schema import RunConfig
from mopd.errors import ConfigError
from mopd.runtime.exits import Ending, ending_of
from mopd.runtime.ray.relay import Line, Printed
from mopd.serving.address import held_ports

GONE_S = 20.0  # for processes of an earlier try to disappear


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where an actor's process is."""

    address: str  # of its node
    pid: int
    devices: tuple[str, ...]  # ids of the accelerators that Ray gave it
    port: int  # kept free for this process


@dataclass(frozen=True, slots=True, kw_only=True)
class RankJob:
    """What one rank has to know."""

    config: RunConfig
    world: str | None
    urls: Mapping[str, tuple[str, ...]]
    key: str = field(repr=False)
    environment: Mapping[str, str]  # as torchrun sets it
    earlier: Mapping[str, tuple[int, ...]]  # by node: processes of an earlier try


class StudentRank:
    """``run`` blocks; the other methods answer beside it."""

    def __init__(self, directory: str) -> None:
        self._printed = Printed()
        self._directory = directory
        self._stop = threading.Event()
        self._held = ExitStack()

    def place(self) -> Place:
        return place(self._held)

    def run(self, job: RankJob) -> Ending:
        """Trains to the end, or to the first trouble."""
        # before torch is imported
        os.environ.update(job.environment)
        wait_until_gone(job.earlier.get(ray.util.get_node_ip_address(), ()))
        return ending_of(lambda: self._train(job))

    def _train(self, job: RankJob) -> None:
        enter(self._directory)
        from mopd.runtime.reached import GivenServers
        from mopd.runtime.session import run_session

        run_session(
            job.config,
            world=job.world,
            servers=GivenServers(job.config, job.urls, key=job.key),
            stop_asked=self._stop.is_set,
        )

    def stop(self) -> None:
        """Ends after the step that is under way, with a checkpoint."""
        self._stop.set()

    def news(self) -> list[Line]:
        """What was printed since the last call."""
        return self._printed.take()


def place(held: ExitStack) -> Place:
    """Of this process; its port is kept until ``held`` is closed, or the process ends."""
    (port,) = held.enter_context(held_ports(1, host=""))  # of all addresses
    given = ray.get_runtime_context().get_accelerator_ids()
    devices = next((ids for ids in given.values() if ids), [])
    return Place(
        address=ray.util.get_node_ip_address(),
        pid=os.getpid(),
        devices=tuple(map(str, devices)),
        port=port,
    )


def wait_until_gone(pids: tuple[int, ...]) -> None:
    """They write to the same files until they are dead, which a kill does not wait for."""
    deadline = time.monotonic() + GONE_S
    while any(_runs(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def enter(directory: str) -> None:
    """Relative paths of a recipe mean the driver's folder.

    Raises:
        ConfigError: this node does not have it.
    """
    try:
        os.chdir(directory)
    except OSError as error:
        raise ConfigError(
            f"launcher: {directory} is not on every node ({error.strerror}); start from a shared "
            "folder"
        ) from error
