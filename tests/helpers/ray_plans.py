"""Recipes of Ray mode with engines and pools, and what stands for Ray's side of them."""

from __future__ import annotations

from typing import Any, cast

from mopd.config.schema import RunConfig
from mopd.runtime.placement import Plan
from mopd.runtime.ray.berths import berths_of

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
    """Engines are vLLM's; ``more`` are whole sections."""

    def backend(replicas: int, width: int) -> dict[str, Any]:
        server = {"replicas": replicas, "tensor_parallel_size": width}
        return {"type": "vllm", "server": server}

    named = {name: dict(section) for name, section in (pools or {}).items()}
    if ranks is not None:
        named.setdefault("student", {})["num_devices"] = ranks
    values: dict[str, Any] = {
        "launcher": "ray",
        "student": {"model": "student", "parallel": {"tensor_model_parallel_size": tp}},
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


def unreserved(plan: Plan) -> list[Any]:
    """The berths of a plan as `reserve` gives them, without a cluster."""
    from mopd.runtime.ray.cluster import Reserved

    return [
        Reserved(berth=berth, group=cast(Any, None), bundle=number)
        for pool in plan.pools
        for number, berth in enumerate(berths_of(pool))
    ]
