"""The Ray cluster of a run: joined or started, looked at, reserved."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from packaging.version import Version
from ray.exceptions import RayError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from mopd.config.cluster import KINDS, DeviceKind
from mopd.config.pools import STUDENT
from mopd.config.schema import RunConfig
from mopd.errors import ConfigError
from mopd.runtime.placement import Plan
from mopd.runtime.ray.berths import RESOURCES, Berth, asked, berths_of

PACKAGE_ROOT = Path(__file__).resolve().parents[3]
CONNECT_S = 10.0
OLDEST = Version("2.52")  # the first one with token authentication
PROBE_S = 30.0  # for a question that takes half a second
SENT_AWAY = "InvalidAuthToken"  # how Ray answers a process without the token


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserved:
    """A berth with the bundle that Ray keeps for it."""

    berth: Berth
    group: PlacementGroup
    bundle: int

    def start(self, kind: type, has: Mapping[str, float], *arguments: object) -> Any:
        """An actor of ``kind`` in the bundle. Ray does not start it again: whoever watches it does.

        Args:
            has: Ray's resources of its own.
        """
        options = ray.remote(kind).options(
            num_cpus=has.get("CPU", 0.0),
            num_gpus=has.get("GPU", 0.0),
            resources={name: has[name] for name in ("NPU",) if name in has} or None,
            max_concurrency=4,  # its work, and questions beside it
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                self.group, placement_group_bundle_index=self.bundle
            ),
        )
        return options.remote(*arguments)


def join(address: str) -> None:
    """Connects this process to a Ray cluster.

    Raises:
        ConfigError: it cannot be reached.
    """
    _refuse_nobody(address)
    # Ray's own printing would come twice and late: actors keep their lines (relay.py)
    logging.getLogger("ray").setLevel(logging.ERROR)
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": {"PYTHONPATH": _python_path()}},
        )
    except (ConnectionError, ValueError, RuntimeError, RayError) as error:
        raise ConfigError(
            f"ray.address: {address} cannot be joined ({str(error).splitlines()[0]}); start the "
            "cluster (launch/ray/), or leave the address out for one of this host"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray's would end the driver with exit code 15


def _refuse_nobody(address: str) -> None:
    """Ray itself would try for minutes where nobody listens."""
    host, separator, port = address.rpartition(":")
    if address.startswith("ray://"):
        raise ConfigError(
            f"ray.address: {address} is Ray's client port; give that of the head, as in HOST:6379"
        )
    if not separator or not port.isdigit():
        return  # as in `auto`
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"ray.address: {address} cannot be joined ({error}); start the cluster (launch/ray/), "
            "or leave the address out for one of this host"
        ) from error


def check_version() -> None:
    """Raises ConfigError where Ray is too old."""
    if Version(ray.__version__) < OLDEST:
        raise ConfigError(
            f"launcher: ray {ray.__version__} has no authentication; install ray>={OLDEST}"
        )


def _python_path() -> str:
    """Workers import the mopd that the driver runs."""
    before = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(PACKAGE_ROOT), *([before] if before else [])])


def refuse_open_cluster(config: RunConfig, address: str) -> None:
    """Whoever reaches a Ray without a token runs code on all of its hosts.

    One of this host alone is no exception: its head listens on every address.

    Raises:
        ConfigError: the cluster that was joined is one, and the recipe does not accept that.
    """
    if config.ray.allow_unauthenticated or _wants_token():
        return
    raise ConfigError(
        f"ray.address: {address} asks for no token, so anybody who reaches it runs code there; "
        "start it with RAY_AUTH_MODE=token, or set ray.allow_unauthenticated=true"
    )


def _wants_token() -> bool:
    """Whether a process without one is sent away: that this one has a token says nothing."""
    address = ray.get_runtime_context().gcs_address
    try:
        done = subprocess.run(
            # -P: not the ray of a folder that the driver happens to be in
            [sys.executable, "-P", "-m", "ray.scripts.scripts", "status", "--address", address],
            env={**os.environ, "RAY_AUTH_MODE": "disabled"},  # it sends none
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PROBE_S,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode != 0 and SENT_AWAY in done.stderr + done.stdout


def device_of(config: RunConfig) -> DeviceKind:
    """What `run.device` means in the cluster that was joined."""
    if config.run.device in KINDS:
        return KINDS[config.run.device]
    there = ray.cluster_resources()
    for kind, name in RESOURCES.items():
        if name is not None and there.get(name):
            return kind
    return "cpu"


def node_addresses() -> set[str]:
    """Of the nodes that are alive."""
    return {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


@contextmanager
def reserve(plan: Plan, *, start_s: float) -> Iterator[list[Reserved]]:
    """Every berth of the plan, the student's first; given back at the end.

    Raises:
        ConfigError: the cluster has not what the plan asks for, or it is not free in time.
    """
    _refuse_too_much(plan)
    groups: list[PlacementGroup] = []
    found: list[Reserved] = []
    try:
        for pool in plan.pools:
            berths = berths_of(pool)
            # ranks of several nodes are on several nodes; everybody else is as near as possible
            spread = pool.name == STUDENT and len(berths) > 1
            group = placement_group(
                [berth.bundle for berth in berths],
                strategy="STRICT_SPREAD" if spread else "PACK",
                name=f"mopd-{pool.name}-{os.getpid()}",
            )
            groups.append(group)
            if not group.wait(start_s):
                raise ConfigError(
                    f"pools.{pool.name}: {_shown(berths[0].bundle)} on each of {len(berths)} "
                    f"nodes or places was not free within ray.start_s={start_s:g} s; "
                    f"{_there()}; end what holds it, or make the pool smaller"
                )
            found += [
                Reserved(berth=berth, group=group, bundle=index)
                for index, berth in enumerate(berths)
            ]
        yield found
    finally:
        for group in groups:
            remove_placement_group(group)


def _refuse_too_much(plan: Plan) -> None:
    nodes, num_nodes = sum(node["Alive"] for node in ray.nodes()), _num_student_nodes(plan)
    if num_nodes > nodes:
        raise ConfigError(
            f"cluster.num_nodes: the student's ranks are on {num_nodes} nodes, and the Ray cluster "
            f"has {nodes}; add nodes, or lower it"
        )
    wanted, there = asked(plan), ray.cluster_resources()
    for name, count in wanted.items():
        if count > there.get(name, 0.0):
            raise ConfigError(
                f"pools: the plan asks for {_shown(wanted)} and the Ray cluster has "
                f"{_shown({key: there.get(key, 0.0) for key in wanted})}; add nodes, make pools "
                "smaller, or let teachers share one (pools.<name>.shared=true)"
            )


def _num_student_nodes(plan: Plan) -> int:
    return max(len(berths_of(pool)) for pool in plan.pools if pool.name == STUDENT)


def _shown(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{count:g} {name}" for name, count in sorted(resources.items()))


def _there() -> str:
    names = {name for name in RESOURCES.values() if name} | {"CPU"}
    total, free = ray.cluster_resources(), ray.available_resources()
    parts = [f"{free.get(n, 0.0):g} of {total[n]:g} {n} free" for n in sorted(names) if n in total]
    return "the cluster has " + ", ".join(parts)
