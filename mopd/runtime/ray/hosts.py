"""The driver's side of the engines: started, watched, started again at the same addresses."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from mopd.config.pools import backends_of, shared_pool_of
from mopd.config.schema import RunConfig
from mopd.errors import ConfigError, MopdError
from mopd.runtime.exits import Ending
from mopd.runtime.placement import Slot
from mopd.runtime.ray.berths import RESOURCES, resources
from mopd.runtime.ray.cluster import Reserved, node_addresses
from mopd.runtime.ray.host import EngineHost, HostEngine, HostJob, News
from mopd.runtime.ray.rank import Place
from mopd.runtime.ray.watched import Gone, Watched, is_done, value_of
from mopd.serving.address import LOOPBACK, base_url

NEWS_PAUSE_S = 1.0
CLOSE_S = 30.0
LAST_WORDS_S = 5.0

Say = Callable[[str], None]


class Moved(MopdError):
    """Engines came back at other addresses than the student knows."""


@dataclass(slots=True)
class _Host:
    """One berth's engines."""

    reserved: Reserved
    name: str
    watched: Watched[News] | None = None
    settling: Any = None  # the answer of an actor that is starting
    began: float = 0.0
    address: str = ""
    ports: tuple[int, ...] = ()
    pids: list[int] = field(default_factory=list)
    restarts: int = 0
    is_ready: bool = False
    is_over: bool = False


