"""Pools that cannot work are refused before anything is started."""

from __future__ import annotations

from typing import Any

import pytest

from mopd.config.pools import check_pools
from mopd.config.schema import RunConfig

SERVED = {"type": "vllm"}
SHARED = {"judges": {"shared": True}}


def problems(*, rollout: dict[str, Any] | None = None, **sections: Any) -> list[str]:
    teachers = {"a": {"model": "x", "pool": "judges", "backend": SERVED}}
    known = {"teachers": teachers, "rollout": rollout or {}, "pools": SHARED}
    return list(check_pools(RunConfig.model_validate(known | sections)))


def sampler(*, replicas: int, weight_sync: str, pool: str | None) -> dict[str, Any]:
    backend = SERVED | {"weight_sync": weight_sync, "server": {"replicas": replicas}}
    return {"backend": backend, "pool": pool}


@pytest.mark.parametrize(
    ("replicas", "weight_sync", "pool", "is_refused"),
    [
        (2, "broadcast", "judges", True),
        (1, "broadcast", "judges", False),
        (2, "files", "judges", False),
        (2, "broadcast", None, False),
    ],
)
def test_engines_in_turn_take_part_in_no_broadcast(
    replicas: int, weight_sync: str, pool: str | None, is_refused: bool
) -> None:
    """The first would hold the devices until the second has come, which waits for them."""
    found = problems(rollout=sampler(replicas=replicas, weight_sync=weight_sync, pool=pool))
    assert len(found) == is_refused
    for line in found:
        assert line.startswith("rollout.backend.weight_sync=broadcast: needs all 2 engines at once")


@pytest.mark.parametrize("name", ["<i>", "a b", "a/b", "a\nb"])
def test_names_are_plain(name: str) -> None:
    teachers = {"a": {"model": "x", "pool": name, "backend": SERVED}}
    found = problems(teachers=teachers, pools={name: {"shared": True}})
    assert found == [f"pools.{name}: a name has letters, digits, `-` and `_` only; rename it"]


def test_a_pool_with_nobody_is_refused() -> None:
    (line,) = problems(pools={**SHARED, "spare": {}})
    assert line.startswith("pools.spare: nobody is in it")
