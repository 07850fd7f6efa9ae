"""A teacher whose vLLM server mopd starts itself, killed in the middle of a run."""

from __future__ import annotations

import os
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from mopd.demo import World
from mopd.runtime.reached import KEY_VARIABLE
from tests.helpers.runs import launch, step_lines, words
from tests.helpers.started import RUN_SECONDS, running, servers_of, wait_for_steps
from tests.helpers.vllm_server import MAX_MODEL_LEN, vllm_python

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.e2e]

STEPS = 24
TOLERANCE = 1e-3
COMPARED = ("loss", "loss/sort", "loss/upper", "kl/sort", "masked")


def overrides(world: World, directory: Path, name: str, **keys: Any) -> list[str]:
    few = {"train__steps": STEPS, "evaluate__max_prompts_per_domain": 4}
    return words(world, directory, name, distillation__top_k=16, **few, **keys)


def listening(family: list[psutil.Process]) -> set[str]:
    """Addresses of all TCP sockets that wait for connections."""
    sockets = [one for process in family for one in process.net_connections(kind="tcp")]
    return {one.laddr.ip for one in sockets if one.status == psutil.CONN_LISTEN}


def port_of(server: psutil.Process) -> str:
    arguments = server.cmdline()
    return arguments[arguments.index("--port") + 1]


def answer_to_a_stranger(server: psutil.Process) -> int:
    url = f"http://127.0.0.1:{port_of(server)}/v1/models"
    try:
        with urllib.request.urlopen(url, timeout=20) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


@pytest.fixture
def trainer(tiny_world: World, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    more = {
        "teachers__sort__backend__type": "vllm",
        "teachers__sort__backend__server__python": vllm_python(),
        "teachers__sort__backend__server__args": f"[--max-model-len,{MAX_MODEL_LEN}]",
    }
    hold = (STEPS // 2, tmp_path / "go on")
    with running("mopd_ctkd", overrides(tiny_world, tmp_path, "far", **more), hold=hold) as process:
        yield process


def test_a_killed_server_is_started_again_and_the_run_goes_on_as_with_hf(
    trainer: subprocess.Popen[str], tiny_world: World, tmp_path: Path
) -> None:
    run = tmp_path / "far"
    wait_for_steps(trainer, run / "metrics.jsonl", 2)
    (server,) = servers_of(trainer.pid)
    family = [server, *server.children(recursive=True)]
    assert listening(family) == {"127.0.0.1"}
    assert answer_to_a_stranger(server) == 401
    port = port_of(server)
    os.killpg(server.pid, signal.SIGKILL)
    (tmp_path / "go on").touch()
    out, err = trainer.communicate(timeout=RUN_SECONDS)
    assert trainer.returncode == 0, err
    assert "died (exit code 137" in out and "starting it again, 1 of 3" in out
    assert out.count("is ready after") == 2, out

    (again,) = (run / "servers").glob("*.log")
    assert again.name == "teachers.sort-0.log"
    kept = (run / "config.yaml").read_text()
    assert "http://" not in kept and KEY_VARIABLE not in kept
    assert not [process for process in family if process.is_running()]
    assert not [one.pid for one in psutil.process_iter() if port in _words(one)]

    near = launch("mopd_ctkd", overrides(tiny_world, tmp_path, "near"))
    assert near.returncode == 0, near.stderr
    lines = list(zip(step_lines(tmp_path / "near"), step_lines(run), strict=True))
    assert len(lines) == STEPS
    for one, two in lines:
        for key in COMPARED:
            assert two[key] == pytest.approx(one[key], abs=TOLERANCE), (one["step"], key)
    assert sum(sum(v for k, v in two.items() if k.startswith("requests/sort/")) for _, two in lines)


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