class Hosts:
    """Every engine of a run.

    Args:
        directory: what relative paths of the recipe are relative to.
        devices: ids of the accelerators of the student's berths, by slot; engines that share them
            see these.
    """

    def __init__(
        self,
        config: RunConfig,
        reserved: Sequence[Reserved],
        *,
        directory: str,
        key: str,
        devices: Mapping[Slot, str],
        say: Say,
    ) -> None:
        self._config = config
        self._directory = directory
        self._key = key
        self._devices = devices
        self._say = say
        self._hosts = [
            _Host(one, ", ".join(dict.fromkeys(m.owner for m in one.berth.engines)))
            for one in reserved
            if one.berth.engines
        ]

    @property
    def watched(self) -> list[Watched[News]]:
        return [host.watched for host in self._hosts if host.watched is not None]

    @property
    def urls(self) -> dict[str, tuple[str, ...]]:
        """By owner, in the order of the replicas."""
        found: dict[str, dict[int, str]] = {}
        for host in self._hosts:
            for member, port in zip(host.reserved.berth.engines, host.ports, strict=True):
                url = base_url(host.address, port)
                found.setdefault(member.owner, {})[member.number] = url
        return {owner: tuple(urls[n] for n in sorted(urls)) for owner, urls in found.items()}

    @property
    def processes(self) -> dict[str, list[str | int]]:
        """Address and process id by what is in it."""
        return {
            f"{host.name} {number}": [host.address, host.pids[-1]]
            for number, host in enumerate(self._hosts)
            if host.pids
        }

    @property
    def are_placed(self) -> bool:
        """Whether `urls` has all of them; they may still be loading."""
        return all(host.ports and host.settling is None for host in self._hosts)

    def start(self) -> None:
        """Begins to start all of them side by side; `poll` goes on with it."""
        for host in self._hosts:
            self._spawn(host)

    def _spawn(self, host: _Host) -> None:
        actor = self._actor(host.reserved)
        silent_s = self._config.ray.silent_s
        host.watched = Watched(host.name, actor, pause_s=NEWS_PAUSE_S, silent_s=silent_s)
        # the loopback where no other node has to reach it
        address = LOOPBACK if len(node_addresses()) == 1 else None
        count = len(host.reserved.berth.engines)
        host.settling, host.began = actor.settle.remote(address, count), time.monotonic()
        host.watched.begin(host.settling)
        host.is_ready = False

    def _settle(self, host: _Host, watched: Watched[News]) -> None:
        """Goes on with an actor once it is there: at the address that it had before, if it can."""
        start_s = self._config.ray.start_s
        if not is_done(host.settling):
            if time.monotonic() - host.began > start_s:
                raise MopdError(f"{host.name}: was not started within ray.start_s={start_s:g} s")
            return
        place, address, ports = value_of(host.settling, name=host.name)
        host.settling = None
        has_moved = host.address not in ("", address)
        if address != host.address:
            host.address, host.ports = address, ports
        watched.begin(watched.actor.serve.remote(self._job(host, place)))
        host.pids.append(place.pid)
        if has_moved:
            raise Moved(f"{host.name} is on another node now")

    def _actor(self, reserved: Reserved) -> Any:
        berth = reserved.berth
        beside = bool(berth.ranks)  # whose devices they take turns with
        has = {} if beside else resources(berth.device, len(berth.slots))
        return reserved.start(EngineHost, has, self._directory)

    def _job(self, host: _Host, place: Place) -> HostJob:
        berth, config = host.reserved.berth, self._config
        devices = place.devices
        if berth.ranks and RESOURCES[berth.device] is not None:
            devices = tuple(self._devices[slot] for slot in berth.slots)
        shared = {shared_pool_of(config, member.owner) for member in berth.engines}
        engines = tuple(
            HostEngine(
                owner=member.owner,
                number=member.number,
                port=port,
                devices=tuple(berth.slots.index(slot) for slot in member.slots),
            )
            for member, port in zip(berth.engines, host.ports, strict=True)
        )
        return HostJob(
            config=config,
            run_directory=Path(config.run.dir) / config.run.name,
            address=host.address,
            key=self._key,
            device=berth.device,
            devices=devices,
            engines=engines,
            pool=next(iter(shared)),
            earlier=tuple(host.pids),
        )

    def poll(self) -> None:
        """Prints their news, and starts again whoever died.

        Raises:
            ConfigError: the recipe does not let one be started.
            MopdError: one does not start.
            Moved: one came back on another node.
        """
        for host in self._hosts:
            if host.watched is None or host.is_over:
                continue
            try:
                if host.settling is None:
                    self._look(host, host.watched)
                else:
                    self._settle(host, host.watched)
            except Gone as error:
                self._again(host, str(error))
            except RayError as error:  # a mistake of ours inside the actor
                self._say(str(error))  # where it was made
                if not host.is_ready:
                    raise MopdError(f"{host.name}: cannot start: {_last_line(error)}") from error
                self._again(host, f"{host.name} failed: {_last_line(error)}")

    def _look(self, host: _Host, watched: Watched[News]) -> None:
        if is_done(watched.work):
            ending: Ending = watched.result()
            host.is_over = True
            with contextlib.suppress(Gone, TimeoutError):
                for last in watched.last_look(timeout_s=LAST_WORDS_S):
                    self._tell(host, last)
            if ending.code == 2:
                raise ConfigError(ending.message.removeprefix("error: "))
            self._say(f"{host.name}: {ending.message or 'ended'}")
            return
        news = watched.look()
        if news is None:
            return
        self._tell(host, news)
        if news.is_ready and not host.is_ready:
            host.is_ready = True
            self._say(f"{host.name}: ready")

    def _tell(self, host: _Host, news: News) -> None:
        for _, line in news.lines:
            self._say(line if host.name in line else f"{host.name}: {line}")

    def _again(self, host: _Host, why: str) -> None:
        assert host.watched is not None
        host.watched.kill()
        owners = {member.owner for member in host.reserved.berth.engines}
        backends = backends_of(self._config)
        most = max(backends[owner].server.max_restarts for owner in owners)
        if host.restarts == most:
            host.is_over, host.watched, host.settling = True, None, None
            key = sorted(owners)[0]
            why = f"{why} and stays away after {most} restarts"
            why = f"{why}; see {key}.backend.server.max_restarts"
            if not host.ports:
                raise MopdError(why)
            self._say(why)
            return
        host.restarts += 1
        self._say(f"{why}: starting it again, {host.restarts} of {most}")
        self._spawn(host)

    def close(self) -> None:
        """They end what they started before they are ended themselves."""
        serving = [host.watched for host in self._hosts if host.watched and host.settling is None]
        alive = [one for one in serving if not is_done(one.work)]
        try:
            for one in alive:
                one.actor.close.remote()
            if alive:
                ray.wait([one.work for one in alive], num_returns=len(alive), timeout=CLOSE_S)
        finally:
            for one in self.watched:
                one.kill()


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
