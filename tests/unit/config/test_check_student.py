"""Mistakes in what of the student learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mopd.config.check import check_config
from mopd.config.check_student import check_student
from mopd.config.load import load_config
from mopd.errors import ConfigError

LORA = "student.lora.rank=8"
PEFT: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["v_proj", "q_proj"],
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "modules_to_save": None,
    "lora_dropout": 0.1,
    "rank_pattern": {},
}


def problems(*words: str) -> list[str]:
    return list(check_student(load_config("mopd_ctkd", list(words))))


@pytest.mark.parametrize(
    "words",
    [
        [],
        [LORA, "student.lora.alpha=32", "student.lora.target_modules=[q_proj,v_proj]"],
        ["student.freeze=['.*norm.*']"],
        ["student.recompute={granularity: full, method: block, num_layers: 2}"],
        ["student.recompute.granularity=selective"],
    ],
)
def test_what_fits_together_passes(words: list[str]) -> None:
    assert problems(*words) == []


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["student.lora.alpha=32"], "student.lora.alpha: is only read with student.lora.rank"),
        (["student.lora.path=/x"], "student.lora.path: is only read with student.lora.rank"),
        (["student.lora.target_modules=[q_proj]"], "student.lora.target_modules: is only read"),
        ([LORA, "student.freeze=[a]"], "student.freeze: with student.lora.rank the model is"),
        (["student.freeze=['(']"], "student.freeze: `(` is not a regular expression"),
        ([LORA, "student.lora.target_modules=[]"], "student.lora.target_modules: is empty"),
        ([LORA, "student.lora.target_modules=[lm_head]"], "target_modules: `lm_head` is not a"),
        (
            [LORA, "student.lora.target_modules=[q_proj,q_proj]"],
            "student.lora.target_modules: lists a layer twice",
        ),
        (["student.recompute.method=block"], "student.recompute.method: is only read with"),
        (
            ["student.recompute={granularity: selective, num_layers: 2}"],
            "student.recompute.num_layers: is only read with student.recompute.granularity=full",
        ),
        ([LORA, "student.lora.path=/nowhere"], "student.lora.path: /nowhere has no adapter_config"),
    ],
)
def test_a_mistake_is_one_line_with_the_key(words: list[str], found: str) -> None:
    (problem,) = problems(*words)
    assert found in problem and "\n" not in problem


def of_adapter(directory: Path, **content: Any) -> list[str]:
    (directory / "adapter_config.json").write_text(json.dumps(PEFT | content))
    (directory / "adapter_model.safetensors").touch()
    targets = "student.lora.target_modules=[q_proj,v_proj]"
    return problems(LORA, targets, f"student.lora.path={directory}")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"peft_type": "IA3"}, "is not a LoRA adapter"),
        ({"use_rslora": True}, "use_rslora=True, which is not supported"),
        ({"use_dora": True}, "use_dora=True, which is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head'], which is not"),
        ({"bias": "all"}, "bias='all', which is not supported"),
        ({"alpha_pattern": {"q_proj": 1}}, "alpha_pattern={'q_proj': 1}, which is not supported"),
        ({"layers_to_transform": [0]}, "layers_to_transform=[0], which is not supported"),
        ({"r": 4}, "student.lora.rank=8: "),
        ({"lora_alpha": 8}, "student.lora.alpha=16: "),
        ({"target_modules": ["q_proj"]}, "student.lora.target_modules=[q_proj, v_proj]: "),
        ({"target_modules": "all-linear"}, "has all-linear; both must be the same list"),
    ],
)
def test_an_adapter_that_does_not_agree_is_refused(
    tmp_path: Path, content: dict[str, Any], found: str
) -> None:
    assert of_adapter(tmp_path) == []
    (problem,) = of_adapter(tmp_path, **content)
    assert found in problem and "\n" not in problem


def test_a_recipe_is_checked(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    words = ["teachers.a.model=/x", "student.lora.alpha=32"]
    with pytest.raises(ConfigError, match=r"student\.lora\.alpha"):
        check_config(load_config("mopd_ctkd", words), world_size=1)
