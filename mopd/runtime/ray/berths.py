"""What Ray has to keep free for a plan: one bundle per berth. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mopd.config.cluster import DeviceKind
from mopd.config.pools import STUDENT
from mopd.runtime.placement import Member, Plan, Pool, Slot

RESOURCES: dict[DeviceKind, str | None] = {"gpu": "GPU", "npu": "NPU", "cpu": None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Berth:
    """Devices of one node that are reserved, and moved, together.

    The ranks of one node share a berth, so that a tensor-parallel group cannot be torn apart; so do
    the engines of a shared pool on one node. Any other engine has its own.
    """

    pool: str
    device: DeviceKind
    slots: tuple[Slot, ...]
    members: tuple[Member, ...]

    @property
    def bundle(self) -> dict[str, float]:
        """Ray's resources. Every device comes with one processor."""
        return resources(self.device, len(self.slots))

    @property
    def ranks(self) -> tuple[Member, ...]:
        return tuple(one for one in self.members if one.kind == "rank")

    @property
    def engines(self) -> tuple[Member, ...]:
        return tuple(one for one in self.members if one.kind == "engine")


def resources(device: DeviceKind, count: int) -> dict[str, float]:
    """Of so many devices."""
    name = RESOURCES[device]
    return {"CPU": float(count)} | ({} if name is None else {name: float(count)})


def berths_of(pool: Pool) -> list[Berth]:
    """In order of their nodes."""
    return list(_shared(pool) if pool.shared or pool.name == STUDENT else _apart(pool))


def _shared(pool: Pool) -> Iterator[Berth]:
    for node in sorted({slot.node for slot in pool.slots}):
        members = tuple(one for one in pool.members if one.slots[0].node == node)
        used = sorted({slot for one in members for slot in one.slots})
        if members:
            yield Berth(pool=pool.name, device=pool.device, slots=tuple(used), members=members)


def _apart(pool: Pool) -> Iterator[Berth]:
    for one in pool.members:
        yield Berth(pool=pool.name, device=pool.device, slots=one.slots, members=(one,))


def asked(plan: Plan) -> dict[str, float]:
    """Ray's resources of the whole plan."""
    total: dict[str, float] = {}
    for pool in plan.pools:
        for berth in berths_of(pool):
            for name, count in berth.bundle.items():
                total[name] = total.get(name, 0.0) + count
    return total
