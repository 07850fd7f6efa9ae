"""vLLM in the trainer's own process, in the environment that has it."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from mopd.demo import World
from mopd.serving.vllm_command import SMALL_CPU
from tests.helpers.vllm_server import ROOT, vllm_python

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_an_engine_in_this_process_takes_weights_and_samples(
    request: pytest.FixtureRequest,
) -> None:
    python = vllm_python()
    world: World = request.getfixturevalue("tiny_world")
    done = subprocess.run(
        [str(python), "-m", "tests.helpers.colocate_script", str(world.student)],
        cwd=ROOT,
        env={**os.environ, **SMALL_CPU, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    for version in told["found"]:
        assert version["probe"] < 1e-3 < 1e-2 < version["others"]
        assert version["samples"] < 1e-3
        assert version["ids"] == version["again"]
        assert len({tuple(ids) for ids in version["ids"]}) == 4
        assert len(version["greedy"]) == 2
    assert told["found"][0]["ids"] != told["found"][1]["ids"]
    assert "model.norm.weight" in told["refused"] or "vLLM cannot load" in told["refused"]
    assert told["version"] == -1  # half-loaded weights are no version
