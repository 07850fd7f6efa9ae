"""A mistake is one line with its remedy and exit code 2, before any model is loaded or built."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mopd.demo import World
from tests.faults.refusals import changed_copy
from tests.helpers.runs import ROOT, environment, launch, step_lines, words


def complaint(recipe: str, overrides: list[str], *, world_size: int = 1) -> str:
    """The one line on stderr."""
    result = subprocess.run(
        [sys.executable, "launch/train.py", f"recipe={recipe}", *overrides],
        cwd=ROOT,
        env=environment() | {"WORLD_SIZE": str(world_size), "RANK": "0"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.step=10", "did you mean `train.steps`"),
        ("train.steps=ten", "train.steps: expected a valid integer, got 'ten'"),
        ("rollout.backend.type=vlm", "expected 'hf', 'vllm', 'replay', 'dataset' or 'custom'"),
        ("launcher=slurm", "launcher: expected 'torchrun'"),
    ],
)
def test_a_wrong_key_or_type_costs_no_world(override: str, expected: str, tmp_path: Path) -> None:
    assert expected in complaint("mopd_ctkd", [override, f"cache_dir={tmp_path / 'cache'}"])
    assert not os.path.exists(tmp_path / "cache")


def test_an_unknown_recipe_lists_what_there_is() -> None:
    assert "mopd_ctkd, mopd_ctkd_vllm, mopd_gold, mopd_kl" in complaint("mopd_ctk", [])


@pytest.mark.parametrize(
    ("parallel", "world_size", "expected"),
    [
        ({"tensor_model_parallel_size": 3}, 3, "must divide the model's attention heads (2)"),
        ({"tensor_model_parallel_size": 2}, 3, "does not divide the world size 3"),
        ({"expert_model_parallel_size": 2}, 2, "needs a mixture of experts"),
    ],
)
def test_an_impossible_layout(
    parallel: dict[str, int], world_size: int, expected: str, tiny_world: World, tmp_path: Path
) -> None:
    overrides = {f"student__parallel__{key}": value for key, value in parallel.items()}
    found = complaint(
        "mopd_ctkd", words(tiny_world, tmp_path, "x", **overrides), world_size=world_size
    )
    assert expected in found


def test_kl_refuses_a_teacher_with_another_tokenizer(tiny_world: World, tmp_path: Path) -> None:
    found = complaint("mopd_kl", words(tiny_world, tmp_path, "x"))
    assert "use ctkd or gold" in found
    assert not (tmp_path / "x" / "checkpoints").exists()


def test_a_row_that_no_teacher_judges(tiny_world: World, tmp_path: Path) -> None:
    overrides = words(tiny_world, tmp_path, "x", teachers__upper__domains="[other]")
    found = complaint("mopd_ctkd", overrides)
    assert "no teacher judges domain='upper'" in found


def test_a_row_that_a_template_refuses(tiny_world: World, tmp_path: Path) -> None:
    refusing = changed_copy(
        tiny_world.teachers["sort"],
        tmp_path / "m",
        template=lambda text: "{{ raise_exception('no') }}" + text,
    )
    overrides = words(tiny_world, tmp_path, "x", teachers__sort__model=refusing)
    found = complaint("mopd_ctkd", overrides)
    assert "data.path: row " in found and "teachers.sort: " in found
    assert "the chat template refuses messages of user (no); change" in found


def test_a_secret_in_the_place_of_its_name(tiny_world: World, tmp_path: Path) -> None:
    backend = "{type: vllm, urls: ['http://127.0.0.1:1'], api_key_env: sk-SECRET-123}"
    found = complaint("mopd_ctkd", words(tiny_world, tmp_path, "x", rollout__backend=backend))
    assert "rollout.backend.api_key_env: give the NAME" in found and "SECRET" not in found


def test_nobody_to_write_the_off_policy_answers(tiny_world: World, tmp_path: Path) -> None:
    """Though other prompts have an author."""
    overrides = words(
        tiny_world,
        tmp_path,
        "x",
        rollout__lmbda=0.99,
        rollout__off_policy="teacher",
        teachers__upper__backend__type="uniform",
    )
    done = launch("mopd_ctkd", overrides, timeout=120)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "rollout.off_policy=teacher: no teacher of prompt " in done.stderr
    assert not (tmp_path / "x" / "metrics.jsonl").exists()


def test_a_context_that_some_answers_exceed(tiny_world: World, tmp_path: Path) -> None:
    narrow = changed_copy(
        tiny_world.teachers["sort"], tmp_path / "m", config={"max_position_embeddings": 26}
    )
    overrides = words(tiny_world, tmp_path, "x", train__steps=2, teachers__sort__model=narrow)
    done = launch("mopd_ctkd", overrides, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "warning: teachers.sort: reads 26 tokens, and " in " ".join(done.stdout.split())
    lines = step_lines(tmp_path / "x")
    assert sum(line.get("missing/sort/context", 0) for line in lines) > 0
