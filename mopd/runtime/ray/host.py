"""The engines of one berth as an actor: transformers in its process, vLLM as its children."""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mopd.config.cluster import DEVICE_NAMES, DeviceKind
from mopd.config.pools import ROLLOUT, backends_of
from mopd.config.schema import RunConfig
from mopd.environment import VISIBLE_DEVICES
from mopd.errors import ConfigError, MopdError
from mopd.runtime.exits import Ending, ending_of
from mopd.runtime.nodes import Engine
from mopd.runtime.ray.rank import Place, enter, place, wait_until_gone
from mopd.runtime.ray.relay import Line, Printed
from mopd.runtime.served import FOLDER, IMPORTS, server_launch
from mopd.serving.address import held_ports
from mopd.serving.launch import ServerProcess, importable
from mopd.serving.lease import DeviceLease, lease_path

if TYPE_CHECKING:
    from mopd.serving.score_server import ScoreServer

GLANCE_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class HostEngine:
    """One replica."""

    owner: str  # rollout, teachers.math
    number: int
    port: int
    devices: tuple[int, ...]  # indices among the host's


@dataclass(frozen=True, slots=True, kw_only=True)
class HostJob:
    """What a host has to know. ``address`` is what its engines bind to."""

    config: RunConfig
    run_directory: Path
    address: str
    key: str = field(repr=False)
    device: DeviceKind
    devices: tuple[str, ...]  # ids of its accelerators; empty on the CPU
    engines: tuple[HostEngine, ...]
    pool: str | None  # whose lease its engines take turns with
    earlier: tuple[int, ...]  # processes of hosts that were here before


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """Of a host since the last look."""

    lines: list[Line]
    is_ready: bool  # all of its engines answered once


class EngineHost:
    """``serve`` blocks; the other methods answer beside it."""

    def __init__(self, directory: str) -> None:
        self._printed = Printed()
        self._directory = directory
        self._closed = threading.Event()
        self._ready = threading.Event()
        self._held = ExitStack()

    def settle(self, address: str | None, count: int) -> tuple[Place, str, tuple[int, ...]]:
        """Where it is, what its engines bind to (None: its node's address), and as many free ports.

        They stay free until the engines listen, which have to load their models first: ranks and
        other hosts are looking for ports meanwhile.
        """
        here = place(self._held)
        bound = address or here.address
        return here, bound, tuple(self._held.enter_context(held_ports(count, host=bound)))

    def serve(self, job: HostJob) -> Ending:
        """Until `close`; an engine that cannot be started, or stays away, ends it early."""
        wait_until_gone(job.earlier)
        return ending_of(lambda: self._serve(job))

    def _serve(self, job: HostJob) -> None:
        enter(self._directory)
        if job.device != "cpu":
            os.environ[VISIBLE_DEVICES[DEVICE_NAMES[job.device]]] = ",".join(job.devices)
        with ExitStack() as opened:
            children: list[ServerProcess] = []
            for engine in job.engines:
                if backends_of(job.config)[engine.owner].type == "hf":
                    opened.callback(_transformers(job, engine).close)
                else:
                    child = _vllm(job, engine)
                    opened.callback(child.close)
                    children.append(child)
            while not self._closed.wait(GLANCE_S):
                if all(child.was_healthy for child in children):
                    self._ready.set()
                for child in children:
                    if child.failure is not None:
                        raise _failed(child.failure, was_ready=self._ready.is_set())

    def news(self) -> News:
        return News(lines=self._printed.take(), is_ready=self._ready.is_set())

    def close(self) -> None:
        """Ends its engines; `serve` returns when they are gone."""
        self._closed.set()


def _failed(failure: str, *, was_ready: bool) -> MopdError:
    return MopdError(failure) if was_ready else ConfigError(failure)


def _transformers(job: HostJob, engine: HostEngine) -> ScoreServer:
    """A server around a model in this process."""
    from mopd.device import get_device
    from mopd.serving.hf_server import open_server

    config, samples = job.config, engine.owner == ROLLOUT
    teacher = config.teachers.get(engine.owner.partition(".")[2])
    model = config.student.model if teacher is None else teacher.model
    server = open_server(
        Path(str(model)),
        host=job.address,
        port=engine.port,
        token=job.key,
        device=get_device(DEVICE_NAMES[job.device]).device(next(iter(engine.devices), 0)),
        samples=samples,
        scores=not samples,
        lease=_lease(job, engine),
    )
    server.start()
    print(f"transformers for {engine.owner} at {server.url}")
    return server


def _lease(job: HostJob, engine: HostEngine) -> DeviceLease | None:
    if job.pool is None:
        return None
    path = lease_path(job.run_directory, job.pool)
    return DeviceLease(path, owner=f"{engine.owner} {engine.number}")


def _vllm(job: HostJob, engine: HostEngine) -> ServerProcess:
    """A server of its own that this process watches."""
    folder = job.run_directory.absolute() / FOLDER
    names = ",".join(job.devices[index] for index in engine.devices) if job.devices else None
    launch = server_launch(
        job.config,
        Engine(
            owner=engine.owner,
            number=engine.number,
            device=DEVICE_NAMES[job.device],
            devices=names,
            # Ray hides no accelerator from an actor that has none
            hides_devices=job.device == "cpu",
        ),
        host=job.address,
        port=engine.port,
        key=job.key,
        folder=folder,
        imports=importable(folder / IMPORTS / job.address),
    )
    return ServerProcess(launch, _say)


def _say(message: str) -> None:
    print(message, flush=True)
