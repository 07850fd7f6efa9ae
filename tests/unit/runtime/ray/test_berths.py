"""What Ray keeps free for a plan: the table of cases, and what holds for every plan."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mopd.config.cluster import DeviceKind
from mopd.config.schema import RunConfig
from mopd.errors import ConfigError
from mopd.runtime.placement import Plan, place
from mopd.runtime.ray.berths import Berth, asked, berths_of
from tests.helpers.ray_plans import recipe

SHARED = {"shared": True}
GPUS_2 = {"CPU": 2.0, "GPU": 2.0}
GPU = {"CPU": 1.0, "GPU": 1.0}

# bundle and members of every berth, by pool
Shown = dict[str, list[tuple[dict[str, float], str]]]

CASES: dict[str, tuple[RunConfig, DeviceKind, Shown]] = {
    "a laptop": (
        recipe(ranks=2, tp=2, teachers={"math": (None, 1, 1)}),
        "cpu",
        {"student": [({"CPU": 2.0}, "student 0, student 1")], "math": [({"CPU": 1.0}, "math 0")]},
    ),
    "dedicated: every engine for itself": (
        recipe(ranks=2, tp=2, rollout=(2, 1), teachers={"math": (None, 1, 2)}, per_node=8),
        "gpu",
        {
            "student": [(GPUS_2, "student 0, student 1")],
            "rollout": [(GPU, "rollout 0"), (GPU, "rollout 1")],
            "math": [(GPUS_2, "math 0")],
        },
    ),
    "shared: one berth, whose devices count once": (
        recipe(
            ranks=1,
            teachers={"math": ("judges", 1, 2), "code": ("judges", 2, 1)},
            pools={"judges": SHARED},
        ),
        "npu",
        {
            "student": [({"CPU": 1.0, "NPU": 1.0}, "student 0")],
            "judges": [({"CPU": 2.0, "NPU": 2.0}, "math 0, code 0, code 1")],
        },
    ),
    "shared over two nodes: a berth on each": (
        recipe(
            ranks=2,
            nodes=2,
            per_node=3,
            teachers={"math": ("judges", 4, 1), "code": ("judges", 1, 3)},
            pools={"judges": SHARED | {"num_devices": 4}},
        ),
        "gpu",
        {
            "student": [(GPUS_2, "student 0, student 1")],
            "judges": [
                (GPU, "math 3"),
                ({"CPU": 3.0, "GPU": 3.0}, "math 0, math 1, math 2, code 0"),
            ],
        },
    ),
    "the student over two nodes: its groups are not torn": (
        recipe(ranks=4, tp=2, nodes=2, per_node=2),
        "gpu",
        {"student": [(GPUS_2, "student 0, student 1"), (GPUS_2, "student 2, student 3")]},
    ),
    "engines on the student's devices": (
        recipe(
            ranks=4,
            tp=2,
            nodes=2,
            per_node=2,
            rollout=(2, 2),
            rollout_pool="student",
            teachers={"math": ("student", 1, 1)},
            pools={"student": SHARED},
        ),
        "gpu",
        {
            "student": [
                (GPUS_2, "student 0, student 1, rollout 0, math 0"),
                (GPUS_2, "student 2, student 3, rollout 1"),
            ]
        },
    ),
    "a teacher on the processors beside accelerators": (
        recipe(
            ranks=1,
            teachers={"math": ("slow", 2, 1)},
            pools={"slow": {"device": "cpu"}},
            per_node=1,
        ),
        "gpu",
        {"student": [(GPU, "student 0")], "slow": [({"CPU": 1.0}, f"math {n}") for n in range(2)]},
    ),
    "idle devices are not asked for": (
        recipe(ranks=1, teachers={"math": (None, 1, 1)}, pools={"math": {"num_devices": 3}}),
        "gpu",
        {"student": [(GPU, "student 0")], "math": [(GPU, "math 0")]},
    ),
}


def shown(berth: Berth) -> tuple[dict[str, float], str]:
    names = (f"{one.owner.removeprefix('teachers.')} {one.number}" for one in berth.members)
    return berth.bundle, ", ".join(names)


@pytest.mark.parametrize("case", CASES)
def test_berths(case: str) -> None:
    config, device, expected = CASES[case]
    plan = place(config, device=device)
    found = {pool.name: list(map(shown, berths_of(pool))) for pool in plan.pools}
    assert found == expected


def test_ranks_and_engines_of_a_berth() -> None:
    config, device, _ = CASES["engines on the student's devices"]
    first, second = berths_of(place(config, device=device).pools[0])
    assert [one.number for one in first.ranks] == [0, 1]
    assert [one.owner for one in first.engines] == ["rollout", "teachers.math"]
    assert [one.number for one in second.ranks] == [2, 3]
    assert [slot.node for slot in second.slots] == [1, 1]


def test_the_whole_plan() -> None:
    config, device, _ = CASES["a teacher on the processors beside accelerators"]
    assert asked(place(config, device=device)) == {"CPU": 3.0, "GPU": 1.0}


@st.composite
def plans(draw: st.DrawFn) -> Plan | None:
    """Of whatever recipe; None where it does not fit."""
    engines = st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 4]))
    tp = draw(st.sampled_from([1, 2]))
    names = draw(st.lists(st.sampled_from(["a", "b", "c"]), unique=True, max_size=3))
    pools: dict[str, dict[str, Any]] = {"student": {"shared": draw(st.booleans())}}
    homes = ["judges", None] + (["student"] if pools["student"]["shared"] else [])
    teachers = {name: (draw(st.sampled_from(homes)), *draw(engines)) for name in names}
    if any(home == "judges" for home, _, _ in teachers.values()):
        pools["judges"] = {"shared": draw(st.booleans())}
        pools["judges"]["device"] = draw(st.sampled_from([None, "cpu"]))
    config = recipe(
        ranks=tp * draw(st.integers(1, 4)),
        tp=tp,
        rollout=draw(st.none() | engines),
        rollout_pool=draw(st.sampled_from(homes[1:])),
        teachers=teachers,
        pools=pools,
        nodes=draw(st.integers(1, 3)),
        per_node=draw(st.sampled_from([None, 4, 8])),
    )
    try:
        return place(config, device=draw(st.sampled_from(["gpu", "npu", "cpu"])))
    except ConfigError:
        return None


@settings(max_examples=300)
@given(plans())
def test_everybody_has_one_berth_and_their_bundles_are_what_is_asked_for(plan: Plan | None) -> None:
    if plan is None:
        return
    total: Counter[str] = Counter()
    for pool in plan.pools:
        berths = berths_of(pool)
        seats = Counter((m.owner, m.number) for berth in berths for m in berth.members)
        assert seats == Counter((m.owner, m.number) for m in pool.members)  # each one once
        places = Counter(slot for berth in berths for slot in berth.slots)
        assert set(places.values()) == {1}  # no device is asked for twice
        assert set(places) <= set(pool.slots)
        for berth in berths:
            assert len({slot.node for slot in berth.slots}) == 1
            assert {slot for one in berth.members for slot in one.slots} == set(berth.slots)
            assert {*berth.ranks} | {*berth.engines} == {*berth.members}
            total.update(berth.bundle)
    assert asked(plan) == dict(total)
