"""Routing, mixing and the other losses, as whole short runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mopd.demo import World
from tests.helpers.dist import run_ranks
from tests.helpers.runs import step_lines, summary, train_here, words

pytestmark = pytest.mark.dist


def run(world: World, directory: Path, name: str, recipe: str = "mopd_ctkd", **keys: Any) -> Any:
    """The step lines of a run of two steps in this session's pool."""
    run_ranks(
        train_here, 1, recipe, words(world, directory, name, train__steps=2, **keys), timeout=120
    )
    return step_lines(directory / name)


def test_two_teachers_on_one_sample_are_mixed_by_weight(tiny_world: World, tmp_path: Path) -> None:
    both = {"teachers__sort__domains": "[]", "teachers__upper__domains": "[]"}
    mixed = run(
        tiny_world, tmp_path, "mixed", teachers__sort__weight=1, teachers__upper__weight=3, **both
    )
    first = mixed[0]
    assert first["loss"] == pytest.approx(
        0.25 * first["loss/sort"] + 0.75 * first["loss/upper"], rel=1e-6
    )
    swapped = run(
        tiny_world, tmp_path, "swapped", teachers__sort__weight=3, teachers__upper__weight=1, **both
    )
    assert swapped[0]["loss/sort"] == first["loss/sort"]
    assert swapped[0]["grad_norm"] != first["grad_norm"]


def test_a_teacher_of_weight_zero_changes_nothing(tiny_world: World, tmp_path: Path) -> None:
    one = {"teachers__sort__domains": "[]"}
    alone = run(tiny_world, tmp_path, "alone", teachers__upper="null", **one)
    silent = run(
        tiny_world,
        tmp_path,
        "silent",
        teachers__upper__weight=0,
        teachers__upper__domains="[]",
        **one,
    )
    assert alone == silent


def test_another_teacher_gives_another_gradient(tiny_world: World, tmp_path: Path) -> None:
    usual = run(tiny_world, tmp_path, "usual")
    other = run(tiny_world, tmp_path, "other", teachers__sort__backend__type="uniform")
    assert usual[0]["kl/upper"] == other[0]["kl/upper"]
    assert usual[0]["grad_norm"] != other[0]["grad_norm"]


def test_gold_and_chunk_terms_train(tiny_world: World, tmp_path: Path) -> None:
    for name, keys in {
        "gold": {},
        "gold-chunk": {"gold__lambda_chunk": 1.0},
        "uld": {"distillation__loss": "uld"},
        "mixed-losses": {"teachers__sort__loss": "ctkd", "ctkd__lambda_chunk": 1.0},
    }.items():
        lines = run(tiny_world, tmp_path, name, recipe="mopd_gold", **keys)
        assert all(line["skipped"] == 0 and line["grad_norm"] > 0 for line in lines)


def test_a_same_tokenizer_teacher_gets_the_ids(tiny_world: World, tmp_path: Path) -> None:
    lines = run(
        tiny_world,
        tmp_path,
        "kl",
        recipe="mopd_kl",
        teachers__sort__model=tiny_world.student,
        teachers__sort__domains="[]",
        teachers__upper="null",
    )
    # the teacher is the student before the first step: nothing to learn
    assert lines[0]["kl/sort"] == pytest.approx(0.0, abs=1e-6)
    assert lines[0]["grad_norm"] == pytest.approx(0.0, abs=1e-4)
    chunks = summary(tmp_path / "kl")["chunks"]["sort"]
    assert chunks["tokens_outside_1_1"] == 0.0


def test_the_line_of_a_step_has_what_tools_rely_on(tiny_world: World, tmp_path: Path) -> None:
    run(tiny_world, tmp_path, "keys")
    text = (tmp_path / "keys" / "metrics.jsonl").read_text().splitlines()[0]
    wanted = ["step", "loss", "grad_norm", "accuracy", "tokens_per_second", "truncated", "masked"]
    wanted += [
        "canonical",
        "time/rollout",
        "time/teachers",
        "time/align",
        "time/train",
        "time/sync",
    ]
    for teacher in tiny_world.teachers:
        wanted += [f"loss/{teacher}", f"kl/{teacher}", f"alignment/{teacher}"]
    for key in wanted:
        assert f'"{key}": ' in text, key
    run_dir = tmp_path / "keys"
    for path in ("config.yaml", "summary.json", "hf/model.safetensors", "hf/tokenizer.json"):
        assert (run_dir / path).is_file(), path
    assert list((run_dir / "tensorboard").iterdir())
