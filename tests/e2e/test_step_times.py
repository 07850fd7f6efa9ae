"""The phases of a real step add up to its wall time, sampled ahead or not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mopd.demo import World
from mopd.metrics.phases import PHASES
from tests.helpers.dist import run_ranks
from tests.helpers.runs import train_here, words


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.e2e
@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2])
def test_phases_add_up_to_the_step(
    tiny_world: World, tmp_path: Path, staleness: int, ranks: int
) -> None:
    settings = {"train__steps": 4, "evaluate__max_prompts_per_domain": 2}
    overrides = words(tiny_world, tmp_path, "timed", rollout__max_staleness=staleness, **settings)
    run_ranks(train_here, ranks, "mopd_ctkd", overrides, timeout=240.0)
    found = lines(tmp_path / "timed")
    assert len(found) == 4
    for line in found:
        parts = {name: line[f"phase/{name}"] for name in PHASES}
        assert sum(parts.values()) == pytest.approx(line["time/step"])
        assert all(parts[name] > 0 for name in ("align", "train", "sync"))
        assert parts["wait"] >= line["time/align/wait"] > 0
        assert (parts["rollout"] > 0) == (parts["teachers"] > 0) == (staleness == 0)
        if staleness:
            assert parts["wait"] >= line["time/gather"] > 0
        else:
            assert line["time/gather"] >= parts["rollout"] + parts["teachers"]
