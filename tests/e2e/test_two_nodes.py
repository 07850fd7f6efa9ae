"""A job of two nodes: two torchrun agents, each of which starts and keeps its own servers."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from mopd.demo import World
from mopd.serving.address import free_ports
from tests.faults.kills import steps_of
from tests.helpers.runs import ROOT, environment, step_lines, words
from tests.helpers.small_server import (
    TEACHER,
    holds,
    kill_group,
    left_over,
    small_server,
    starts,
    wait_until,
)

pytestmark = [pytest.mark.e2e, pytest.mark.dist, pytest.mark.slow]

STEPS = 3
RUN_SECONDS = 200.0


def agent(node: int, *, port: int, script: Path, overrides: list[str]) -> subprocess.Popen[str]:
    """torchrun of one node, with one rank."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"),
        *("--node-rank", str(node), "--nproc-per-node", "1"),
        *("--master-addr", "127.0.0.1", "--master-port", str(port)),
        *("launch/train.py", "recipe=mopd_ctkd", *overrides),
    ]
    own = {"MOPD_HOST_ADDRESS": f"127.0.0.{1 + node}", "MOPD_VLLM_PYTHON": str(script)}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment() | own,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def scripts(tmp_path: Path) -> Iterator[list[Path]]:
    """A stand-in for vLLM on each node."""
    found = []
    for node in range(2):
        (tmp_path / f"node-{node}").mkdir()
        found.append(small_server(tmp_path / f"node-{node}", script=TEACHER))
    yield found
    for script in found:
        wait_until(lambda script=script: not left_over(script))


def test_a_run_on_two_nodes_outlives_a_server_of_one(
    tiny_world: World, tmp_path: Path, scripts: list[Path]
) -> None:
    overrides = words(
        tiny_world,
        tmp_path,
        "x",
        train__steps=STEPS,
        evaluate__max_prompts_per_domain=4,
        distillation__top_k=16,
        cluster__num_nodes=2,
        cluster__num_devices_per_node=2,
        **{f"teachers__{name}__backend__type": "vllm" for name in tiny_world.teachers},
    )
    (port,) = free_ports(1)
    run = tmp_path / "x"
    holds(scripts[1], run / "metrics.jsonl")
    with ExitStack() as opened:
        agents = [
            agent(node, port=port, script=script, overrides=overrides)
            for node, script in enumerate(scripts)
        ]
        for one in agents:
            opened.callback(one.wait)
            opened.callback(one.kill)
        deadline = time.monotonic() + RUN_SECONDS
        while not steps_of(run):
            assert all(one.poll() is None for one in agents), [one.communicate() for one in agents]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        kill_group(starts(scripts[1])[0]["pid"])
        assert steps_of(run) < STEPS
        said = [one.communicate(timeout=RUN_SECONDS)[0] for one in agents]
    assert [one.returncode for one in agents] == [0, 0], said

    # each node started what the plan puts there, and the one that lost its server, another one
    assert [len(starts(script)) for script in scripts] == [1, 2]
    for node, script in enumerate(scripts):
        told = starts(script)[0]["words"]
        assert told[told.index("--host") + 1] == f"127.0.0.{1 + node}"
        assert f"at http://127.0.0.{1 + node}:" in said[node]
    models = [starts(script)[0]["words"] for script in scripts]
    assert {m[m.index("--served-model-name") + 1] for m in models} == {
        f"teachers.{name}" for name in tiny_world.teachers
    }
    assert "died (exit code 137" in said[1] and "starting it again, 1 of 3" in said[1]
    assert "died" not in said[0]
    assert [left_over(script) for script in scripts] == [[], []]

    lines = step_lines(run)
    assert len(lines) == STEPS
    assert all(line[f"alignment/{name}"] > 0 for line in lines for name in tiny_world.teachers)
