"""Which rank and which engine sits on which device: a pure function of the recipe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mopd.config.cluster import DeviceKind
from mopd.config.pools import ROLLOUT, STUDENT, backends_of, pools_of, teacher_owner
from mopd.config.schema import RunConfig
from mopd.errors import ConfigError
from mopd.runtime.demand import Demand, demands
from mopd.runtime.packing import cuts, first_fit
from mopd.runtime.refusal import refusal


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Slot:
    """One device: accelerator ``index`` of ``node``, or a share of its processors."""

    node: int
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A rank of the student, or an engine (one replica) of a sampler or a teacher."""

    owner: str  # student, rollout, teachers.math
    kind: Literal["rank", "engine"]
    number: int  # among the members of its owner
    slots: tuple[Slot, ...]  # all on one node


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Members of a shared pool lie on the same slots."""

    name: str
    device: DeviceKind
    shared: bool
    slots: tuple[Slot, ...]
    members: tuple[Member, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The student's pool comes first."""

    num_nodes: int
    num_devices_per_node: int
    pools: tuple[Pool, ...]
    inside: tuple[str, ...]  # owners in the student's processes
    reached: tuple[str, ...]  # owners at URLs
    notes: tuple[str, ...]  # what is unusual, a sentence each

    def members(self, owner: str) -> tuple[Member, ...]:
        """In order of their numbers."""
        found = [one for pool in self.pools for one in pool.members if one.owner == owner]
        return tuple(sorted(found, key=lambda one: one.number))


