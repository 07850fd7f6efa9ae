"""A recipe whose teacher knows more than the student, on rows with their own top-k."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mopd.demo import World
from tests.helpers.dist import run_ranks
from tests.helpers.runs import launch, step_lines, train_here, words

pytestmark = pytest.mark.dist


def rows_with_hints(world: World, path: Path) -> Path:
    rows = [json.loads(line) for line in world.data.read_text().splitlines()]
    for number, row in enumerate(rows):
        row |= {"hint": row["answer"], "top_k": 1 + number % 16}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def two_steps(world: World, directory: Path, name: str, **keys: object) -> list[dict]:
    settings = {"train__steps": 2, "distillation__top_k": 16, "evaluate__teachers": "false"} | keys
    run_ranks(train_here, 1, "mopd_ctkd", words(world, directory, name, **settings), timeout=120)
    return step_lines(directory / name)


def test_the_answer_is_in_the_teachers_prompt(tiny_world: World, tmp_path: Path) -> None:
    data = rows_with_hints(tiny_world, tmp_path / "data.jsonl")
    keys: dict[str, object] = {"data__path": data, "data__heldout_path": data}
    plain = two_steps(tiny_world, tmp_path, "plain", **keys)
    field = {"teachers__sort__privileged__field": "hint"}
    knowing = two_steps(tiny_world, tmp_path, "knowing", **keys, **field)
    # the first answers are the same, and only one teacher judges them otherwise
    assert knowing[0]["loss/upper"] == plain[0]["loss/upper"]
    assert knowing[0]["loss/sort"] != plain[0]["loss/sort"]
    assert knowing[0]["alignment/sort"] == plain[0]["alignment/sort"]


def test_rows_without_the_field_end_the_start(tiny_world: World, tmp_path: Path) -> None:
    overrides = words(
        tiny_world, tmp_path, "wrong", teachers__sort__privileged__field="no_such_field"
    )
    done = launch("mopd_ctkd", overrides)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "privileged.field='no_such_field' must be a string" in line and ".jsonl:" in line
