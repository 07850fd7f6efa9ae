"""A cluster with four NPUs in its books: reserved, refused, given back; and what actors see of it.

The NPUs are a resource of Ray's and no devices, which is all that Ray itself looks at.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

from mopd.errors import ConfigError
from tests.helpers.ray_attached import Call, attached, head
from tests.helpers.ray_plans import recipe

pytestmark = pytest.mark.ray

VISIBLE = "ASCEND_RT_VISIBLE_DEVICES"


@pytest.fixture(scope="module")
def call() -> Iterator[Call]:
    with head(resources={"NPU": 4}) as (address, environment), attached(address, environment) as it:
        yield it


def _plan(*, ranks: int = 2, teachers: int = 1, per_node: int | None = None) -> Any:
    from mopd.runtime.placement import place

    config = recipe(ranks=ranks, tp=1, teachers={"math": (None, teachers, 1)}, per_node=per_node)
    return place(config, device="npu")


def _free(*, wanted: float | None = None) -> float:
    """NPUs; Ray's books are a moment late."""
    import ray

    deadline = time.monotonic() + 20
    while True:
        found = ray.available_resources().get("NPU", 0.0)
        if found == wanted or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def _reserves() -> tuple[list[tuple[str, dict[str, float], dict[str, float]]], float, float]:
    from mopd.runtime.ray.cluster import reserve

    with reserve(_plan(), start_s=30.0) as found:
        shown = [
            (one.berth.pool, one.berth.bundle, one.group.bundle_specs[one.bundle]) for one in found
        ]
        during = _free(wanted=1.0)
    return shown, during, _free(wanted=4.0)


def test_a_plan_is_reserved_and_given_back(call: Call) -> None:
    found, during, after = call(_reserves)
    two, one = {"CPU": 2.0, "NPU": 2.0}, {"CPU": 1.0, "NPU": 1.0}
    assert found == [("student", two, two), ("math", one, one)]
    assert (during, after) == (1.0, 4.0)


def _reserve(*, ranks: int, teachers: int, start_s: float) -> None:
    from mopd.runtime.ray.cluster import reserve

    with reserve(_plan(ranks=ranks, teachers=teachers), start_s=start_s):
        pass


def _asks_for_too_much() -> None:
    _reserve(ranks=4, teachers=2, start_s=20.0)


def test_more_than_there_is_is_refused_with_numbers(call: Call) -> None:
    with pytest.raises(ConfigError) as refused:
        call(_asks_for_too_much)  # without waiting start_s
    said = str(refused.value)
    assert "pools: the plan asks for 6 CPU and 6 NPU" in said
    assert "the Ray cluster has 8 CPU and 4 NPU" in said
    assert "\n" not in said


def _while_three_are_held() -> tuple[str, float]:
    from ray.util.placement_group import placement_group, remove_placement_group

    held = placement_group([{"NPU": 3.0}])
    assert held.wait(30)
    try:
        _reserve(ranks=1, teachers=2, start_s=5.0)  # the student is served
    except ConfigError as error:
        return str(error), _free(wanted=1.0)  # what it had got is given back
    finally:
        remove_placement_group(held)
    return "not refused", 0.0


def test_what_is_not_free_in_time_is_refused(call: Call) -> None:
    said, left = call(_while_three_are_held)
    assert "pools.math: 1 CPU and 1 NPU on each of 2 nodes or places" in said
    assert "ray.start_s=5 s" in said
    assert "of 4 NPU free" in said
    assert "\n" not in said
    assert left == 1.0
    assert call(_reserves)[1:] == (1.0, 4.0)  # nobody holds anything any more


def _over_two_nodes() -> str:
    from mopd.runtime.placement import place
    from mopd.runtime.ray.cluster import reserve

    plan = place(recipe(ranks=2, nodes=2, per_node=1), device="npu")
    try:
        with reserve(plan, start_s=4.0):
            return "on one node"
    except ConfigError as error:
        return str(error)