def place(config: RunConfig, *, world_size: int | None = None, device: DeviceKind) -> Plan:
    """Who sits where. A pure function: no file, no environment, no randomness.

    The student comes first, its tensor-parallel groups node by node; then engines, wider ones
    first, each on the first node with room. The engines of one owner in a shared pool lie on the
    pool's devices from the first on. Pools on processors (`device: cpu`) of a cluster of
    accelerators take none of them.

    Args:
        world_size: the ranks that torchrun started, as many on each node; None takes
            `pools.student.num_devices`, else one replica of the student.
        device: what `run.device` means here.
    Raises:
        ConfigError: it does not fit: what is asked for, what there is, and what would fit.
    """
    wanted = demands(config, world_size=world_size, device=device)
    own = [one for one in wanted if one.device == device]
    beside = [one for one in wanted if one.device != device]
    space = _Space(
        num_nodes=config.cluster.num_nodes,
        even=world_size is not None,
        prefers_even=config.launcher == "torchrun",
    )
    per_node = config.cluster.num_devices_per_node
    _check_even(own[0], space)
    if per_node is None:
        per_node, pools = _smallest_nodes(own, space)
    else:
        _check_widths(own, per_node)
        pools = _lay(own, space, per_node)
        if pools is None:
            _check_torn(own[0], space, per_node)
            devices = per_node  # of a node; a name that stays an int
            raise ConfigError(
                refusal(
                    own,
                    num_nodes=space.num_nodes,
                    per_node=devices,
                    device=device,
                    fits=lambda some, n: (
                        _lay(some, replace(space, num_nodes=n), devices) is not None
                    ),
                )
            )
    pools |= _on_processors(beside, space.num_nodes)
    inside, reached = _elsewhere(config)
    return Plan(
        num_nodes=space.num_nodes,
        num_devices_per_node=per_node,
        pools=tuple(pools[one.name] for one in wanted),
        inside=inside,
        reached=reached,
        notes=tuple(_notes(config, wanted, space.num_nodes * per_node, device)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Space:
    num_nodes: int
    even: bool  # as many of the student's ranks on each node
    prefers_even: bool  # so, too, where that is possible

    def ranks_per_node(self, student: Demand) -> int | None:
        """None: node by node, as many as go there."""
        per_node, rest = divmod(student.num_devices, self.num_nodes)
        possible = rest == 0 and per_node % student.groups[0].width == 0
        return per_node if possible and (self.even or self.prefers_even) else None


def _check_even(student: Demand, space: _Space) -> None:
    if not space.even or space.ranks_per_node(student) is not None:
        return
    tp, ranks = student.groups[0].width, student.num_devices
    raise ConfigError(
        f"cluster.num_nodes={space.num_nodes}: {ranks} ranks in tensor-parallel groups of {tp}, "
        "which stay on one node each, do not sit evenly on them; start a multiple of "
        f"{tp * space.num_nodes} ranks, or set student.parallel.tensor_model_parallel_size or "
        "cluster.num_nodes lower"
    )


def _check_widths(wanted: Sequence[Demand], per_node: int) -> None:
    for group in (group for demand in wanted for group in demand.groups):
        if group.width > per_node:
            what = "a tensor-parallel group" if group.owner == STUDENT else "an engine"
            raise ConfigError(
                f"{group.key}={group.width}: {what} stays on one node, and "
                f"cluster.num_devices_per_node is {per_node}; lower it to {per_node} or less"
            )


def _check_torn(student: Demand, space: _Space, per_node: int) -> None:
    """Engines on the student's devices, of which a node has too few."""
    ranks, *engines = student.groups
    if _lay([replace(student, groups=(ranks,))], space, per_node) is None:
        return
    for group in engines:
        if _lay([replace(student, groups=(ranks, group))], space, per_node) is None:
            raise ConfigError(
                f"{group.key}={group.width}: an engine stays on one node, and the devices that "
                f"pools.{STUDENT} has there do not hold {group.count} of that width in all; lower "
                "it or replicas, or name another pool"
            )


def _smallest_nodes(wanted: Sequence[Demand], space: _Space) -> tuple[int, dict[str, Pool]]:
    """The least number of devices per node that will do, where the recipe names none."""
    total = sum(one.num_devices for one in wanted)
    least = max(g.width for one in wanted for g in one.groups)
    for per_node in range(max(least, -(-total // space.num_nodes)), total + 1):
        if (pools := _lay(wanted, space, per_node)) is not None:
            return per_node, pools
    _check_torn(wanted[0], space, total)
    raise AssertionError("everything else fits on the first node")


def _lay(wanted: Sequence[Demand], space: _Space, per_node: int) -> dict[str, Pool] | None:
    """The pools on a cluster of such nodes; None where they do not fit."""
    student, others = wanted[0], wanted[1:]
    nodes = [[Slot(node=n, index=i) for i in range(per_node)] for n in range(space.num_nodes)]
    ranks = space.ranks_per_node(student)
    if (ranks is None and space.even) or (ranks or 0) > per_node:
        return None
    group = student.groups[0]
    rooms = nodes if ranks is None else [slots[:ranks] for slots in nodes]
    found = first_fit([(n, group.width) for n in range(group.count)], rooms)
    if found is None:
        return None
    taken = tuple(slot for n in range(group.count) for slot in found[n])
    left = [[slot for slot in slots if slot not in set(taken)] for slots in nodes]
    tries = max([len(_cuts(one)) for one in others], default=1)
    for attempt in range(tries):
        if (slots := _lay_engines(others, left, attempt)) is None:
            continue
        pools = {one.name: _pool(one, slots[one.name]) for one in others}
        pools[STUDENT] = _pool(student, taken)
        complete = {name: pool for name, pool in pools.items() if pool is not None}
        if len(complete) == len(pools):
            return complete
    return None


def _cuts(demand: Demand) -> list[list[int]]:
    """Pieces of a pool that stay on one node: those of its engines, then single idle devices."""
    if demand.shared:
        return cuts(demand.num_devices, [group.width for group in demand.groups])
    widths = [group.width for group in demand.groups for _ in range(group.count)]
    return [widths + [1] * demand.num_idle]


def _lay_engines(
    wanted: Sequence[Demand], rooms: Sequence[Sequence[Slot]], attempt: int
) -> dict[str, tuple[Slot, ...]] | None:
    sizes = []
    for demand in wanted:
        ways = _cuts(demand)
        way = ways[min(attempt, len(ways) - 1)]
        sizes += [((demand.name, n), size) for n, size in enumerate(way)]
    found = first_fit(sizes, rooms)
    if found is None:
        return None
    return {
        demand.name: tuple(slot for key, _ in sizes if key[0] == demand.name for slot in found[key])
        for demand in wanted
    }


def _pool(demand: Demand, slots: tuple[Slot, ...]) -> Pool | None:
    """The members on the pool's slots; None where an engine of a shared pool would be torn."""
    members: list[Member] = []
    offset = 0
    for group in demand.groups:
        if demand.shared and group.owner != STUDENT:
            rooms: dict[int, list[Slot]] = {}
            for slot in slots:
                rooms.setdefault(slot.node, []).append(slot)
            sizes = [(n, group.width) for n in range(group.count)]
            found = first_fit(sizes, list(rooms.values()))
            if found is None:
                return None
            lists = [found[n] for n in range(group.count)]
        else:
            width = 1 if group.owner == STUDENT else group.width
            ends = range(offset, offset + group.num_devices, width)
            lists = [slots[start : start + width] for start in ends]
            offset += 0 if demand.shared else group.num_devices
        kind = "rank" if group.owner == STUDENT else "engine"
        members += [
            Member(owner=group.owner, kind=kind, number=n, slots=tuple(one))
            for n, one in enumerate(lists)
        ]
    return Pool(
        name=demand.name,
        device=demand.device,
        shared=demand.shared,
        slots=slots,
        members=tuple(members),
    )


def _on_processors(wanted: Sequence[Demand], num_nodes: int) -> dict[str, Pool]:
    """Pools beside the accelerators: each piece goes to the node that has least of them."""
    used = [0] * num_nodes
    pools: dict[str, Pool] = {}
    for demand in wanted:
        slots: list[Slot] = []
        for size in _cuts(demand)[0]:
            node = used.index(min(used))
            slots += [Slot(node=node, index=used[node] + i) for i in range(size)]
            used[node] += size
        pool = _pool(demand, tuple(slots))
        assert pool is not None  # a shared pool is whole
        pools[demand.name] = pool
    return pools


def _elsewhere(config: RunConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Owners in the student's processes, and at URLs."""
    started, backends = pools_of(config), backends_of(config)
    active = [ROLLOUT]
    active += [teacher_owner(name) for name, one in config.teachers.items() if one.weight > 0]
    reached = tuple(owner for owner in active if backends[owner].urls)
    inside = tuple(owner for owner in active if owner not in started and owner not in reached)
    return inside, reached


def _notes(
    config: RunConfig, wanted: Sequence[Demand], total: int, device: DeviceKind
) -> Iterator[str]:
    for demand in wanted:
        if demand.num_idle > 0 and demand.name != STUDENT:
            yield (
                f"{demand.num_idle} of {demand.num_devices} devices of pools.{demand.name} are "
                "idle: raise backend.server.replicas, or lower num_devices"
            )
        if demand.shared and len(demand.groups) == 1:
            yield f"pools.{demand.name}.shared: it has one member, so nobody takes turns"
    free = total - sum(one.num_devices for one in wanted if one.device == device)
    if config.cluster.num_devices_per_node is not None and free > 0:
        yield f"{free} of {total} devices of the cluster have nobody"
