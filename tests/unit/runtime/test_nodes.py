"""Which node starts which engine, on which devices, and where it listens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from mopd.config.backends import RemoteSection
from mopd.config.schema import RunConfig
from mopd.errors import ConfigError
from mopd.runtime import nodes
from mopd.runtime.nodes import (
    ADDRESS_VARIABLE,
    Seat,
    engines_of_node,
    listen_address,
    seat_of,
    visible_devices,
)

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
EIGHT = [str(index) for index in range(8)]


def seat(node: int = 0, *, num_nodes: int = 1, world_size: int = 1) -> Seat:
    return Seat(world_size=world_size, node=node, num_nodes=num_nodes, is_first=True)


@pytest.mark.parametrize(
    ("variables", "node", "num_nodes", "is_first"),
    [
        ({}, 0, 1, True),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, 0, 1, False),
        (dict(zip(TORCHRUN, ("1", "2", "1", "2", "0"), strict=True)), 0, 1, False),
        (dict(zip(TORCHRUN, ("2", "4", "0", "2", "1"), strict=True)), 1, 2, True),
        (dict(zip(TORCHRUN, ("3", "4", "1", "2", "1"), strict=True)), 1, 2, False),
        # without torchrun's own numbers of groups, ranks are counted
        (dict(zip(TORCHRUN[:4], ("5", "8", "1", "4"), strict=True)), 1, 2, False),
        # an agent's place is not its ranks' order for ever, but torchrun says it
        (dict(zip(TORCHRUN, ("0", "4", "0", "2", "1"), strict=True)), 1, 2, True),
    ],
)
def test_the_place_of_a_process(
    variables: dict[str, str], node: int, num_nodes: int, is_first: bool
) -> None:
    found = seat_of(variables)
    assert (found.node, found.num_nodes, found.is_first) == (node, num_nodes, is_first)
    assert found.world_size == int(variables.get("WORLD_SIZE", "1"))


def test_nodes_have_as_many_ranks() -> None:
    uneven = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2"}
    with pytest.raises(ConfigError, match=r"3 ranks on 2 nodes, 2 of them on this one"):
        seat_of(uneven)


def recipe(servers: dict[str, dict[str, Any]], **sections: Any) -> RunConfig:
    teachers = {
        name: {"model": name, "backend": {"type": "vllm", "server": server}}
        for name, server in servers.items()
    }
    return RunConfig.model_validate({"student": {"model": "s"}, "teachers": teachers} | sections)


def started(
    config: RunConfig, place: Seat, *, device: str = "cuda", visible: Sequence[str] = EIGHT
) -> list[tuple[str, int, str, str | None]]:
    """(owner, number, device, devices) of one node."""
    sections: dict[str, RemoteSection] = {
        f"teachers.{name}": one.backend for name, one in config.teachers.items()
    }
    found = engines_of_node(config, sections, place, device=device, visible=lambda: visible)
    return [(one.owner, one.number, one.device, one.devices) for one in found]


def test_on_one_host_servers_sit_behind_the_student() -> None:
    config = recipe({"a": {"replicas": 2}, "b": {"tensor_parallel_size": 2}})
    found = {key[:2]: key[2:] for key in started(config, seat(world_size=4))}
    assert {key: devices for key, (_, devices) in found.items()} == {
        ("teachers.b", 0): "4,5",  # wider ones first
        ("teachers.a", 0): "6",
        ("teachers.a", 1): "7",
    }
    assert {kind for kind, _ in found.values()} == {"cuda"}


def test_devices_are_counted_within_what_this_process_may_use() -> None:
    config = recipe({"a": {"tensor_parallel_size": 2}})
    (found,) = started(config, seat(world_size=2), visible=["4", "5", "GPU-abc", "7"])
    assert found[3] == "GPU-abc,7"


def test_devices_that_are_named_win_and_need_no_room() -> None:
    config = recipe({"a": {"devices": "0", "replicas": 2}, "b": {"devices": "2,3,4,5"}})
    found = started(config, seat(world_size=1), visible=["0"])
    assert sorted(one[3] or "" for one in found) == ["0", "0", "2,3,4,5"]


def test_a_host_that_is_too_small_is_refused_with_the_remedy() -> None:
    config = recipe({"a": {}})
    with pytest.raises(ConfigError) as caught:
        started(config, seat(world_size=2), visible=["0", "1"])
    said = str(caught.value)
    assert said.startswith("teachers.a.backend.server.devices: ") and "\n" not in said
    assert "on devices 2 behind the student's, and this host shows 2; name devices" in said


def test_on_processors_nothing_is_named() -> None:
    config = recipe({"a": {"replicas": 2}})
    found = started(config, seat(), device="cpu", visible=[])
    assert found == [("teachers.a", n, "cpu", None) for n in range(2)]


def test_a_pool_on_processors_beside_accelerators() -> None:
    config = recipe({"a": {}, "b": {}}, pools={"a": {"device": "cpu"}})
    found = {one[0]: one[2:] for one in started(config, seat(world_size=2))}
    assert found == {"teachers.a": ("cpu", None), "teachers.b": ("cuda", "2")}


def test_each_node_starts_what_the_plan_puts_there_and_all_are_started_once() -> None:
    cluster = {"num_nodes": 2, "num_devices_per_node": 4}
    config = recipe({"a": {"replicas": 3}, "b": {}}, cluster=cluster)
    shares = [
        started(config, seat(n, num_nodes=2, world_size=4), visible=EIGHT[:4]) for n in range(2)
    ]
    assert [len(share) for share in shares] == [2, 2]
    everyone = [one[:2] for share in shares for one in share]
    assert sorted(everyone) == [*(("teachers.a", n) for n in range(3)), ("teachers.b", 0)]
    for share in shares:
        assert sorted(one[3] or "" for one in share) == ["2", "3"]


@pytest.mark.parametrize(("meant", "there"), [(1, 2), (2, 1)])
def test_a_recipe_for_another_number_of_nodes_is_refused(meant: int, there: int) -> None:
    config = recipe({"a": {}}, cluster={"num_nodes": meant})
    with pytest.raises(ConfigError) as caught:
        started(config, seat(num_nodes=there, world_size=there))
    said = str(caught.value)
    assert said.startswith(f"cluster.num_nodes: is {meant}, and this job has {there}; ")
    assert f"set cluster.num_nodes={there}, or start it with torchrun --nnodes {meant}" in said


@pytest.mark.parametrize(
    ("variables", "names"),
    [
        ({}, ["0", "1"]),
        ({"CUDA_VISIBLE_DEVICES": "3, 5"}, ["3", "5"]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-a,MIG-b"}, ["GPU-a", "MIG-b"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, []),
        ({"ASCEND_RT_VISIBLE_DEVICES": "7"}, ["0", "1"]),
    ],
)
def test_what_is_visible(variables: dict[str, str], names: list[str]) -> None:
    assert visible_devices(variables, "cuda", count=lambda: 2) == names
    assert visible_devices({"ASCEND_RT_VISIBLE_DEVICES": "7"}, "npu", count=lambda: 9) == ["7"]


MANY = seat(num_nodes=2, world_size=2)


class TestAddress:
    """One address, and one that others reach."""

    def test_one_host_stays_on_its_loopback(self) -> None:
        for variables in ({}, {ADDRESS_VARIABLE: "10.0.0.1"}, {"MASTER_ADDR": "10.0.0.1"}):
            assert listen_address(seat(world_size=8), variables) == "127.0.0.1"

    def test_the_variable_wins(self) -> None:
        variables = {ADDRESS_VARIABLE: "10.0.0.1", "MASTER_ADDR": "no-such-host.invalid"}
        assert listen_address(MANY, variables) == "10.0.0.1"

    def test_else_it_is_the_one_on_the_way_to_the_master(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[str] = []

        def towards(host: str) -> str:
            asked.append(host)
            return "10.0.0.7"

        monkeypatch.setattr(nodes, "address_towards", towards)
        assert listen_address(MANY, {"MASTER_ADDR": "head"}) == "10.0.0.7"
        assert asked == ["head"]

    def test_a_job_on_one_machine_may_name_its_loopback(self) -> None:
        assert listen_address(MANY, {"MASTER_ADDR": "127.0.0.1"}) == "127.0.0.1"

    @pytest.mark.parametrize("found", ["127.0.0.1", "127.0.1.1", "::1"])
    def test_a_name_of_the_loopback_is_refused(
        self, monkeypatch: pytest.MonkeyPatch, found: str
    ) -> None:
        """As Debian's /etc/hosts has it for a machine's own name."""
        monkeypatch.setattr(nodes, "address_towards", lambda host: found)
        with pytest.raises(ConfigError, match=r"MOPD_HOST_ADDRESS: MASTER_ADDR=head leads to the"):
            listen_address(MANY, {"MASTER_ADDR": "head"})

    @pytest.mark.parametrize("given", ["0.0.0.0", "::", "169.254.169.254", "224.0.0.1", "head"])
    def test_every_address_at_once_is_none(self, given: str) -> None:
        with pytest.raises(ConfigError, match=r"MOPD_HOST_ADDRESS: .* is nothing to listen on"):
            listen_address(MANY, {ADDRESS_VARIABLE: given})

    @pytest.mark.parametrize("variables", [{}, {"MASTER_ADDR": "no-such-host.invalid"}])
    def test_no_way_to_the_master_is_refused_with_the_remedy(
        self, variables: dict[str, str]
    ) -> None:
        with pytest.raises(ConfigError, match=r"MOPD_HOST_ADDRESS: this host has no usable .*set"):
            listen_address(MANY, variables)
