"""Nodes of a job under torchrun: this process's place, and the engines that its node starts."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mopd.config.backends import RemoteSection
from mopd.config.check_servers import device_shares
from mopd.config.cluster import KINDS, DeviceKind
from mopd.config.keys import printable
from mopd.config.schema import RunConfig
from mopd.config.urls import check_address
from mopd.environment import VISIBLE_DEVICES
from mopd.errors import ConfigError
from mopd.runtime.placement import Plan, place
from mopd.serving.address import LOOPBACK, address_towards, is_loopback

ADDRESS_VARIABLE = "MOPD_HOST_ADDRESS"
MASTER_VARIABLE = "MASTER_ADDR"  # torchrun's: the host of rank 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """One process of a job whose nodes have as many ranks each."""

    world_size: int
    node: int
    num_nodes: int
    is_first: bool  # of its node: who starts what the node has once


def seat_of(environment: Mapping[str, str]) -> Seat:
    """From torchrun's variables; without them, of a job on this host.

    Raises:
        ConfigError: the nodes have different numbers of ranks.
    """
    rank, world = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
    local = int(environment.get("LOCAL_WORLD_SIZE", world))
    if local == world:
        return Seat(world_size=world, node=0, num_nodes=1, is_first=rank == 0)
    nodes = int(environment.get("GROUP_WORLD_SIZE", -(-world // local)))
    if nodes * local != world:
        raise ConfigError(
            f"cluster.num_nodes: {world} ranks on {nodes} nodes, {local} of them on this one: "
            "start as many on every node (torchrun --nproc-per-node)"
        )
    return Seat(
        world_size=world,
        node=int(environment.get("GROUP_RANK", rank // local)),
        num_nodes=nodes,
        is_first=int(environment.get("LOCAL_RANK", rank % local)) == 0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """One server that a node starts."""

    owner: str  # rollout, teachers.math
    number: int  # among the replicas of its owner, over all nodes
    device: str  # cpu, cuda or npu
    devices: str | None  # for VISIBLE_DEVICES; None: it sees what this process sees
    hides_devices: bool = False  # on the processors of a host that has accelerators


def engines_of_node(
    config: RunConfig,
    sections: Mapping[str, RemoteSection],
    seat: Seat,
    *,
    device: str,
    visible: Callable[[], Sequence[str]],
) -> list[Engine]:
    """The engines of ``sections`` that the plan puts on this node.

    ``server.devices`` names the devices itself; else they are those of the plan.

    Args:
        device: of the student: cpu, cuda or npu.
        visible: names of this node's devices, as in `visible_devices`.
    Raises:
        ConfigError: the recipe is meant for another number of nodes, or the plan does not fit.
    """
    if config.cluster.num_nodes != seat.num_nodes:
        raise ConfigError(
            f"cluster.num_nodes: is {config.cluster.num_nodes}, and this job has {seat.num_nodes}; "
            f"set cluster.num_nodes={seat.num_nodes}, or start it with torchrun --nnodes "
            f"{config.cluster.num_nodes}"
        )
    plan = place(config, world_size=seat.world_size, device=KINDS[device])
    on_cpu = _on_cpu(plan)
    found: list[Engine] = []
    for owner, section in sections.items():
        shares = device_shares(section.server)
        for member in plan.members(owner):
            if member.slots[0].node != seat.node:
                continue
            kind, share = ("cpu" if owner in on_cpu else device), shares[member.number]
            if share is None and kind != "cpu":
                share = _share(owner, [slot.index for slot in member.slots], visible())
            found.append(
                Engine(
                    owner=owner,
                    number=member.number,
                    device=kind,
                    devices=share,
                    hides_devices=kind != device,
                )
            )
    return found


def _on_cpu(plan: Plan) -> set[str]:
    """Owners whose pool has no accelerators."""
    return {one.owner for pool in plan.pools if pool.device == "cpu" for one in pool.members}


def _share(owner: str, places: Sequence[int], names: Sequence[str]) -> str:
    if max(places) >= len(names):
        raise ConfigError(
            f"{owner}.backend.server.devices: the plan puts a server on devices "
            f"{','.join(map(str, places))} behind the student's, and this host shows "
            f"{len(names)}; name devices here (a share of the student's own with --gpu-memory-"
            "utilization in server.args), or start fewer ranks or servers"
        )
    return ",".join(names[index] for index in places)


def visible_devices(
    environment: Mapping[str, str], device: str, *, count: Callable[[], int]
) -> list[str]:
    """Names of the accelerators that this process sees, for the same variable of another one.

    A place in the plan counts within them: with CUDA_VISIBLE_DEVICES=4,5 the second is 5.

    Args:
        count: how many the system has, asked where the variable is not set.
    """
    given = environment.get(VISIBLE_DEVICES[device])
    if given is None:
        return [str(index) for index in range(count())]
    return [name for part in given.split(",") if (name := part.strip())]


def device_here(config: RunConfig) -> DeviceKind:
    """What the recipe runs on, on this host; torch knows what `auto` finds."""
    name: str = config.run.device
    if name == "auto":
        from mopd.device import get_device

        name = get_device(name).name
    return KINDS[name]


def listen_address(seat: Seat, environment: Mapping[str, str]) -> str:
    """Where the servers of a node listen: the loopback where the job has one host, else one address
    that the other hosts reach, never all of them.

    That is ``MOPD_HOST_ADDRESS``, else the one on this host's way to ``MASTER_ADDR``.

    Raises:
        ConfigError: there is none that other hosts could reach.
    """
    if seat.num_nodes == 1:
        return LOOPBACK
    if given := environment.get(ADDRESS_VARIABLE):
        return _checked(given)
    master = environment.get(MASTER_VARIABLE, "")
    remedy = "set it to the IP address of this host in the job"
    try:
        found = address_towards(master)
        check_address(found.partition("%")[0])
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{ADDRESS_VARIABLE}: this host has no usable address towards {MASTER_VARIABLE}="
            f"{printable(master)} ({error}); {remedy}"
        ) from error
    # where the master is named by a loopback address, all of the job is on this machine
    if is_loopback(found) and not is_loopback(master):
        raise ConfigError(
            f"{ADDRESS_VARIABLE}: {MASTER_VARIABLE}={printable(master)} leads to the loopback of "
            f"this host, which no other host reaches; {remedy}"
        )
    return found


def _checked(text: str) -> str:
    try:
        check_address(text)
        return str(ipaddress.ip_address(text))
    except ValueError as error:
        raise ConfigError(
            f"{ADDRESS_VARIABLE}: {printable(text)} is nothing to listen on ({error}); give the IP "
            "address of this host in the job"
        ) from error
