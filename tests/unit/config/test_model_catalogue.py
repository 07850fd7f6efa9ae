"""recipes/models: shapes of public models. Their sizes are those that the models' cards tell."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mopd.config.load import RECIPES
from mopd.config.model_shape import read_model_config

CATALOGUE = RECIPES / "models"
# Parameters in all, shared embeddings once; in 10^9 as on the card, with the digits it has.
PUBLISHED = {
    "Llama-3.1-8B": "8.03",
    "Llama-3.1-8B-Instruct": "8.03",
    "Llama-3.2-1B": "1.24",
    "Llama-3.2-1B-Instruct": "1.24",
    "Llama-3.2-3B": "3.21",
    "Llama-3.2-3B-Instruct": "3.21",
    "Llama-3.3-70B-Instruct": "70.6",
    "Mistral-7B-Instruct-v0.3": "7.25",
    "Mistral-7B-v0.3": "7.25",
    "Qwen2.5-1.5B": "1.54",
    "Qwen2.5-1.5B-Instruct": "1.54",
    "Qwen2.5-Coder-32B-Instruct": "32.8",
    "Qwen3-0.6B": "0.6",
    "Qwen3-1.7B": "1.7",
    "Qwen3-14B": "14.8",
    "Qwen3-30B-A3B": "30.5",
    "Qwen3-32B": "32.8",
    "Qwen3-4B": "4.0",
    "Qwen3-8B": "8.2",
}


def test_every_model_is_in_the_table() -> None:
    assert sorted(path.parent.name for path in CATALOGUE.glob("*/config.json")) == sorted(PUBLISHED)


def test_there_are_shapes_only() -> None:
    kinds = {path.suffix for path in CATALOGUE.rglob("*") if path.is_file()}
    assert kinds == {".json", ".md"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shape_has_the_published_size(name: str) -> None:
    config = AutoConfig.from_pretrained(CATALOGUE / name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    digits = len(PUBLISHED[name].partition(".")[2])
    assert f"{model.num_parameters() / 1e9:.{digits}f}" == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shape_is_one_that_a_student_may_have(name: str) -> None:
    shape = read_model_config(CATALOGUE / name)
    assert shape.vocab_size > 32_000


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Llama-3.2-1B", "Llama-3.2-3B", "Qwen2.5-1.5B"])
def test_tuned_models_have_the_shape_of_their_base(name: str) -> None:
    base = read_model_config(CATALOGUE / name)
    tuned = read_model_config(CATALOGUE / f"{name}-Instruct")
    context = {"max_position_embeddings": 0}  # tuned ones may promise less
    fields = type(base).__dataclass_fields__
    assert [getattr(base, key) for key in fields if key not in context] == [
        getattr(tuned, key) for key in fields if key not in context
    ]
