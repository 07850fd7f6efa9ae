"""A dumped step is computed again from its files, whatever wrote it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mopd.config import load_config
from mopd.config.check import check_config
from mopd.demo import World
from mopd.errors import ArtifactError, ConfigError
from mopd.runtime.dump import Replay, replay
from mopd.runtime.dump_write import DIGEST, MANIFEST, PROJECTIONS
from tests.helpers.dist import run_ranks
from tests.helpers.runs import step_lines, train_here, words

pytestmark = [pytest.mark.dist, pytest.mark.e2e]

TP2 = {"student__parallel__tensor_model_parallel_size": 2}
CP2 = {"student__parallel__context_parallel_size": 2}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "ctkd": (1, {"distillation__crossentropy_weight": 0.5, "ctkd__lambda_chunk": 0.5}),
    "gold": (1, {"distillation__loss": "gold", "train__packing": "true"}),
    "uld": (1, {"distillation__loss": "uld", "student__fused_head": "false"}),
    "opd": (1, {"distillation__loss": "opd"}),
    "learned": (1, {"ctkd__learned__enabled": "true", "ctkd__gamma": 0.1}),
    "tp2": (2, TP2),
    "tp2 of logits": (2, TP2 | {"student__fused_head": "false", "distillation__top_k": "null"}),
    "tp2 learned": (2, TP2 | {"ctkd__learned__enabled": "true", "ctkd__gamma": 0.1}),
    "cp2": (2, CP2),
    "dp2": (2, {}),
    "pp2": (2, {"student__parallel__pipeline_model_parallel_size": 2}),
}


def dumped(
    world: World,
    directory: Path,
    keys: dict[str, Any],
    *,
    ranks: int = 1,
    recipe: str = "mopd_ctkd",
) -> Replay:
    """Of the last of two steps; what was recorded is what the step's line says."""
    settings = {"train__steps": 2, "evaluate__max_prompts_per_domain": 2, "debug__dump_step": 1}
    given = words(world, directory, "run", **{**settings, **keys})
    run_ranks(train_here, ranks, recipe, given, timeout=240)
    found = replay(directory / "run" / "dump-1")
    line = step_lines(directory / "run")[1]
    assert line["step"] == found.step == 1
    assert {key: line[key] for key in found.recorded} == pytest.approx(dict(found.recorded))
    assert any(key.startswith("kl/") for key in found.recorded)
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_computed_again(case: str, tiny_world: World, tmp_path: Path) -> None:
    ranks, keys = CASES[case]
    found = dumped(tiny_world, tmp_path, keys, ranks=ranks)
    assert found.computed.keys() == found.recorded.keys()
    assert found.largest_difference < 1e-6, found.differences


def test_a_teacher_with_the_students_tokenizer(tiny_world: World, tmp_path: Path) -> None:
    keys = {
        "teachers__sort__model": tiny_world.student,
        "teachers__sort__domains": "[]",
        "teachers__upper": "null",
    }
    found = dumped(tiny_world, tmp_path, keys, recipe="mopd_kl")
    assert found.largest_difference < 1e-6, found.differences


@pytest.fixture(scope="module")
def whole(tiny_world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    dumped(tiny_world, directory, {})
    return directory / "run" / "dump-1"


@pytest.mark.parametrize("name", ["rank-0.safetensors", PROJECTIONS, "config.yaml", MANIFEST])
def test_a_damaged_file_is_one_line(name: str, whole: Path, tmp_path: Path) -> None:
    copy = tmp_path / "dump"
    shutil.copytree(whole, copy)
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(ArtifactError) as caught:
        replay(copy)
    assert "\n" not in str(caught.value) and name in str(caught.value)
    (copy / name).unlink()
    with pytest.raises(ArtifactError) as caught:
        replay(copy)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_what_is_no_dump_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"debug\.dump_step"):
        replay(tmp_path)


def test_files_are_tensors_and_text_and_say_what_they_are(whole: Path) -> None:
    assert {path.suffix for path in whole.iterdir()} == {
        ".safetensors",
        ".json",
        ".yaml",
        ".sha256",
    }
    assert (whole / DIGEST).is_file()
    told = json.loads((whole / MANIFEST).read_text())
    assert told["versions"]["megatron-core"] and told["versions"]["torch"]
    assert {teacher["loss"] for teacher in told["teachers"]} == {"ctkd"}
    assert all(teacher["projection"]["teacher"] for teacher in told["teachers"])
    assert len(told["files"]) == len(list(whole.iterdir())) - 2


@pytest.mark.parametrize("step", [2, 3])
def test_a_step_behind_the_last_one_is_refused(
    step: int, tiny_world: World, tmp_path: Path
) -> None:
    given = words(tiny_world, tmp_path, "run", train__steps=2, debug__dump_step=step)
    with pytest.raises(ConfigError, match=f"debug.dump_step={step}: train.steps=2 ") as caught:
        check_config(load_config("mopd_ctkd", given), world_size=1)
    assert "\n" not in str(caught.value)
