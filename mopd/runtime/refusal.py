"""The line that says why pools do not fit on a cluster, and what would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from mopd.config.cluster import DeviceKind
from mopd.config.pools import STUDENT
from mopd.runtime.demand import Demand

Fits = Callable[[Sequence[Demand], int], bool]  # on so many nodes


def refusal(
    wanted: Sequence[Demand], *, num_nodes: int, per_node: int, device: DeviceKind, fits: Fits
) -> str:
    """What is asked for (per pool), what there is, and what would fit."""
    total, there = sum(one.num_devices for one in wanted), num_nodes * per_node
    asked = ", ".join(f"{one.name} {one.num_devices}{_together(one)}" for one in wanted)
    nodes = "1 node" if num_nodes == 1 else f"{num_nodes} nodes"
    said = (
        f"cluster: {total} devices ({device}) are asked for ({asked}), and {nodes} x {per_node} = "
        f"{there} are there"
    )
    if total <= there:
        said += ", where an engine and a tensor-parallel group stay on one node each"
    remedies = []
    if (enough := _enough_nodes(wanted, num_nodes, fits)) is not None:
        remedies.append(f"set cluster.num_nodes={enough}")
    remedies.append(_smaller(wanted, num_nodes, fits))
    return f"{said}; {', or '.join(remedies)}"


def _together(demand: Demand) -> str:
    widths = {group.width for group in demand.groups if group.width > 1}
    return f" in groups of {' and '.join(map(str, sorted(widths)))}" if widths else ""


def _enough_nodes(wanted: Sequence[Demand], num_nodes: int, fits: Fits) -> int | None:
    groups = sum(group.count for one in wanted for group in one.groups)
    idle = sum(one.num_idle for one in wanted)
    # one group or idle device on a node of its own is the most that anybody needs
    most = max(num_nodes + 1, groups + idle, wanted[0].num_devices)
    return next((n for n in range(num_nodes + 1, most + 1) if fits(wanted, n)), None)


def _smaller(wanted: Sequence[Demand], num_nodes: int, fits: Fits) -> str:
    """The largest pool that would make room, and how small it would have to be."""
    for demand in sorted(wanted[1:], key=lambda one: -one.num_devices):
        for size in range(demand.num_devices - 1, 0, -1):
            limited = demand.limited(size)
            if limited is None:
                break
            if fits([limited if one is demand else one for one in wanted], num_nodes):
                if size >= demand.needed:
                    return f"set pools.{demand.name}.num_devices={size}"
                return (
                    f"make do with {limited.needed} devices in pools.{demand.name} (now "
                    f"{demand.num_devices}: {_members(demand)})"
                )
    if (merged := _in_one_pool(wanted)) is not None and fits([wanted[0], merged], num_nodes):
        return (
            f"let the engines take turns on {merged.num_devices} devices (one pool, with "
            "pools.<name>.shared=true)"
        )
    if fits(wanted[:1], num_nodes):
        return f"let the engines take turns with the student (pools.{STUDENT}.shared=true)"
    return f"ask for fewer devices in pools.{STUDENT} or student.parallel"


def _in_one_pool(wanted: Sequence[Demand]) -> Demand | None:
    if len(wanted) < 3:
        return None
    groups = tuple(group for demand in wanted[1:] for group in demand.groups)
    size = max(group.num_devices for group in groups)
    return replace(wanted[1], shared=True, groups=groups, num_devices=size)


def _members(demand: Demand) -> str:
    return ", ".join(f"{group.owner} {group.count} x {group.width}" for group in demand.groups)
