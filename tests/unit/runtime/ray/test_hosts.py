"""What a host of engines is told, without a cluster: devices, leases, and what a CPU's may see."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from mopd.config.cluster import DeviceKind
from mopd.config.schema import RunConfig
from mopd.runtime.placement import Slot, place
from mopd.runtime.ray import host as host_module
from mopd.runtime.ray.host import HostJob
from mopd.runtime.ray.hosts import Hosts
from mopd.runtime.ray.rank import Place
from mopd.serving.launch import Launch
from tests.helpers.ray_plans import recipe, unreserved

pytestmark = pytest.mark.ray

SHARED = {"shared": True}


def jobs(
    config: RunConfig,
    device: DeviceKind,
    *,
    given: tuple[str, ...] = (),
    students: dict[Slot, str] | None = None,
    pids: tuple[int, ...] = (),
) -> list[HostJob]:
    """Of every host, each of which Ray gave the devices ``given``."""
    hosts = Hosts(
        config,
        unreserved(place(config, device=device)),
        directory="/",
        key="key",
        devices=students or {},
        say=print,
    )
    found = []
    for one in hosts._hosts:
        one.address, one.pids = "10.0.0.1", list(pids)
        one.ports = tuple(range(18_000, 18_000 + len(one.reserved.berth.engines)))
        seat = Place(address="10.0.0.1", pid=1, devices=given, port=1)
        found.append(hosts._job(one, seat))
    return found


def test_an_engine_of_its_own() -> None:
    config = recipe(ranks=1, teachers={"math": (None, 2, 2)})
    first, second = jobs(config, "gpu", given=("6", "7"), pids=(11, 12))
    assert (first.device, first.devices, first.pool) == ("gpu", ("6", "7"), None)
    assert [(one.owner, one.number, one.port, one.devices) for one in first.engines] == [
        ("teachers.math", 0, 18_000, (0, 1))
    ]
    assert [one.number for one in second.engines] == [1]
    assert (first.address, first.key, first.earlier) == ("10.0.0.1", "key", (11, 12))


def test_a_shared_pool_has_one_host_and_one_lease() -> None:
    config = recipe(
        ranks=1,
        teachers={"math": ("judges", 1, 2), "code": ("judges", 2, 1)},
        pools={"judges": SHARED},
    )
    (job,) = jobs(config, "npu", given=("4", "5"))
    assert job.pool == "judges"
    assert [(one.owner, one.number, one.devices) for one in job.engines] == [
        ("teachers.math", 0, (0, 1)),
        ("teachers.code", 0, (0,)),
        ("teachers.code", 1, (1,)),
    ]
    assert len({one.port for one in job.engines}) == 3


def test_engines_on_the_students_devices_see_those() -> None:
    """Their actors have none of their own; the second node's are counted from its first."""
    config = recipe(
        ranks=4,
        tp=2,
        nodes=2,
        per_node=2,
        rollout=(2, 2),
        rollout_pool="student",
        teachers={"math": ("student", 2, 1)},
        pools={"student": SHARED},
    )
    students = {
        Slot(node=0, index=0): "5",
        Slot(node=0, index=1): "3",
        Slot(node=1, index=0): "0",
        Slot(node=1, index=1): "1",
    }
    first, second = jobs(config, "gpu", students=students)
    assert (first.devices, second.devices) == (("5", "3"), ("0", "1"))
    assert first.pool == second.pool == "student"
    assert [(one.owner, one.number, one.devices) for one in first.engines] == [
        ("rollout", 0, (0, 1)),
        ("teachers.math", 0, (0,)),
        ("teachers.math", 1, (1,)),
    ]
    assert [(one.owner, one.number, one.devices) for one in second.engines] == [
        ("rollout", 1, (0, 1))
    ]


def test_the_students_processors_are_nobodys_in_particular() -> None:
    config = recipe(
        ranks=1, teachers={"math": ("student", 1, 1)}, pools={"student": SHARED}, per_node=1
    )
    (job,) = jobs(config, "cpu")
    assert (job.device, job.devices, job.pool) == ("cpu", (), "student")


def launched(job: HostJob, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Launch:
    """How the host starts the server of its first engine."""
    found: list[Launch] = []
    server: Any = lambda launch, say: found.append(launch)  # noqa: E731
    monkeypatch.setattr(host_module, "ServerProcess", server)
    monkeypatch.setenv("MOPD_VLLM_PYTHON", sys.executable)
    monkeypatch.chdir(folder)
    host_module._vllm(job, job.engines[0])
    return found[0]


def test_a_server_sees_the_devices_of_its_engine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = recipe(
        ranks=1,
        teachers={"math": ("judges", 1, 2), "code": ("judges", 2, 1)},
        pools={"judges": SHARED},
    )
    (job,) = jobs(config, "npu", given=("4", "5"))
    environment = launched(job, monkeypatch, tmp_path).environment
    assert environment["ASCEND_RT_VISIBLE_DEVICES"] == "4,5"
    only = HostJob(
        **{name: getattr(job, name) for name in job.__slots__} | {"engines": job.engines[2:]}
    )
    environment = launched(only, monkeypatch, tmp_path).environment
    assert environment["ASCEND_RT_VISIBLE_DEVICES"] == "5"


def test_a_server_on_the_processors_sees_no_accelerator(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ray leaves an actor without accelerators the sight of all of the node's."""
    config = recipe(
        ranks=1, teachers={"math": ("slow", 1, 1)}, pools={"slow": {"device": "cpu"}}, per_node=1
    )
    (job,) = jobs(config, "gpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    environment = launched(job, monkeypatch, tmp_path).environment
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    assert environment["ASCEND_RT_VISIBLE_DEVICES"] == ""
