"""The driver's side of the student: all ranks are started together, and end together."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence

from mopd.config.cluster import DEVICE_NAMES
from mopd.config.schema import RunConfig
from mopd.environment import VISIBLE_DEVICES
from mopd.runtime.exits import Ending
from mopd.runtime.placement import Member, Slot
from mopd.runtime.ray.berths import resources
from mopd.runtime.ray.cluster import Reserved, node_addresses
from mopd.runtime.ray.rank import Place, RankJob, StudentRank
from mopd.runtime.ray.relay import Line
from mopd.runtime.ray.watched import Gone, Watched, value_of
from mopd.serving.address import LOOPBACK

MAIN_PAUSE_S = 0.25  # between two looks at what the main rank prints
FOLLOW_S = 10.0  # for the other ranks to end after the first one
LAST_WORDS_S = 5.0
# What a user sets for a run, and the actors' processes would not have from a cluster's start.
_PASSED = ("OMP_NUM_THREADS", "MOPD_VLLM_PYTHON", "MOPD_HOST_ADDRESS")

Print = Callable[[int, Line], None]


class Students:
    """The ranks of one student.

    Args:
        directory: what relative paths of the recipe are relative to.
        world: digest of the embedded world, for the summary.
    """

    def __init__(
        self,
        config: RunConfig,
        reserved: Sequence[Reserved],
        *,
        directory: str,
        world: str | None,
        key: str,
        show: Print,
    ) -> None:
        self._config = config
        self._directory = directory
        self._world = world
        self._key = key
        self._show = show
        self._members: list[tuple[Reserved, Member]] = sorted(
            ((one, member) for one in reserved for member in one.berth.ranks),
            key=lambda pair: pair[1].number,
        )
        self._places: list[Place] = []
        self._earlier: dict[str, list[int]] = {}
        self._first_end: float | None = None
        self.are_training = False
        self.watched: list[Watched[list[Line]]] = []

    @property
    def devices(self) -> dict[Slot, str]:
        """The id of each rank's accelerator; empty on the CPU."""
        return {
            member.slots[0]: place.devices[0]
            for (_, member), place in zip(self._members, self._places, strict=True)
            if place.devices
        }

    @property
    def processes(self) -> dict[str, list[str | int]]:
        """Address and process id of every rank."""
        return {f"rank {n}": [one.address, one.pid] for n, one in enumerate(self._places)}

    def gather(self) -> None:
        """Starts a process for every rank; `begin` makes them train.

        Raises:
            Gone: one died at once, or has no place to start.
        """
        section = self._config.ray
        self.are_training = False
        self._first_end = None
        self.watched = [
            Watched(
                f"rank {member.number}",
                one.start(StudentRank, resources(one.berth.device, 1), self._directory),
                pause_s=section.heartbeat_s if member.number else MAIN_PAUSE_S,
                silent_s=section.silent_s,
            )
            for one, member in self._members
        ]
        asked = [(one.name, one.actor.place.remote()) for one in self.watched]
        deadline = time.monotonic() + section.start_s
        try:
            self._places = [
                value_of(ref, name=n, timeout_s=max(0.0, deadline - time.monotonic()))
                for n, ref in asked
            ]
        except TimeoutError as error:
            raise Gone(
                f"not every rank was started within ray.start_s={section.start_s:g} s"
            ) from error

    def begin(self, urls: Mapping[str, tuple[str, ...]]) -> None:
        """All ranks go on from the newest checkpoint."""
        earlier = {address: tuple(pids) for address, pids in self._earlier.items()}
        for number, one in enumerate(self.watched):
            job = RankJob(
                config=self._config,
                world=self._world,
                urls=urls,
                key=self._key,
                environment=self._environment(number),
                earlier=earlier,
            )
            one.begin(one.actor.run.remote(job))
        self.are_training = True
        for place in self._places:
            self._earlier.setdefault(place.address, []).append(place.pid)

    def _environment(self, number: int) -> dict[str, str]:
        """As torchrun sets it for the rank."""
        here = self._places[number].address
        beside = [n for n, place in enumerate(self._places) if place.address == here]
        nodes = list(dict.fromkeys(place.address for place in self._places))
        alone = len(node_addresses()) == 1
        return {
            "RANK": str(number),
            "WORLD_SIZE": str(len(self._places)),
            "LOCAL_RANK": str(beside.index(number)),
            "LOCAL_WORLD_SIZE": str(len(beside)),
            "GROUP_RANK": str(nodes.index(here)),
            "MASTER_ADDR": LOOPBACK if alone else self._places[0].address,
            "MASTER_PORT": str(self._places[0].port),
            **self._devices_beside(beside),
            **{name: os.environ[name] for name in _PASSED if name in os.environ},
        }

    def _devices_beside(self, beside: Sequence[int]) -> dict[str, str]:
        """Ray shows each actor its own accelerator; under torchrun a rank sees those of all ranks
        of its node, and takes the one of its local rank."""
        ids = [one for number in beside for one in self._places[number].devices]
        kind = self._members[beside[0]][0].berth.device
        return {} if kind == "cpu" else {VISIBLE_DEVICES[DEVICE_NAMES[kind]]: ",".join(ids)}

    def poll(self) -> Ending | None:
        """Prints their news; how the run ended, once it has.

        Raises:
            Gone: a rank died; the others cannot go on.
        """
        endings = [one.result() for one in self.watched]
        for number, one in enumerate(self.watched):
            if endings[number] is None:
                self._print(number, one.look() or [])
        found = [ending for ending in endings if ending is not None]
        if not found:
            return None
        if self._first_end is None:
            self._first_end = time.monotonic()
        waited = time.monotonic() - self._first_end > FOLLOW_S
        is_over = len(found) == len(endings)
        if not is_over and (not waited or all(ending.code == 0 for ending in found)):
            return None
        self._last_words()
        known = [ending for ending in found if not ending.is_lost]
        if not known:
            raise Gone("the connection between the ranks broke")
        return next((ending for ending in known if ending.code), known[0])

    def _last_words(self) -> None:
        """What they printed since the last look."""
        for number, one in enumerate(self.watched):
            try:
                for lines in one.last_look(timeout_s=LAST_WORDS_S):
                    self._print(number, lines)
            except (Gone, TimeoutError):
                continue

    def _print(self, number: int, lines: Sequence[Line]) -> None:
        for line in lines:
            self._show(number, line)

    def stop(self) -> None:
        """They end after the step that is under way, with a checkpoint."""
        for one in self.watched:
            one.actor.stop.remote()

    @property
    def are_there(self) -> bool:
        """Whether `begin` may be called."""
        return bool(self.watched)

    def kill(self) -> None:
        """At once; `gather` and `begin` may follow."""
        for one in self.watched:
            one.kill()
        self.watched = []
        self.are_training = False
