"""Recipes of recipes/gpu and recipes/npu: each is a run that starts, on the cluster it declares."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from mopd.config import RunConfig, load_config
from mopd.config.check import check_config
from mopd.config.check_servers import is_started
from mopd.config.load import LAYERS, RECIPES
from mopd.config.model_shape import CATALOGUE
from mopd.config.pools import backends_of
from mopd.runtime.memory import estimate, read_shapes, too_large
from mopd.runtime.placement import Plan, place

DOCS = RECIPES.parent / "docs" / "scaling.md"
KINDS = {"gpu": "cuda", "npu": "npu"}


@dataclass(frozen=True)
class Wanted:
    """Devices by pool; what is shared counts once."""

    nodes: int
    per_node: int
    pools: dict[str, int]
    shared: tuple[str, ...] = ()


TABLE = {
    "gpu/single_gpu": Wanted(1, 1, {"student": 1}),
    "gpu/qwen3_llama_8gpu_dedicated": Wanted(
        1, 8, {"student": 4, "rollout": 2, "qwen": 1, "llama": 1}
    ),
    "gpu/qwen3_llama_8gpu_shared": Wanted(
        1, 8, {"student": 4, "rollout": 3, "judges": 1}, shared=("judges",)
    ),
    "gpu/qwen3_llama_2nodes": Wanted(2, 8, {"student": 8, "rollout": 4, "qwen": 2, "llama": 2}),
    "gpu/qwen3_30b_a3b_4nodes": Wanted(
        4, 8, {"student": 16, "rollout": 4, "math": 4, "code": 4, "chat": 4}
    ),
    "npu/qwen3_1p7b_two_teachers": Wanted(
        1, 8, {"student": 4, "rollout": 2, "qwen": 1, "llama": 1}
    ),
    "npu/qwen3_1p7b_two_teachers_shared": Wanted(
        1, 8, {"student": 4, "rollout": 3, "judges": 1}, shared=("judges",)
    ),
}


def names() -> list[str]:
    files = chain.from_iterable((RECIPES / kind).glob("*.yaml") for kind in KINDS)
    return sorted(
        file.relative_to(RECIPES).with_suffix("").as_posix()
        for file in files
        if file.stem not in LAYERS
    )


def load(name: str, overrides: Sequence[str] = ()) -> RunConfig:
    return load_config(name, overrides)


def plan_of(config: RunConfig, *, world_size: int | None) -> Plan:
    device = {"cuda": "gpu", "npu": "npu", "cpu": "cpu"}[config.run.device]
    return place(config, world_size=world_size, device=device)  # pyright: ignore[reportArgumentType]


def test_the_table_is_whole() -> None:
    assert names() == sorted(TABLE)


@pytest.mark.parametrize("launcher", ["torchrun", "ray"])
@pytest.mark.parametrize("name", TABLE)
def test_a_recipe_fits_its_cluster(name: str, launcher: str) -> None:
    config, wanted = load(name, [f"launcher={launcher}"]), TABLE[name]
    ranks = wanted.pools["student"]
    check_config(config, world_size=ranks, files=False)
    plan = plan_of(config, world_size=ranks if launcher == "torchrun" else None)
    assert (plan.num_nodes, plan.num_devices_per_node) == (wanted.nodes, wanted.per_node)
    assert {pool.name: len(pool.slots) for pool in plan.pools} == wanted.pools
    assert tuple(pool.name for pool in plan.pools if pool.shared) == wanted.shared
    taken = [slot for pool in plan.pools for slot in pool.slots]
    assert len(set(taken)) == len(taken) == wanted.nodes * wanted.per_node  # all, and none twice
    assert plan.notes == ()


@pytest.mark.parametrize("name", TABLE)
def test_memory_is_enough(name: str) -> None:
    config = load(name)
    plan = plan_of(config, world_size=None)
    shares = estimate(config, plan, read_shapes(config))
    assert too_large(config, plan, shares) == []
    small = load(name, ["cluster.device_memory_gb=1"])
    assert too_large(small, plan, shares) != []


@pytest.mark.parametrize("name", TABLE)
def test_a_recipe_declares_its_cluster_and_device(name: str) -> None:
    config = load(name)
    declared = config.cluster
    assert config.run.device == KINDS[name.partition("/")[0]]
    assert config.run.name == name.partition("/")[2]
    assert declared.num_devices_per_node is not None
    assert declared.device_memory_gb is not None


@pytest.mark.parametrize("name", TABLE)
def test_paths_follow_the_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOPD_MODELS", "/shared/models")
    monkeypatch.setenv("MOPD_DATA", "/shared/data")
    config = load(name)
    models = [config.student.model, *(teacher.model for teacher in config.teachers.values())]
    for model in models:
        assert model is not None
        assert Path(model).parent == Path("/shared/models")
        assert (CATALOGUE / Path(model).name / "config.json").is_file()
    assert config.data.path == "/shared/data/train.jsonl"
    assert config.data.heldout_path == "/shared/data/heldout.jsonl"


@pytest.mark.parametrize("name", TABLE)
def test_servers_hold_an_answer_and_get_time_to_start_again(name: str) -> None:
    config = load(name)
    backends = {k: b for k, b in backends_of(config).items() if is_started(b)}
    for owner, backend in backends.items():
        words = dict(zip(backend.server.args[::2], backend.server.args[1::2], strict=True))
        context = int(words["--max-model-len"])
        assert context >= 2 * config.rollout.max_new_tokens, owner  # the prompt has the other half
        assert backend.restart_budget_s >= backend.start_s, owner
        assert backend.server.max_restarts > 0, owner
        # a step that waits for it is no stall
        assert config.run.stall_s > backend.deadline_s + backend.restart_budget_s, owner


@pytest.mark.parametrize("name", TABLE)
def test_the_head_of_a_recipe_names_it_and_what_exists(name: str) -> None:
    lines = (RECIPES / f"{name}.yaml").read_text().splitlines()
    head = [line for line in lines[: lines.index("run:")] if line.startswith("#")]
    commands = "\n".join(head)
    assert set(re.findall(r"recipe=([\w/]+)", commands)) == {name}
    files = re.findall(r"launch/[\w./]+", commands)
    assert files and all((RECIPES.parent / file).is_file() for file in files)
    ranks = re.search(r"--nproc-per-node (\d+)", commands)
    wanted = TABLE[name]
    assert int(ranks[1] if ranks else 1) == wanted.pools["student"] // wanted.nodes


def test_the_two_teachers_on_npus_weigh_a_fifth_and_four() -> None:
    config = load("npu/qwen3_1p7b_two_teachers")
    assert {name: one.weight for name, one in config.teachers.items()} == {
        "qwen": 0.8,
        "llama": 0.2,
    }
    assert all(one.domains == () for one in config.teachers.values())  # both judge every answer


def test_the_docs_list_every_recipe() -> None:
    listed = re.findall(r"^\| `((?:gpu|npu)/\w+)`", DOCS.read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(TABLE)


def test_a_shared_pool_is_the_only_difference_of_the_shared_recipes() -> None:
    for name in ("gpu/qwen3_llama_8gpu", "npu/qwen3_1p7b_two_teachers"):
        suffix = "_dedicated" if name.startswith("gpu") else ""
        dedicated = flat(load(name + suffix))
        shared = flat(load(f"{name}_shared"))
        differing = {key for key in {*dedicated, *shared} if dedicated.get(key) != shared.get(key)}
        roots = {".".join(key.split(".")[:2]) for key in differing}
        assert roots == {
            "run.name",
            "teachers.qwen",
            "teachers.llama",
            "rollout.backend",
            "pools.judges",
        }


def flat(config: RunConfig) -> dict[str, object]:
    found: dict[str, object] = {}

    def walk(value: object, path: str) -> None:
        if isinstance(value, dict) and value:
            for key, child in value.items():
                walk(child, f"{path}.{key}" if path else str(key))
        else:
            found[path] = value

    walk(OmegaConf.to_container(OmegaConf.create(config.model_dump(mode="json"))), "")
    return found
