"""Which rank and which engine sits on which device: a pure function of the recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mopd.config.cluster import DeviceKind


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
