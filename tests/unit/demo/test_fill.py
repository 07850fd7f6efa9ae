"""What the embedded world adds to a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from mopd.config import load_config
from mopd.config.check import check_config
from mopd.config.check_servers import is_started
from mopd.config.schema import RunConfig
from mopd.demo import WorldSpec
from mopd.demo.fill import WorldFill


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def filled(cache: Path, recipe: str, *overrides: str) -> RunConfig:
    fill = WorldFill(announce=False, spec=WorldSpec.tiny())
    config = load_config(recipe, [f"cache_dir={cache}", *overrides], fill=fill)
    check_config(config, world_size=1)
    return config


def test_the_world_is_served_by_vllm_in_a_short_run(cache: Path) -> None:
    config = filled(cache, "mopd_ctkd_vllm")
    assert set(config.teachers) == {"sort", "upper"}
    sections = [config.rollout.backend, *(t.backend for t in config.teachers.values())]
    assert all(is_started(section) for section in sections)
    assert config.train.steps == 20 and not config.evaluate.fail_if_not_learned
    assert config.rollout.max_new_tokens == 14  # of world.yaml
    assert filled(cache, "mopd_ctkd_vllm", "train.steps=7").train.steps == 7
    replayed = filled(
        cache, "mopd_ctkd_vllm", "rollout.backend.type=replay", f"rollout.backend.path={cache}"
    )
    assert replayed.train == config.train


def test_other_recipes_are_as_long_as_ever(cache: Path) -> None:
    config = filled(cache, "mopd_ctkd")
    assert config.train.steps == 500 and config.evaluate.fail_if_not_learned
    url = "[http://127.0.0.1:1]"
    words = ["teachers.sort.backend.type=vllm", f"teachers.sort.backend.urls={url}"]
    assert filled(cache, "mopd_ctkd", *words).train.steps == 500


def test_own_teachers_take_the_place_of_the_worlds(cache: Path) -> None:
    teacher = filled(cache, "mopd_ctkd").teachers["sort"].model
    words = [f"teachers.mine.model={teacher}", "teachers.mine.backend.type=vllm"]
    config = filled(cache, "mopd_ctkd_vllm", "teachers.sort=null", "teachers.upper=null", *words)
    assert set(config.teachers) == {"mine"}


def test_a_student_that_teaches_itself_needs_no_model_of_the_world(cache: Path) -> None:
    words = ["teachers.base.backend.type=self", "student.lora.rank=4"]
    config = filled(cache, "mopd_kl", *words)
    assert set(config.teachers) == {"base"} and config.teachers["base"].model is None
    both = filled(cache, "mopd_ctkd", *words, "teachers.sort.backend.type=megatron")
    assert set(both.teachers) == {"base", "sort"} and both.teachers["base"].model is None
    assert both.teachers["sort"].model is not None
