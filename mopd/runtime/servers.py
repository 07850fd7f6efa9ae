"""The vLLM servers that a run starts for itself, each on the node that the plan puts it on."""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mopd.config.schema import RunConfig
from mopd.errors import ConfigError, MopdError
from mopd.runtime.nodes import (
    ADDRESS_VARIABLE,
    Engine,
    engines_of_node,
    listen_address,
    seat_of,
    visible_devices,
)
from mopd.runtime.reached import KEY_VARIABLE, filled
from mopd.runtime.replica import from_all, from_main
from mopd.runtime.served import FOLDER, IMPORTS, server_launch, started_sections
from mopd.serving.address import free_ports
from mopd.serving.launch import ServerProcess, close_all, importable

JOURNAL = "journal"
LOOK_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    """What each rank tells all others; only the first of a node has servers."""

    urls: Mapping[tuple[str, int], str] = field(default_factory=dict)  # by owner and number
    failure: str | None = None
    is_ready: bool = True


class Servers:
    """Empty until `start`, and on every rank but the first of a node; `close` is safe at any
    time."""

    def __init__(self, config: RunConfig) -> None:
        self.processes: list[ServerProcess] = []
        self._config = config
        self._sections = started_sections(config)
        self._engines: list[Engine] = []  # of `processes`
        self._problem: str | None = None  # of this rank, until all are told in `reach`
        self._where = ""
        self._key = ""
        self._closed = threading.Event()

    def start(self, directory: Path, *, device: str) -> None:
        """Starts this node's share, by its first rank, and does not wait.

        Collective over all ranks. What goes wrong here is raised by `reach`, on every rank.

        Args:
            directory: of the run.
            device: cpu, cuda or npu.
        """
        if not self._sections:
            return
        self._key = from_main(secrets.token_urlsafe(32))
        try:
            self._start(directory / FOLDER, device=device)
        except (MopdError, OSError) as error:
            self._problem = str(error)

    def _start(self, folder: Path, *, device: str) -> None:
        seat = seat_of(os.environ)
        if seat.num_nodes > 1:
            self._where = f" (on node {seat.node})"
        if not seat.is_first:
            return
        self._engines = engines_of_node(
            self._config,
            self._sections,
            seat,
            device=device,
            visible=lambda: visible_devices(
                os.environ, device, count=torch.get_device_module(device).device_count
            ),
        )
        if not self._engines:
            return
        host = listen_address(seat, os.environ)
        try:
            ports = free_ports(len(self._engines), host=host)
        except OSError as error:
            raise ConfigError(
                f"{ADDRESS_VARIABLE}: {host} is no address of this host ({error}); correct it"
            ) from error
        # of each node its own: they may have mopd at different places
        imports = importable(folder / IMPORTS / str(seat.node))
        launches = [
            server_launch(
                self._config,
                engine,
                host=host,
                port=port,
                key=self._key,
                folder=folder,
                imports=imports,
            )
            for engine, port in zip(self._engines, ports, strict=True)
        ]
        self.processes += [ServerProcess(launch, _say) for launch in launches]

    def reach(self) -> RunConfig:
        """The recipe with their URLs and the name of their key, once all were healthy.

        Collective over all ranks.

        Raises:
            ConfigError: on any node a server could not be started, ended while it was starting, or
                is not healthy in time.
        """
        if not self._sections:
            return self._config
        while True:
            states = from_all(self._state())
            if failure := next((one.failure for one in states if one.failure), None):
                raise ConfigError(failure)
            if all(one.is_ready for one in states):
                break
            self._closed.wait(LOOK_S)
        os.environ[KEY_VARIABLE] = self._key
        urls = {key: url for one in states for key, url in one.urls.items()}
        return filled(
            self._config,
            {
                owner: tuple(urls[owner, number] for number in range(section.server.replicas))
                for owner, section in self._sections.items()
            },
        )

    def _state(self) -> _State:
        failure = self._problem or next(self._failures(), None)
        if failure is not None:
            return _State(failure=failure + self._where)
        started = list(zip(self._engines, self.processes, strict=True))
        return _State(
            urls={(engine.owner, engine.number): one.url for engine, one in started},
            is_ready=all(process.was_healthy for process in self.processes),
        )

    def _failures(self) -> Iterator[str]:
        for process in self.processes:
            if process.failure is not None:
                yield process.failure
            start_s = self._sections[process.launch.owner].start_s
            if not process.was_healthy and process.seconds > start_s:
                yield (
                    f"{process.launch.key}: its vLLM server is not healthy after {start_s:g} s; "
                    f"raise {process.launch.key}.start_s, or see {process.launch.log}"
                )

    def close(self) -> None:
        """Ends the servers and everything that they started."""
        self._closed.set()
        close_all(self.processes)
        if self._key and os.environ.get(KEY_VARIABLE) == self._key:
            os.environ.pop(KEY_VARIABLE)


def is_failed_start(directory: Path) -> bool:
    """Whether a run's directory holds nothing, or no more than a start that failed leaves there:
    logs of servers and what they import, journals without a line."""
    for path in directory.rglob("*"):
        top, *below = path.relative_to(directory).parts
        if path.is_dir() or (top == FOLDER and below[:1] == [IMPORTS]):
            known = top in (FOLDER, JOURNAL)
        elif top == JOURNAL:
            known = path.stat().st_size == 0
        else:
            known = path.parent == directory / FOLDER and path.suffix in (".log", ".json")
        if not known:
            return False
    return True


def _say(message: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads any more, and restarts go on
        print(message, flush=True)
