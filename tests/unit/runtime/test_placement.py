"""Who sits where: the table of cases."""

from __future__ import annotations

import pytest

from mopd.config.cluster import DeviceKind
from mopd.config.schema import RunConfig
from mopd.errors import ConfigError
from mopd.runtime.placement import Plan, place
from tests.helpers.ray_plans import recipe


def seats(plan: Plan) -> dict[str, list[str]]:
    """Of every owner the devices of its members, as in `0.2-0.3`."""
    found: dict[str, list[str]] = {}
    for pool in plan.pools:
        for member in pool.members:
            words = [f"{slot.node}.{slot.index}" for slot in member.slots]
            found.setdefault(member.owner, []).append("+".join(words))
    return found


CASES: dict[str, tuple[RunConfig, DeviceKind, tuple[int, int], dict[str, list[str]]]] = {
    "a laptop": (
        recipe(ranks=2),
        "cpu",
        (1, 2),
        {"student": ["0.0", "0.1"]},
    ),
    "dedicated pools behind the student": (
        recipe(ranks=2, tp=2, rollout=(2, 1), teachers={"math": (None, 1, 2)}, per_node=8),
        "gpu",
        (1, 8),
        {
            "student": ["0.0", "0.1"],
            "rollout": ["0.4", "0.5"],
            "teachers.math": ["0.2+0.3"],  # the wider engine chooses first
        },
    ),
    "one replica of the student where nothing is said": (
        recipe(tp=4),
        "npu",
        (1, 4),
        {"student": ["0.0", "0.1", "0.2", "0.3"]},
    ),
    "a shared pool counts once": (
        recipe(
            ranks=1,
            teachers={"math": ("judges", 1, 4), "code": ("judges", 3, 1)},
            pools={"judges": {"shared": True}},
        ),
        "gpu",
        (1, 5),
        {
            "student": ["0.0"],
            "teachers.math": ["0.1+0.2+0.3+0.4"],
            "teachers.code": ["0.1", "0.2", "0.3"],
        },
    ),
    "the same pool dedicated": (
        recipe(ranks=1, teachers={"math": ("judges", 1, 4), "code": ("judges", 3, 1)}),
        "gpu",
        (1, 8),
        {
            "student": ["0.0"],
            "teachers.math": ["0.1+0.2+0.3+0.4"],
            "teachers.code": ["0.5", "0.6", "0.7"],
        },
    ),
    "engines on the student's devices": (
        recipe(
            ranks=4,
            tp=2,
            rollout=(2, 2),
            rollout_pool="student",
            teachers={"math": ("student", 1, 1)},
            pools={"student": {"shared": True}},
        ),
        "gpu",
        (1, 4),
        {
            "student": ["0.0", "0.1", "0.2", "0.3"],
            "rollout": ["0.0+0.1", "0.2+0.3"],
            "teachers.math": ["0.0"],
        },
    ),
    "several nodes, filled in order": (
        recipe(ranks=6, tp=3, rollout=(1, 4), nodes=2, per_node=8),
        "gpu",
        (2, 8),
        {
            "student": ["0.0", "0.1", "0.2", "0.3", "0.4", "0.5"],
            "rollout": ["1.0+1.1+1.2+1.3"],
        },
    ),
    "a group that does not go on a node's rest goes on the next": (
        recipe(ranks=6, tp=3, rollout=(2, 1), nodes=2, per_node=4),
        "npu",
        (2, 4),
        {"student": ["0.0", "0.1", "0.2", "1.0", "1.1", "1.2"], "rollout": ["0.3", "1.3"]},
    ),
    "nodes of no given size share evenly": (
        recipe(ranks=4, tp=2, rollout=(2, 1), nodes=2),
        "gpu",
        (2, 3),
        {"student": ["0.0", "0.1", "1.0", "1.1"], "rollout": ["0.2", "1.2"]},
    ),
    "processors beside accelerators have no limit": (
        recipe(
            ranks=2,
            teachers={"math": ("host", 3, 1), "code": ("host", 1, 2)},
            pools={"host": {"device": "cpu"}},
            nodes=2,
            per_node=1,
        ),
        "gpu",
        (2, 1),
        {
            "student": ["0.0", "1.0"],
            "teachers.math": ["0.0", "1.0", "0.1"],
            "teachers.code": ["1.1+1.2"],
        },
    ),
    "a shared pool that is spread stays whole for its widest engine": (
        recipe(
            ranks=12,
            teachers={"math": ("judges", 2, 2), "code": ("judges", 1, 1)},
            pools={"judges": {"shared": True}},
            nodes=2,
            per_node=8,
        ),
        "gpu",
        (2, 8),
        {
            "student": [f"0.{i}" for i in range(8)] + [f"1.{i}" for i in range(4)],
            "teachers.math": ["1.4+1.5", "1.6+1.7"],
            "teachers.code": ["1.4"],
        },
    ),
    "a shared pool over two nodes": (
        recipe(
            ranks=4,
            tp=2,
            teachers={"math": ("judges", 2, 2), "code": ("judges", 4, 1)},
            pools={"judges": {"shared": True}},
            launcher="torchrun",
            nodes=2,
            per_node=4,
        ),
        "gpu",
        (2, 4),
        {
            "student": ["0.0", "0.1", "1.0", "1.1"],
            "teachers.math": ["0.2+0.3", "1.2+1.3"],
            "teachers.code": ["0.2", "0.3", "1.2", "1.3"],
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_cases(name: str) -> None:
    config, device, (num_nodes, per_node), wanted = CASES[name]
    plan = place(config, device=device)
    assert (plan.num_nodes, plan.num_devices_per_node) == (num_nodes, per_node)
    assert seats(plan) == wanted
    assert plan == place(config, device=device)


def test_under_torchrun_ranks_sit_evenly_and_engines_behind_them() -> None:
    config = recipe(tp=2, rollout=(2, 1), launcher="torchrun", nodes=2, per_node=4)
    plan = place(config, world_size=4, device="gpu")
    assert seats(plan) == {"student": ["0.0", "0.1", "1.0", "1.1"], "rollout": ["0.2", "0.3"]}
    with pytest.raises(ConfigError, match=r"cluster\.num_nodes=2: 2 ranks .* multiple of 4 ranks"):
        place(config, world_size=2, device="gpu")
    asked = recipe(ranks=4, launcher="torchrun")
    with pytest.raises(ConfigError, match=r"num_devices=4: the job has 2 ranks; start 4"):
        place(asked, world_size=2, device="cpu")


def test_who_is_inside_and_at_urls() -> None:
    teachers = {
        "a": {"model": "a"},
        "b": {"model": "b", "backend": {"type": "vllm", "urls": ["http://127.0.0.1:1"]}},
        "c": {"model": "c", "backend": {"type": "vllm"}},
        "d": {"model": "d", "weight": 0.0},
    }
    plan = place(RunConfig.model_validate({"teachers": teachers}), device="cpu")
    assert plan.inside == ("rollout", "teachers.a")
    assert plan.reached == ("teachers.b",)
    assert [pool.name for pool in plan.pools] == ["student", "c"]
    in_ray = place(
        RunConfig.model_validate({"teachers": teachers, "launcher": "ray"}), device="cpu"
    )
    assert in_ray.inside == ("rollout",)
    assert [pool.name for pool in in_ray.pools] == ["student", "a", "c"]


def test_notes_name_what_is_idle() -> None:
    teachers = {"math": ("judges", 2, 2)}
    config = recipe(teachers=teachers, pools={"judges": {"num_devices": 6, "shared": True}})
    plan = place(config, device="gpu")
    assert plan.notes == (
        "2 of 6 devices of pools.judges are idle: raise backend.server.replicas, or lower "
        "num_devices",
        "pools.judges.shared: it has one member, so nobody takes turns",
    )
    assert len(plan.pools[1].slots) == 6
    rest = place(recipe(ranks=2, per_node=8), device="gpu")
    assert rest.notes == ("6 of 8 devices of the cluster have nobody",)
