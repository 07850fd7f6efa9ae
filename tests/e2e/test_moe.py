"""A mixture of experts is distilled like any other student."""

from __future__ import annotations

from pathlib import Path

import pytest

from mopd.config.model_shape import read_model_config
from mopd.demo import World
from tests.helpers.dist import run_ranks
from tests.helpers.runs import step_lines, train_here, words
from tests.helpers.upcycle import upcycle


@pytest.mark.dist
def test_a_run_with_experts_in_one_process_and_in_a_pipeline(
    tiny_world: World, tmp_path: Path
) -> None:
    student = upcycle(tiny_world.student, tmp_path / "student", noise=0.01)
    short = {"student__model": student, "train__steps": 3, "evaluate__max_prompts_per_domain": 4}
    given = words(tiny_world, tmp_path, "one", **short)
    run_ranks(train_here, 1, "mopd_ctkd", given, timeout=120)
    one = step_lines(tmp_path / "one")
    assert all(line["moe/max_load"] >= 1.0 for line in one)
    assert one[-1]["moe/load_balancing"] < one[0]["moe/load_balancing"]
    assert read_model_config(tmp_path / "one" / "hf") == read_model_config(student)
    split = words(
        tiny_world,
        tmp_path,
        "split",
        **short,
        student__parallel__pipeline_model_parallel_size=2,
        rollout__backend__type="replay",
        rollout__backend__path=tmp_path / "one",
    )
    run_ranks(train_here, 2, "mopd_ctkd", split, timeout=120)
    for mine, other in zip(step_lines(tmp_path / "split"), one, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert mine["moe/load_balancing"] == pytest.approx(other["moe/load_balancing"], rel=1e-3)