def test_ranks_of_two_nodes_need_two(call: Call) -> None:
    """All that they ask for is there, but on one node."""
    said = "the student's ranks are on 2 nodes, and the Ray cluster has 1; add nodes, or lower it"
    assert said in call(_over_two_nodes)


def _devices() -> list[str]:
    from mopd.config.schema import RunConfig
    from mopd.runtime.ray.cluster import device_of

    names = ("auto", "cuda", "npu", "cpu")
    return [device_of(RunConfig.model_validate({"run": {"device": name}})) for name in names]


def test_what_auto_means_here(call: Call) -> None:
    assert call(_devices) == ["npu", "gpu", "npu", "cpu"]


def _sizes() -> list[tuple[int, int]]:
    from mopd.runtime.ray.driver import _place

    plans = [_place(recipe(ranks=2, per_node=count)) for count in (None, 2)]
    return [(plan.num_nodes, plan.num_devices_per_node) for plan in plans]


def test_the_clusters_size_counts_where_the_recipe_names_none(call: Call) -> None:
    assert call(_sizes) == [(1, 4), (1, 2)]


class Seeing:
    """What a process finds in its environment, and what it sets there."""

    def found(self) -> str | None:
        return os.environ.get(VISIBLE)

    def set(self, value: str) -> None:
        os.environ[VISIBLE] = value


def _ranks() -> dict[str, Any]:
    """Real ranks that do not begin, and a process with the same share beside them."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    from mopd.runtime.ray.cluster import reserve
    from mopd.runtime.ray.students import Students

    config = recipe(ranks=2, tp=2, teachers={"math": (None, 1, 2)})
    from mopd.runtime.placement import place

    with reserve(place(config, device="npu"), start_s=30.0) as reserved:
        students = Students(
            config, reserved, directory="/", world=None, key="", show=lambda rank, line: None
        )
        students.gather()
        group = PlacementGroupSchedulingStrategy(
            reserved[1].group, placement_group_bundle_index=reserved[1].bundle
        )
        options: dict[str, Any] = {"max_concurrency": 4, "scheduling_strategy": group}
        seeing = ray.remote(Seeing).options(num_cpus=2, resources={"NPU": 2}, **options).remote()
        given = ray.get(seeing.found.remote())
        ray.get(seeing.set.remote("3,2"))
        blind = ray.remote(Seeing).options(num_cpus=0, **options).remote()
        found = {
            "devices": [place.devices for place in students._places],
            "by slot": list(students.devices.values()),
            "environments": [students._environment(rank) for rank in range(2)],
            "given": given,
            "kept": [ray.get(seeing.found.remote()) for _ in range(3)],
            "without": ray.get(blind.found.remote()),
        }
        students.kill()
        for actor in (seeing, blind):
            ray.kill(actor)
    return found


def test_actors_on_npus_see_their_own_until_they_are_told(call: Call) -> None:
    found = call(_ranks)
    ids = [one for devices in found["devices"] for one in devices]
    assert len(set(ids)) == len(ids) == 2  # one for each rank
    assert found["by slot"] == ids
    for rank, environment in enumerate(found["environments"]):
        assert environment[VISIBLE] == ",".join(ids)
        assert environment["LOCAL_RANK"] == str(rank)
    # Ray shows an engine the others, once: what the process sets itself stays
    assert {*found["given"].split(","), *ids} == {"0", "1", "2", "3"}
    assert found["kept"] == ["3,2"] * 3
    assert found["without"] is None


def _checks(version: str) -> str:
    import ray

    from mopd.runtime.ray.cluster import check_version

    before, ray.__version__ = ray.__version__, version
    try:
        check_version()
    except ConfigError as error:
        return str(error)
    finally:
        ray.__version__ = before
    return "accepted"


def test_a_ray_without_tokens_is_refused(call: Call) -> None:
    assert "ray 2.51.1 has no authentication" in call(_checks, "2.51.1")
    assert call(_checks, "2.52.0") == call(_checks, "2.100.0") == "accepted"
