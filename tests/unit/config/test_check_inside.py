"""Mistakes about teachers on the student's own ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mopd.errors import ConfigError
from tests.unit.config.test_check import SHAPE, check

TWO = ("student.parallel.tensor_model_parallel_size=2",)


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    """One teacher of each kind, without a mistake for one rank and for two."""
    shapes = {"model": {}, "other": {}, "odd": {"num_key_value_heads": 1}}
    shapes |= {"deep": {"num_hidden_layers": 3}, "gpt2": {"architectures": ["GPT2LMHeadModel"]}}
    for name, changes in shapes.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(SHAPE | changes))
        (tmp_path / name / "tokenizer.json").write_text("{}")
    (tmp_path / "data.jsonl").write_text("")
    return {
        "student": {"model": str(tmp_path / "model"), "lora": {"rank": 4}},
        "teachers": {
            "math": {"model": str(tmp_path / "other"), "backend": {"type": "megatron"}},
            "base": {"backend": {"type": "self"}},
        },
        "data": {"path": str(tmp_path / "data.jsonl")},
        "distillation": {"loss": "kl"},
    }


def test_a_right_recipe_passes(recipe: dict[str, Any]) -> None:
    check(recipe)
    check(recipe, *TWO, world_size=2)
    check(recipe, "distillation.top_k=null", "distillation.temperature=2")
    check(recipe, "teachers.math.backend={type: megatron, offload: false, dtype: bfloat16}")
    check(recipe, "teachers.base.backend={type: self, max_tokens_per_micro_batch: 9}")
    check(recipe, f"teachers.base.model={recipe['student']['model']}")


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        (["student.lora.rank=null"], "teachers.base.backend.type=self: is the student without"),
        (["teachers.base.model=x"], "teachers.base.model: type=self takes the student's"),
        (["teachers.base.tokenizer=x"], "teachers.base.tokenizer: type=self takes the student's"),
        (["teachers.base.eos_token=x"], "teachers.base.eos_token: type=self takes the student's"),
        (["teachers.math.model=null"], "teachers.math.model: is not set"),
        (["teachers.base.backend.offload=false"], "backend.offload: is only read by type=megatron"),
        (["teachers.base.backend.dtype=float32"], "backend.dtype: is only read by type=megatron"),
        (["teachers.math.backend.batch_size=3"], "backend.batch_size: is only read by type=hf"),
        (["teachers.math.backend.deadline_s=3"], "backend.deadline_s: is only read by type=vllm"),
        (
            ["teachers.math.backend={type: hf, max_tokens_per_micro_batch: 3}"],
            "max_tokens_per_micro_batch: is only read by type=megatron or self",
        ),
        (["teachers.math.model=DIR/gpt2"], "GPT2LMHeadModel, which is not supported; use one of"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(
    recipe: dict[str, Any], tmp_path: Path, changes: list[str], wanted: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check(recipe, *(change.replace("DIR", str(tmp_path)) for change in changes))
    line = str(caught.value)
    assert wanted in line and line.isprintable()
    assert line.startswith("teachers.") and "student.model" not in line


@pytest.mark.parametrize(
    ("model", "axis", "wanted"),
    [("odd", "tensor", "query groups (1)"), ("deep", "pipeline", "layers (3)")],
)
def test_a_teacher_must_fit_the_students_layout(
    recipe: dict[str, Any], tmp_path: Path, model: str, axis: str, wanted: str
) -> None:
    changes = [f"teachers.math.model={tmp_path / model}"]
    check(recipe, *changes)
    key = f"{axis}_model_parallel_size"
    with pytest.raises(ConfigError) as caught:
        check(recipe, *changes, f"student.parallel.{key}=2", world_size=2)
    line = str(caught.value)
    assert line.startswith("teachers.math.model: is spread over the student's ranks, and ")
    assert f"student.parallel.{key}=2 must divide" in line and wanted in line
    assert line.endswith("set teachers.math.backend.type=hf")
