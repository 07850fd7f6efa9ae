"""Recipes imported from other trainers really train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mopd.cli.main import main
from mopd.config.load import load_config
from mopd.config.peers import PEERS
from mopd.demo import World
from tests.helpers.dist import run_ranks
from tests.helpers.peers import EXAMPLE
from tests.helpers.runs import step_lines, train_here, words

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("name", PEERS)
def test_the_example_trains_two_steps(name: str, tiny_world: World, tmp_path: Path) -> None:
    """The world's models and rows in place of theirs; all else is what was imported."""
    recipe = tmp_path / "imported.yaml"
    assert main(["recipe", "import", str(EXAMPLE[name]), "--output", str(recipe)]) == 0
    imported = load_config(recipe)
    models = dict(zip(imported.teachers, tiny_world.teachers.values(), strict=False))
    settings: dict[str, Any] = {"student__tokenizer": "null", "data__response_key": "answer"}
    for teacher, section in imported.teachers.items():
        same = (section.loss or imported.distillation.loss) == "kl"
        settings[f"teachers__{teacher}__model"] = tiny_world.student if same else models[teacher]
        settings[f"teachers__{teacher}__tokenizer"] = "null"
    overrides = [
        word
        for word in words(tiny_world, tmp_path, "run", train__steps=2, **settings)
        if not word.startswith(("teachers.sort", "teachers.upper"))
    ]
    run_ranks(train_here, 1, str(recipe), overrides, timeout=120)
    trained = [line for line in step_lines(tmp_path / "run") if "grad_norm" in line]
    assert len(trained) == 2
    assert all(line["grad_norm"] > 0 and line["skipped"] == 0 for line in trained)
