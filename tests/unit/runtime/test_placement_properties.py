"""What holds for every plan that is drawn."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mopd.config.schema import RunConfig
from mopd.errors import ConfigError
from mopd.runtime.packing import cuts, first_fit
from mopd.runtime.placement import Member, Plan, Slot, place
from tests.helpers.ray_plans import Engines, recipe

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
