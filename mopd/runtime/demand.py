"""What the pools of a recipe ask for: how many devices of which kind, in groups of which width."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mopd.config.cluster import DeviceKind, PoolSection
from mopd.config.pools import STUDENT, backends_of, pools_of
from mopd.config.schema import RunConfig
from mopd.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """``count`` times ``width`` devices of one owner, each ``width`` on one node."""

    owner: str
    count: int  # engines; of the student its tensor-parallel groups
    width: int

    @property
    def num_devices(self) -> int:
        return self.count * self.width

    @property
    def key(self) -> str:
        """The key that sets ``width``."""
        if self.owner == STUDENT:
            return "student.parallel.tensor_model_parallel_size"
        return f"{self.owner}.backend.server.tensor_parallel_size"


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """One pool. The student is the first group of its own."""

    name: str
    device: DeviceKind
    shared: bool
    groups: tuple[Group, ...]
    num_devices: int  # at least `needed`

    @property
    def needed(self) -> int:
        """Of a shared pool the largest group: the others lie on the same devices."""
        sizes = [group.num_devices for group in self.groups]
        return max(sizes) if self.shared else sum(sizes)

    @property
    def num_idle(self) -> int:
        return self.num_devices - self.needed

    def limited(self, num_devices: int) -> Demand | None:
        """The same pool with fewer engines, the last ones missing; None if a group loses all."""
        groups: list[Group] = []
        left = num_devices
        for group in self.groups:
            count = min(group.count, left // group.width)
            if count == 0:
                return None
            groups.append(replace(group, count=count))
            left -= 0 if self.shared else groups[-1].num_devices
        return replace(self, groups=tuple(groups), num_devices=num_devices)


def demands(config: RunConfig, *, world_size: int | None, device: DeviceKind) -> list[Demand]:
    """All pools, the student's first, then in the order of their owners.

    Raises ConfigError for a pool that is too small for its members, or of a kind of device that
    the run does not have.
    """
    tp = config.student.parallel.tensor_model_parallel_size
    ranks = student_ranks(config, world_size=world_size)
    members = {STUDENT: [Group(owner=STUDENT, count=ranks // tp, width=tp)]}
    for owner, pool in pools_of(config).items():
        server = backends_of(config)[owner].server
        group = Group(owner=owner, count=server.replicas, width=server.tensor_parallel_size)
        members.setdefault(pool, []).append(group)
    found = [_demand(config, pool, groups, device) for pool, groups in members.items()]
    _check_student(found[0])
    return found


def student_ranks(config: RunConfig, *, world_size: int | None = None) -> int:
    """Ranks of the student: what torchrun started, else `pools.student.num_devices`, else one
    replica. Raises ConfigError where that is no multiple of a replica."""
    parallel, section = config.student.parallel, config.pools.get(STUDENT, PoolSection())
    replica = parallel.tensor_model_parallel_size
    replica *= parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    asked = section.num_devices
    if world_size is not None and asked is not None and asked != world_size:
        raise ConfigError(
            f"pools.{STUDENT}.num_devices={asked}: the job has {world_size} ranks; start {asked}, "
            "or leave the key out"
        )
    ranks = world_size or asked or replica
    if ranks % replica:
        key = f"pools.{STUDENT}.num_devices" if asked else "student.parallel"
        below, above = ranks // replica * replica, -(-ranks // replica) * replica
        fitting = f"{below} or {above}" if below else f"{above}"
        raise ConfigError(
            f"{key}: {ranks} ranks are no multiple of tensor x pipeline x context parallel size "
            f"({replica}); {fitting} would fit"
        )
    return ranks


def _demand(config: RunConfig, pool: str, groups: list[Group], device: DeviceKind) -> Demand:
    section = config.pools.get(pool, PoolSection())
    kind = section.device or device
    if kind not in (device, "cpu"):
        kinds = " or ".join(dict.fromkeys((device, "cpu")))
        raise ConfigError(
            f"pools.{pool}.device={kind}: the devices of this run are of kind {device} (run.device)"
            f"; set device={kinds}, or leave the key out"
        )
    if pool == STUDENT and kind != device:
        raise ConfigError(
            f"pools.{STUDENT}.device={kind}: the student is on run.device, which is {device}; set "
            "run.device=cpu, or leave the key out"
        )
    assert pool != STUDENT or section.shared or len(groups) == 1  # `check_pools`
    demand = Demand(
        name=pool, device=kind, shared=section.shared, groups=tuple(groups), num_devices=1 << 62
    )
    asked = section.num_devices if section.num_devices is not None else demand.needed
    if asked < demand.needed and pool != STUDENT:  # the student's: `_check_student`
        each = ", ".join(f"{g.owner} {g.count} x {g.width}" for g in groups)
        raise ConfigError(
            f"pools.{pool}.num_devices={asked}: its engines need {demand.needed} ({each}); set "
            f"{demand.needed} or more, or lower backend.server.replicas or tensor_parallel_size"
        )
    return replace(demand, num_devices=asked)


def _check_student(demand: Demand) -> None:
    """Engines in the student's pool find their place on its ranks' devices."""
    ranks = demand.groups[0].num_devices
    for group in demand.groups[1:]:
        if group.num_devices > ranks:
            raise ConfigError(
                f"{group.owner}.backend.server: {group.count} replicas x {group.width} devices = "
                f"{group.num_devices} are more than the {ranks} of pools.{STUDENT}; lower replicas "
                "or tensor_parallel_size, or name another pool"
            )
