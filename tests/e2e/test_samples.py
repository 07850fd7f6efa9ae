"""Answers that a run keeps change nothing of what it learns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mopd.cli.main import main
from mopd.demo import World
from tests.helpers.runs import launch, step_lines, words


@pytest.mark.e2e
def test_training_is_bitwise_the_same_with_and_without(tiny_world: World, tmp_path: Path) -> None:
    for name, interval in (("with", 2), ("without", "null")):
        done = launch(
            "mopd_ctkd",
            words(
                tiny_world,
                tmp_path,
                name,
                train__steps=4,
                logging__sample_interval=interval,
                logging__samples_per_domain=2,
            ),
        )
        assert done.returncode == 0, done.stderr
    assert step_lines(tmp_path / "with") == step_lines(tmp_path / "without")
    assert not (tmp_path / "without" / "samples.jsonl").exists()
    kept = [json.loads(s) for s in (tmp_path / "with" / "samples.jsonl").read_text().splitlines()]
    assert [record["step"] for record in kept] == [0] * 4 + [2] * 4 + [3] * 4
    assert {record["domain"] for record in kept} == {"sort", "upper"}
    assert all(record["teachers"][record["domain"]]["chunks"] for record in kept)
    versions = json.loads((tmp_path / "with" / "versions.json").read_text())
    assert {"mopd", "python", "torch", "megatron-core"} <= set(versions)
    assert main(["report", str(tmp_path / "with")]) == 0
    assert (tmp_path / "with" / "report.html").stat().st_size > 1e6
