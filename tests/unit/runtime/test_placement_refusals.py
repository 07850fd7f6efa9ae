"""What does not fit is refused, and what would fit is named."""

from __future__ import annotations

import pytest

from mopd.config.cluster import DeviceKind
from mopd.config.schema import RunConfig
from mopd.errors import ConfigError
from mopd.runtime.placement import place
from tests.helpers.ray_plans import recipe

REFUSALS: dict[str, tuple[RunConfig, DeviceKind, str]] = {
    "more nodes, or a smaller pool": (
        recipe(ranks=2, tp=2, rollout=(2, 1), teachers={"a": (None, 4, 2)}, per_node=8),
        "gpu",
        "cluster: 12 devices (gpu) are asked for (student 2 in groups of 2, rollout 2, a 8 in "
        "groups of 2), and 1 node x 8 = 8 are there; set cluster.num_nodes=2, or make do with 4 "
        "devices in pools.a (now 8: teachers.a 4 x 2)",
    ),
    "idle devices go first": (
        recipe(ranks=4, teachers={"a": (None, 1, 2)}, pools={"a": {"num_devices": 6}}, per_node=8),
        "npu",
        "cluster: 10 devices (npu) are asked for (student 4, a 6 in groups of 2), and 1 node x 8 = "
        "8 are there; set cluster.num_nodes=2, or set pools.a.num_devices=4",
    ),
    "one pool for all engines": (
        recipe(ranks=4, rollout=(1, 4), teachers={"a": (None, 1, 4)}, per_node=8),
        "gpu",
        "cluster: 12 devices (gpu) are asked for (student 4, rollout 4 in groups of 4, a 4 in "
        "groups of 4), and 1 node x 8 = 8 are there; set cluster.num_nodes=2, or let the engines "
        "take turns on 4 devices (one pool, with pools.<name>.shared=true)",
    ),
    "turns with the student": (
        recipe(ranks=8, rollout=(1, 4), per_node=8),
        "gpu",
        "cluster: 12 devices (gpu) are asked for (student 8, rollout 4 in groups of 4), and 1 node "
        "x 8 = 8 are there; set cluster.num_nodes=2, or let the engines take turns with the "
        "student (pools.student.shared=true)",
    ),
    "a student that is too large": (
        recipe(ranks=16, tp=8, per_node=8),
        "gpu",
        "cluster: 16 devices (gpu) are asked for (student 16 in groups of 8), and 1 node x 8 = 8 "
        "are there; set cluster.num_nodes=2, or ask for fewer devices in pools.student or "
        "student.parallel",
    ),
    "enough devices, torn": (
        recipe(ranks=6, tp=3, rollout=(1, 2), nodes=2, per_node=4),
        "gpu",
        "cluster: 8 devices (gpu) are asked for (student 6 in groups of 3, rollout 2 in groups of "
        "2), and 2 nodes x 4 = 8 are there, where an engine and a tensor-parallel group stay on "
        "one node each; set cluster.num_nodes=3, or let the engines take turns with the student "
        "(pools.student.shared=true)",
    ),
    "processors, too, where their number is given": (
        recipe(ranks=3, per_node=2),
        "cpu",
        "cluster: 3 devices (cpu) are asked for (student 3), and 1 node x 2 = 2 are there; set "
        "cluster.num_nodes=2, or ask for fewer devices in pools.student or student.parallel",
    ),
    "an engine wider than a node": (
        recipe(rollout=(1, 8), nodes=4, per_node=4),
        "gpu",
        "rollout.backend.server.tensor_parallel_size=8: an engine stays on one node, and "
        "cluster.num_devices_per_node is 4; lower it to 4 or less",
    ),
    "a group wider than a node": (
        recipe(tp=8, nodes=4, per_node=4),
        "gpu",
        "student.parallel.tensor_model_parallel_size=8: a tensor-parallel group stays on one node, "
        "and cluster.num_devices_per_node is 4; lower it to 4 or less",
    ),
    "ranks that are no replicas": (
        recipe(ranks=7, tp=4),
        "gpu",
        "pools.student.num_devices: 7 ranks are no multiple of tensor x pipeline x context "
        "parallel size (4); 4 or 8 would fit",
    ),
    "fewer ranks than a replica": (
        recipe(ranks=3, tp=4),
        "gpu",
        "pools.student.num_devices: 3 ranks are no multiple of tensor x pipeline x context "
        "parallel size (4); 4 would fit",
    ),
    "a pool that is too small": (
        recipe(teachers={"a": ("j", 2, 2), "b": ("j", 1, 1)}, pools={"j": {"num_devices": 4}}),
        "gpu",
        "pools.j.num_devices=4: its engines need 5 (teachers.a 2 x 2, teachers.b 1 x 1); set 5 or "
        "more, or lower backend.server.replicas or tensor_parallel_size",
    ),
    "more engines than the student has devices": (
        recipe(
            ranks=2, rollout=(2, 2), rollout_pool="student", pools={"student": {"shared": True}}
        ),
        "gpu",
        "rollout.backend.server: 2 replicas x 2 devices = 4 are more than the 2 of pools.student; "
        "lower replicas or tensor_parallel_size, or name another pool",
    ),
    "engines that the student's nodes would tear": (
        recipe(
            ranks=4,
            launcher="torchrun",
            rollout=(1, 4),
            rollout_pool="student",
            pools={"student": {"shared": True}},
            nodes=2,
            per_node=8,
        ),
        "gpu",
        "rollout.backend.server.tensor_parallel_size=4: an engine stays on one node, and the "
        "devices that pools.student has there do not hold 1 of that width in all; lower it or "
        "replicas, or name another pool",
    ),
    "and would tear on nodes of any size": (
        recipe(
            ranks=2,
            launcher="torchrun",
            teachers={"a": ("student", 1, 2)},
            pools={"student": {"shared": True}},
            nodes=2,
        ),
        "gpu",
        "teachers.a.backend.server.tensor_parallel_size=2: an engine stays on one node, and the "
        "devices that pools.student has there do not hold 1 of that width in all; lower it or "
        "replicas, or name another pool",
    ),
    "a kind that the run does not have": (
        recipe(teachers={"a": (None, 1, 1)}, pools={"a": {"device": "gpu"}}),
        "cpu",
        "pools.a.device=gpu: the devices of this run are of kind cpu (run.device); set device=cpu, "
        "or leave the key out",
    ),
    "a student beside run.device": (
        recipe(pools={"student": {"device": "cpu"}}),
        "npu",
        "pools.student.device=cpu: the student is on run.device, which is npu; set run.device=cpu, "
        "or leave the key out",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_fit_is_refused_in_one_line(name: str) -> None:
    config, device, wanted = REFUSALS[name]
    with pytest.raises(ConfigError) as caught:
        place(config, device=device)
    assert str(caught.value) == wanted


@pytest.mark.parametrize(
    "name", [name for name, case in REFUSALS.items() if "num_nodes=" in case[2]]
)
def test_the_number_of_nodes_that_a_refusal_names_is_the_least(name: str) -> None:
    config, device, said = REFUSALS[name]
    enough = int(said.partition("set cluster.num_nodes=")[2].partition(",")[0])
    for nodes in range(1, enough + 1):
        cluster = config.cluster.model_copy(update={"num_nodes": nodes})
        larger = config.model_copy(update={"cluster": cluster})
        if nodes < enough:
            with pytest.raises(ConfigError):
                place(larger, device=device)
        else:
            place(larger, device=device)
