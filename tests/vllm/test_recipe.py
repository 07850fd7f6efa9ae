"""The recipe whose teachers and sampler are all vLLM servers that mopd starts."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mopd.demo import World
from mopd.serving.journal import read_journal
from tests.helpers.runs import launch, step_lines, summary, words
from tests.helpers.started import RUN_SECONDS, running, servers_of, wait_for_steps
from tests.helpers.vllm_server import MAX_MODEL_LEN, vllm_python

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(900)]

STEPS, ANSWERS = 20, 8
TOLERANCE = 1e-3
COMPARED = ("loss", "loss/sort", "loss/upper", "kl/sort", "kl/upper", "masked")
SERVED = ("rollout", "teachers__sort", "teachers__upper")


def few(world: World, directory: Path, name: str, **keys: object) -> list[str]:
    settings = {"train__steps": STEPS, "evaluate__max_prompts_per_domain": 4} | keys
    return words(world, directory, name, **settings)


@pytest.fixture
def trainer(tiny_world: World, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    keys: dict[str, object] = {"rollout__backend__deadline_s": 20}
    for section in SERVED:
        keys[f"{section}__backend__server__python"] = vllm_python()
        keys[f"{section}__backend__server__args"] = f"[--max-model-len,{MAX_MODEL_LEN}]"
    given, hold = few(tiny_world, tmp_path, "served", **keys), (STEPS // 2, tmp_path / "go on")
    with running("mopd_ctkd_vllm", given, hold=hold) as process:
        yield process


def test_a_run_on_servers_alone_is_that_of_a_replay_in_process(
    trainer: subprocess.Popen[str], tiny_world: World, tmp_path: Path
) -> None:
    """Also when the server that samples is killed: it comes back without weights, and gets them."""
    run = tmp_path / "served"
    wait_for_steps(trainer, run / "metrics.jsonl", 3)
    servers = servers_of(trainer.pid)
    assert len(servers) == 3
    (sampling,) = [one for one in servers if str(tiny_world.student) in one.cmdline()]
    os.killpg(sampling.pid, signal.SIGKILL)
    (tmp_path / "go on").touch()
    out, err = trainer.communicate(timeout=2 * RUN_SECONDS)
    assert trainer.returncode == 0, err
    assert out.count("is ready after") == 4, out

    records = read_journal(run)
    assert len(records) == STEPS * ANSWERS
    assert all(record["version"] == step for (step, _, _), record in records.items())
    answers = {"issued": STEPS * ANSWERS, "trained": STEPS * ANSWERS, "dropped": {}, "in_flight": 0}
    assert summary(run)["answers"] == answers
    lines = step_lines(run)
    assert max(line["sync/probe"] for line in lines) < TOLERANCE
    assert sum(sum(v for k, v in x.items() if k.startswith("requests/rollout/")) for x in lines)

    replay = {"rollout__backend__type": "replay", "rollout__backend__path": run}
    near = launch("mopd_ctkd", few(tiny_world, tmp_path, "replayed", **replay))
    assert near.returncode == 0, near.stderr
    for one, two in zip(step_lines(tmp_path / "replayed"), lines, strict=True):
        for key in COMPARED:
            assert two[key] == pytest.approx(one[key], abs=TOLERANCE), (one["step"], key)
