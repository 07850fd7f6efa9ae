"""The driver: starts, watches and restarts the ranks and engines of one run."""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from mopd.config.schema import RunConfig
from mopd.errors import MopdError
from mopd.metrics.text import replace_file
from mopd.runtime.exits import Ending
from mopd.runtime.placement import Plan, place
from mopd.runtime.ray.berths import RESOURCES
from mopd.runtime.ray.cluster import check_version, device_of, join, refuse_open_cluster, reserve
from mopd.runtime.ray.hosts import Hosts, Moved
from mopd.runtime.ray.relay import Line
from mopd.runtime.ray.students import Students
from mopd.runtime.ray.watched import Gone, wait_for_news
from mopd.runtime.served import FOLDER
from mopd.runtime.signals import STOPPED, Interrupt

LOOK_S = 0.5
PROCESSES = "processes.json"  # beside the engines' logs: address and process of every actor


def drive(config: RunConfig, address: str, *, world: str | None, is_own: bool) -> Ending:
    """One run on the cluster at ``address``; ``is_own``: nobody else can reach it.

    Raises:
        ConfigError: the cluster cannot be joined, or has not what the plan asks for.
    """
    check_version()
    with _joined(address):
        if not is_own:
            refuse_open_cluster(config, address)
        plan = _place(config)
        _say(_described(plan))
        with reserve(plan, start_s=config.ray.start_s) as reserved, Interrupt() as interrupt:
            driver = _Driver(config, world, reserved)
            try:
                return driver.run(interrupt)
            finally:
                driver.close()


@contextmanager
def _joined(address: str) -> Iterator[None]:
    join(address)
    try:
        yield
    finally:
        ray.shutdown()


def _place(config: RunConfig) -> Plan:
    """The plan for the cluster that was joined; its size counts where the recipe names none."""
    device = device_of(config)
    name = RESOURCES[device]
    if config.cluster.num_devices_per_node is None and name is not None:
        counts = [int(node["Resources"].get(name, 0)) for node in ray.nodes() if node["Alive"]]
        counts = [count for count in counts if count]
        if counts:  # else `reserve` says what is not there
            cluster = config.cluster.model_copy(
                update={"num_nodes": len(counts), "num_devices_per_node": min(counts)}
            )
            config = config.model_copy(update={"cluster": cluster})
    return place(config, device=device)


def _described(plan: Plan) -> str:
    parts = []
    for pool in plan.pools:
        owners = ", ".join(dict.fromkeys(member.owner for member in pool.members))
        shared = " in turns" if pool.shared else ""
        parts.append(f"{pool.name} ({len(pool.slots)} {pool.device}: {owners}{shared})")
    return "ray: " + "; ".join(parts)


class _Driver:
    """The parts of one run on reserved devices."""

    def __init__(self, config: RunConfig, world: str | None, reserved: list[Any]) -> None:
        key = secrets.token_urlsafe(32)
        directory = os.getcwd()
        self._config = config
        self._students = Students(
            config, reserved, directory=directory, world=world, key=key, show=_show
        )
        self._reserved = reserved
        self._directory = directory
        self._key = key
        self._hosts: Hosts | None = None
        self._restarts = 0
        self._noted: dict[str, list[str | int]] = {}

    def run(self, interrupt: Interrupt) -> Ending:
        """Until the student ended for good."""
        told = False
        while True:
            interrupt.check()
            if interrupt.is_stopping and not self._students.are_training:
                said = "stopped before it trained; the same command continues"
                return Ending(code=STOPPED, message=said, is_error=False)
            if interrupt.is_stopping and not told:
                told = True
                self._students.stop()
            try:
                ending = self._look()
            except (Gone, Moved) as error:
                if interrupt.is_stopping:
                    return Ending(code=1, message=f"error: {error} while it was told to stop")
                self._again(str(error))
                continue
            if ending is not None:
                return ending
            engines = [] if self._hosts is None else self._hosts.watched
            wait_for_news([*self._students.watched, *engines], seconds=LOOK_S)

    def _look(self) -> Ending | None:
        """One round: starts what is missing; how the run ended, once it has.

        Raises:
            Gone, Moved: all ranks have to start again.
        """
        students = self._students
        if not students.are_there:
            students.gather()
        if self._hosts is None:  # whose devices engines may share
            self._hosts = self._started()
        self._hosts.poll()
        if self._hosts.are_placed and not students.are_training:
            students.begin(self._hosts.urls)
        self._note_processes(self._hosts)
        return students.poll()

    def _started(self) -> Hosts:
        hosts = Hosts(
            self._config,
            self._reserved,
            directory=self._directory,
            key=self._key,
            devices=self._students.devices,
            say=_say,
        )
        hosts.start()
        return hosts

    def _note_processes(self, hosts: Hosts) -> None:
        """For people, and for whoever looks from outside."""
        now = self._students.processes | hosts.processes
        if now != self._noted:
            path = Path(self._config.run.dir) / self._config.run.name / FOLDER / PROCESSES
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, json.dumps(now, indent=1) + "\n")
            self._noted = now

    def _again(self, why: str) -> None:
        """All ranks, from the last checkpoint: a collective needs every one of them."""
        self._students.kill()
        if self._restarts == self._config.ray.max_restarts:
            raise MopdError(
                f"student: {why}, after {self._restarts} restarts (ray.max_restarts); the same "
                "command continues from the last checkpoint"
            )
        self._restarts += 1
        _say(
            f"student: {why}: all ranks start again from the last checkpoint, "
            f"{self._restarts} of {self._config.ray.max_restarts}"
        )

    def close(self) -> None:
        try:
            self._students.kill()
        finally:
            if self._hosts is not None:
                self._hosts.close()


def _say(message: str) -> None:
    print(message, flush=True)


def _show(rank: int, line: Line) -> None:
    """The main rank speaks for the run; the others say who they are."""
    is_error, text = line
    if text.strip():
        print(
            text if rank == 0 else f"rank {rank}: {text}",
            file=sys.stderr if is_error else sys.stdout,
            flush=True,
        )
