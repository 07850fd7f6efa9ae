"""Teachers on the student's ranks say what a teacher in the lead's process says."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mopd.demo import World as EmbeddedWorld
from mopd.types import TeacherScores
from tests.dist.student.worlds import Layout
from tests.helpers import inside
from tests.helpers.dist import run_ranks
from tests.helpers.inside import World

TP2 = Layout(tp=2)
HINT = {"privileged": {"prefix": "vi", "field": "hint"}}


def world_of(world: EmbeddedWorld, kind: str, layout: Layout, **distillation: Any) -> World:
    """A teacher called sort of type ``kind``; `self` reads a private field too."""
    section: dict[str, Any] = {"backend": {"type": kind}}
    teacher = str(world.teachers["sort"])
    if kind == "self":
        teacher, section = None, section | HINT
    return World(
        student=str(world.student),
        teacher=teacher,
        layout=layout,
        section=section,
        distillation=distillation,
    )


def check_same(one: TeacherScores, two: TeacherScores) -> None:
    assert one.teacher == two.teacher and one.model_fingerprint == two.model_fingerprint
    for name in ("token_ids", "byte_ends", "valid"):
        assert np.array_equal(getattr(one, name), getattr(two, name)), name
    for name in ("logprobs", "topk_logprobs", "log_tail", "lse"):
        mine, other = getattr(one, name), getattr(two, name)
        assert mine.dtype == other.dtype and mine.shape == other.shape
        np.testing.assert_allclose(mine, other, atol=1e-4, err_msg=name)
    assert (one.topk_ids is None) == (two.topk_ids is None)
    if one.topk_ids is not None and two.topk_ids is not None:
        assert one.topk_ids.dtype == np.int32 and one.topk_ids.shape == two.topk_ids.shape
        assert (one.topk_ids == two.topk_ids).mean() > 0.97  # all but ties


@pytest.mark.dist
@pytest.mark.parametrize("layout", [Layout(), TP2, Layout(tp=2, pp=2)], ids=["one", "tp2", "4"])
@pytest.mark.parametrize("kind", ["megatron", "self"])
@pytest.mark.parametrize("top_k", [8, None])
def test_scores_are_those_of_type_hf(
    tiny_world: EmbeddedWorld, kind: str, layout: Layout, top_k: int | None
) -> None:
    world = world_of(tiny_world, kind, layout, top_k=top_k)
    ranks = run_ranks(inside.judge, layout.world_size, world)
    assert all(other is None for other in ranks[1:])
    found = ranks[0]
    wanted = inside.scores_of_hf(world, found.rollouts)
    assert [list(scores) for scores in found.scores] == [["sort"]] * 3 + [[], []]
    assert [list(scores) for scores in wanted] == [["sort"]] * 3 + [[], []]
    for one, two in zip(found.scores[:3], wanted[:3], strict=True):
        check_same(one["sort"], two["sort"])
    assert found.scores[2]["sort"].topk_logprobs.shape[1] == 3
    assert not found.troubles


@pytest.mark.dist
def test_weights_in_bfloat16_give_scores_that_are_near(tiny_world: EmbeddedWorld) -> None:
    world = world_of(tiny_world, "megatron", TP2)
    half = {"backend": {"type": "megatron", "dtype": "bfloat16", "offload": False}}
    found = run_ranks(inside.judge, 2, replace(world, section=half))[0]
    wanted = inside.scores_of_hf(world, found.rollouts)
    one, two = found.scores[1]["sort"], wanted[1]["sort"]
    assert one.valid.all() and one.topk_logprobs.dtype == np.float32
    assert 1e-4 < np.abs(one.logprobs - two.logprobs).max() < 0.1


@pytest.mark.dist
def test_the_adapter_is_off_and_the_prompt_is_privileged(tiny_world: EmbeddedWorld) -> None:
    """Neither what the student learned nor the plain prompt gives those scores."""
    world = world_of(tiny_world, "self", Layout())
    (found,) = run_ranks(inside.judge, 1, world)
    (plain,) = run_ranks(inside.judge, 1, replace(world, section={"backend": {"type": "self"}}))
    one, two = found.scores[0]["sort"], plain.scores[0]["sort"]
    assert one.token_ids.tolist() == two.token_ids.tolist() == found.rollouts[0].token_ids.tolist()
    assert np.abs(one.logprobs - two.logprobs).max() > 1e-3
    section = HINT | {"backend": {"type": "megatron"}}
    same = replace(world, teacher=world.student, section=section)
    (base,) = run_ranks(inside.judge, 1, same)
    check_same(one, base.scores[0]["sort"])


@pytest.mark.dist
def test_what_is_beyond_the_context_is_missing_and_counted(
    tiny_world: EmbeddedWorld, tmp_path: Path
) -> None:
    short = tmp_path / "short"
    shutil.copytree(tiny_world.teachers["sort"], short)
    config = json.loads((short / "config.json").read_text()) | {"max_position_embeddings": 22}
    (short / "config.json").write_text(json.dumps(config))
    world = replace(world_of(tiny_world, "megatron", TP2), teacher=str(short))
    found = run_ranks(inside.judge, 2, world)[0]
    wanted = inside.scores_of_hf(world, found.rollouts)
    lost = sum(int((~scores["sort"].valid).sum()) for scores in found.scores[:3])
    assert lost > 0 and found.troubles == {"missing/sort/context": lost}
    for one, two in zip(found.scores[:3], wanted[:3], strict=True):
        check_same(one["sort"], two["sort"])


@pytest.mark.dist
@pytest.mark.parametrize("rank", [0, 1, -1])
def test_what_one_rank_cannot_do_every_rank_says(tiny_world: EmbeddedWorld, rank: int) -> None:
    """Weights of rank 0 or 1 that do not come, and a lead without texts (-1)."""
    world = world_of(tiny_world, "megatron", TP2)
    said = run_ranks(inside.judge_with_a_rank_that_cannot, 2, world, rank, timeout=30)
    if rank < 0:
        assert said == ["OSError: no room", "MopdError: no room"]
    else:
        line = f"MopdError: teachers.sort: cannot score: rank {rank}: OSError: no room"
        assert said == [line, line]


@pytest.mark.dist
def test_a_teacher_whose_scores_are_no_numbers_is_refused_at_the_start(
    tiny_world: EmbeddedWorld,
) -> None:
    world = world_of(tiny_world, "megatron", TP2)
    assert run_ranks(inside.check_damaged, 2, world, float("nan"), 5) == ["nothing"] * 2
    for rank in (0, 1):
        said = run_ranks(inside.check_damaged, 2, world, float("nan"), rank)
        assert said[0] == said[1]
        assert said[0].startswith("ConfigError: teachers.sort: its scores of a fixed text are no")
