"""Who sits where: the table of cases, the refusals, and what holds for every recipe."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mopd.config.cluster import DeviceKind
from mopd.config.schema import RunConfig
from mopd.errors import ConfigError
from mopd.runtime.packing import cuts, first_fit
from mopd.runtime.placement import Member, Plan, Slot, place

Engines = tuple[int, int]  # replicas, devices of each


def recipe(
    *,
    ranks: int | None = None,
    tp: int = 1,
    rollout: Engines | None = None,
    rollout_pool: str | None = None,
    teachers: dict[str, tuple[str | None, int, int]] | None = None,  # pool, replicas, devices
    pools: dict[str, dict[str, Any]] | None = None,
    nodes: int = 1,
    per_node: int | None = None,
    **more: Any,
) -> RunConfig:
    def backend(replicas: int, width: int) -> dict[str, Any]:
        return {
            "type": "vllm",
            "server": {"replicas": replicas, "tensor_parallel_size": width},
        }

    named = {name: dict(section) for name, section in (pools or {}).items()}
    if ranks is not None:
        named.setdefault("student", {})["num_devices"] = ranks
    values: dict[str, Any] = {
        "launcher": "ray",
        "student": {"parallel": {"tensor_model_parallel_size": tp}},
        "teachers": {
            name: {"model": name, "pool": pool, "backend": backend(replicas, width)}
            for name, (pool, replicas, width) in (teachers or {}).items()
        },
        "pools": named,
        "cluster": {"num_nodes": nodes, "num_devices_per_node": per_node},
    }
    if rollout is not None:
        values["rollout"] = {"pool": rollout_pool, "backend": backend(*rollout)}
    return RunConfig.model_validate(values | more)


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


WIDTHS = st.sampled_from([1, 2, 3, 4, 8])
TEACHERS = st.dictionaries(
    st.sampled_from(["a", "b", "c", "d"]),
    st.tuples(st.sampled_from([None, "one", "two", "host", "student"]), st.integers(1, 4), WIDTHS),
    max_size=4,
)


@st.composite
def recipes(draw: st.DrawFn) -> tuple[RunConfig, int | None]:
    tp = draw(WIDTHS)
    ranks = tp * draw(st.integers(1, 4))
    torchrun = draw(st.booleans())
    config = recipe(
        ranks=ranks,
        tp=tp,
        rollout=draw(st.none() | st.tuples(st.integers(1, 4), WIDTHS)),
        teachers=draw(TEACHERS),
        pools={
            "student": {"shared": True},
            "one": {"shared": draw(st.booleans())},
            "two": {"shared": True},
            "host": {"device": "cpu", "shared": draw(st.booleans())},
        },
        nodes=draw(st.integers(1, 4)),
        per_node=draw(st.none() | st.sampled_from([4, 8])),
        launcher="torchrun" if torchrun else "ray",
    )
    return config, ranks if torchrun else None


@given(recipes())
def test_what_holds_for_every_plan(drawn: tuple[RunConfig, int | None]) -> None:
    config, world_size = drawn
    try:
        plan = place(config, world_size=world_size, device="gpu")
    except ConfigError as error:
        assert "\n" not in str(error)
        return
    assert plan == place(config, world_size=world_size, device="gpu")
    check_bounds(plan)
    check_members(plan, config)
    check_exclusive(plan)
    if world_size is not None:
        nodes = Counter(member.slots[0].node for member in plan.members("student"))
        assert set(nodes.values()) == {world_size // plan.num_nodes}


POWERS = st.sampled_from([1, 2, 4, 8])


@given(
    tp=POWERS,
    groups=st.integers(1, 4),
    engines=st.lists(st.tuples(st.integers(1, 3), POWERS), max_size=4),
    nodes=st.integers(1, 4),
)
def test_powers_of_two_are_refused_only_where_devices_are_missing(
    tp: int, groups: int, engines: list[Engines], nodes: int
) -> None:
    teachers = {f"t{i}": (None, *one) for i, one in enumerate(engines)}
    config = recipe(ranks=groups * tp, tp=tp, teachers=teachers, nodes=nodes, per_node=8)
    asked = groups * tp + sum(replicas * width for replicas, width in engines)
    if asked > 8 * nodes:
        with pytest.raises(ConfigError, match=rf"cluster: {asked} devices .* = {8 * nodes} are"):
            place(config, device="gpu")
    else:
        assert sum(len(pool.slots) for pool in place(config, device="gpu").pools) == asked


def check_bounds(plan: Plan) -> None:
    for pool in plan.pools:
        for slot in pool.slots:
            assert 0 <= slot.node < plan.num_nodes and slot.index >= 0
            assert pool.device == "cpu" or slot.index < plan.num_devices_per_node


def check_members(plan: Plan, config: RunConfig) -> None:
    tp = config.student.parallel.tensor_model_parallel_size
    ranks = plan.members("student")
    for start in range(0, len(ranks), tp):
        assert len({member.slots[0].node for member in ranks[start : start + tp]}) == 1
    for pool in plan.pools:
        for member in pool.members:
            assert len({slot.node for slot in member.slots}) == 1
            assert len(set(member.slots)) == len(member.slots) == width(member, config)
            assert set(member.slots) <= set(pool.slots)
    for owner in {member.owner for pool in plan.pools for member in pool.members}:
        numbers = [member.number for member in plan.members(owner)]
        assert numbers == list(range(len(numbers)))
        taken = [slot for member in plan.members(owner) for slot in member.slots]
        assert len(set(taken)) == len(taken)  # an owner never meets itself


def check_exclusive(plan: Plan) -> None:
    slots = Counter((pool.device, slot) for pool in plan.pools for slot in pool.slots)
    assert set(slots.values()) == {1}  # no device is in two pools
    for pool in plan.pools:
        by_owner = Counter[str]()
        for member in pool.members:
            by_owner[member.owner] += len(member.slots)
        asked = max(by_owner.values()) if pool.shared else sum(by_owner.values())
        assert len(pool.slots) == asked


def width(member: Member, config: RunConfig) -> int:
    if member.owner == "student":
        return 1
    if member.owner == "rollout":
        return config.rollout.backend.server.tensor_parallel_size
    name = member.owner.partition(".")[2]
    return config.teachers[name].backend.server.tensor_parallel_size


def test_powers_of_two_always_find_a_place() -> None:
    sizes = [("a", 2), ("b", 4), ("c", 1), ("d", 8), ("e", 1)]
    found = first_fit(sizes, [range(8), range(8)])
    assert found is not None
    assert {key: (room[0], len(room)) for key, room in found.items()} == {
        "d": (0, 8),
        "b": (0, 4),
        "a": (4, 2),
        "c": (6, 1),
        "e": (7, 1),
    }
    assert first_fit([*sizes, ("f", 1)], [range(8), range(8)]) is None


def test_ways_to_cut_a_shared_pool() -> None:
    assert cuts(6, [4, 1, 4]) == [[6], [4, 1, 1], [1] * 6]
    assert Slot(node=0, index=1) < Slot(node=1, index=0)
