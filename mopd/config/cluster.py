"""Sections of a recipe about machines: what there is, and who sits where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from mopd.config.section import NonNegativeInt, PositiveFloat, PositiveInt, Section

DeviceKind = Literal["gpu", "npu", "cpu"]
# By the values of run.device, which are torch's names, and back.
KINDS: Mapping[str, DeviceKind] = {"cuda": "gpu", "npu": "npu", "cpu": "cpu"}
DEVICE_NAMES: Mapping[DeviceKind, str] = {kind: name for name, kind in KINDS.items()}


class ClusterSection(Section):
    """The machines that a recipe is meant for. They are alike."""

    num_nodes: PositiveInt = 1
    num_devices_per_node: PositiveInt | None = None  # None: as many as the recipe asks for
    device_memory_gb: PositiveFloat | None = None  # of one device, for `mopd plan`


class PoolSection(Section):
    """Devices under one name. The student's pool is `student`; `rollout.pool` and
    `teachers.<name>.pool` name the others."""

    num_devices: PositiveInt | None = None  # None: as many as its members ask for
    shared: bool = False  # its members take turns on the same devices, which count once
    device: DeviceKind | None = None  # None: that of run.device


class RaySection(Section):
    """`launcher: ray`. Engines are started again `backend.server.max_restarts` times."""

    address: str | None = None  # None: $RAY_ADDRESS, else a Ray of this host for this run
    allow_unauthenticated: bool = False  # a cluster that lets anybody who reaches it run code
    start_s: PositiveFloat = 300.0  # how long the cluster may take to have every device free
    heartbeat_s: PositiveFloat = 5.0  # between two looks at an actor
    silent_s: PositiveFloat = 60.0  # an actor that does not answer so long counts as dead
    max_restarts: NonNegativeInt = 3  # of the student, from its last checkpoint
