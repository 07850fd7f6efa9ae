"""The scripts of launch/: Slurm's batch scripts run whole on this machine, with srun stood in."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mopd.demo import World
from mopd.serving.address import free_ports
from mopd.student.checkpoint import list_checkpoints, verify
from tests.faults.kills import steps_of
from tests.helpers.runs import ROOT, step_lines, words
from tests.helpers.slurm import JOB, Slurm, write_program

pytestmark = [pytest.mark.e2e, pytest.mark.dist]

KEYS: dict[str, Any] = {
    "train__steps": 2,
    "evaluate__max_prompts_per_domain": 2,
    "logging__tensorboard": "false",
}
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "launch").rglob("*")
    if path.suffix in (".sh", ".sbatch")
)
TOKEN = "not-a-real-token-of-anybody"


def free_port() -> str:
    """None that the system gives to a connection before the job listens there."""
    return str(free_ports(1)[0])


@contextlib.contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """The whole session is gone afterwards, also where a test fails."""
    with process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_there_are_scripts_for_both_launchers_and_both_devices() -> None:
    names = {Path(script).name for script in SCRIPTS}
    assert names >= {"train.sbatch", "ray.sbatch", "start_head.sh", "start_worker.sh", "submit.sh"}
    assert names >= {"cuda.sh", "npu.sh"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_bash(script: str) -> None:
    done = subprocess.run(["bash", "-n", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_slurm_job_trains(nodes: int, tmp_path: Path, tiny_world: World) -> None:
    slurm = Slurm(tmp_path / "slurm", nodes=nodes)
    overrides = words(tiny_world, tmp_path / "runs", "job", **KEYS)
    job = slurm.start(
        "launch/slurm/train.sbatch",
        ["recipe=mopd_ctkd", *overrides],
        MOPD_RANKS_PER_NODE="1",
        MASTER_PORT=free_port(),
    )
    with ended(job):
        output, _ = job.communicate(timeout=240)
    assert job.returncode == 0, output
    run = tmp_path / "runs" / "job"
    assert [line["step"] for line in step_lines(run) if "loss" in line] == [0, 1]
    [checkpoint] = list_checkpoints(run / "checkpoints")
    verify(checkpoint.path)
    ranks = {path.name for path in checkpoint.path.glob("rank-*.safetensors")}
    assert len(ranks) == nodes  # one job of all nodes, not a job on each
    assert slurm.noted("scontrol") == []


def test_the_time_limit_saves_and_queues_the_job_again(tmp_path: Path, tiny_world: World) -> None:
    slurm = Slurm(tmp_path / "slurm", nodes=1)
    keys = KEYS | {"train__steps": 5000, "checkpoint__save_interval": 5000}
    overrides = words(tiny_world, tmp_path / "runs", "job", **keys)
    job = slurm.start(
        "launch/slurm/train.sbatch",
        ["recipe=mopd_ctkd", *overrides],
        MOPD_RANKS_PER_NODE="1",
        MASTER_PORT=free_port(),
    )
    run = tmp_path / "runs" / "job"
    with ended(job):
        limit = time.monotonic() + 200
        while steps_of(run) < 2 and job.poll() is None and time.monotonic() < limit:
            time.sleep(0.02)
        job.send_signal(signal.SIGUSR1)  # what --signal=B:USR1@900 does
        output, _ = job.communicate(timeout=60)
    assert slurm.noted("scancel") == [f"--signal=TERM {JOB}.0"]
    assert slurm.noted("scontrol") == [f"requeue {JOB}"]
    assert job.returncode != 0
    assert "the same command continues" in output
    [checkpoint] = list_checkpoints(run / "checkpoints")
    assert 2 <= checkpoint.step < 5000
    verify(checkpoint.path)


def test_a_job_that_fails_is_not_queued_again(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path / "slurm", nodes=1)
    job = slurm.start(
        "launch/slurm/train.sbatch",
        ["recipe=missing"],
        MOPD_RANKS_PER_NODE="1",
        MASTER_PORT=free_port(),
    )
    with ended(job):
        output, _ = job.communicate(timeout=120)
    assert job.returncode != 0
    assert "error: recipe `missing` does not exist" in output
    assert slurm.noted("scontrol") == []


@pytest.mark.parametrize("ranks", ["", "0", "all"])
def test_a_job_without_a_number_of_ranks_is_refused(ranks: str, tmp_path: Path) -> None:
    slurm = Slurm(tmp_path / "slurm", nodes=1)
    job = slurm.start("launch/slurm/train.sbatch", ["recipe=mopd_ctkd"], MOPD_RANKS_PER_NODE=ranks)
    with ended(job):
        output, _ = job.communicate(timeout=30)
    assert job.returncode == 2
    assert output.startswith("error: MOPD_RANKS_PER_NODE: expected a number")
    assert slurm.noted("srun") == []


# Notes its words and whether it was given the token. A part of a cluster stays until it is ended,
# and the cluster answers when it is whole.
PYTHON = """
echo "$RAY_AUTH_MODE ${#RAY_AUTH_TOKEN} ${RAY_ADDRESS:+joined} $*" >>"$FAKE_SLURM/python"
case " $* " in
    *" start "*) exec sleep 600 ;;
    *has_nodes.py*) [ "$(grep -c " start " "$FAKE_SLURM/python")" -eq "$SLURM_JOB_NUM_NODES" ] ;;
    *missing*) exit 3 ;;
    *long*) trap 'exit 143' TERM; touch "$FAKE_SLURM/training"; sleep 600 & wait ;;
esac
"""


@pytest.mark.parametrize(("recipe", "code"), [("mine", 0), ("missing", 3)])
def test_a_ray_job_starts_head_workers_and_driver(recipe: str, code: int, tmp_path: Path) -> None:
    slurm = Slurm(tmp_path / "slurm", nodes=3)
    write_program(tmp_path / "python", PYTHON)
    with socket.create_server(("127.0.0.1", 0)) as listener:  # the head that workers wait for
        port = str(listener.getsockname()[1])
        job = slurm.start(
            "launch/slurm/ray.sbatch",
            [f"recipe={recipe}", "train.steps=3"],
            MOPD_PYTHON=str(tmp_path / "python"),
            MOPD_HEAD_ADDRESS="127.0.0.1",
            RAY_PORT=port,
        )
        with ended(job):
            output, _ = job.communicate(timeout=60)  # the pipe ends with the last process
    assert job.returncode == code, output
    calls = slurm.noted("python")
    assert {call[:8] for call in calls} == {"token 64"}  # 32 bytes, drawn for the job
    starts = [call for call in calls if " start " in call]
    assert any(call.endswith(f"start --head --block --port {port}") for call in starts)
    workers = [
        call for call in starts if call.endswith(f"start --address 127.0.0.1:{port} --block")
    ]
    assert len(workers) == 2
    assert calls[-1].endswith(f"joined launch/train.py launcher=ray recipe={recipe} train.steps=3")


def test_the_time_limit_reaches_the_driver_of_a_ray_job(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path / "slurm", nodes=1)
    write_program(tmp_path / "python", PYTHON)
    job = slurm.start(
        "launch/slurm/ray.sbatch", ["recipe=long"], MOPD_PYTHON=str(tmp_path / "python")
    )
    with ended(job):
        limit = time.monotonic() + 60
        while not (slurm.folder / "training").exists() and time.monotonic() < limit:
            time.sleep(0.02)
        job.send_signal(signal.SIGUSR1)
        job.wait(timeout=60)
    assert job.returncode == 143
    assert slurm.noted("scontrol") == [f"requeue {JOB}"]


def ray_script(name: str, tmp_path: Path, *given: str, **variables: str) -> Any:
    """Runs one of launch/ray with a `ray` that prints its words."""
    write_program(tmp_path / "ray", 'printf "%s\\n" "$@"; env | grep ^RAY_AUTH')
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY", "MOPD"))}
    kept |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    return subprocess.run(
        ["bash", str(ROOT / "launch/ray" / name), *given],
        env=kept | variables,
        capture_output=True,
        text=True,
        timeout=30,
    )


@pytest.mark.parametrize("name", ["start_head.sh", "start_worker.sh", "submit.sh"])
def test_nothing_of_ray_starts_without_a_token(name: str, tmp_path: Path) -> None:
    done = ray_script(name, tmp_path, RAY_ADDRESS="127.0.0.1:1", MOPD_RUNS="/shared")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no token: set RAY_AUTH_TOKEN")


def test_a_token_in_a_file_is_enough(tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(TOKEN)
    done = ray_script("start_head.sh", tmp_path, "--num-cpus", "1")
    assert "--head\n--block\n--port\n6379\n--num-cpus\n1\nRAY_AUTH_MODE=token" in done.stdout


def test_a_job_is_submitted_with_its_words_and_variables(tmp_path: Path) -> None:
    done = ray_script(
        "submit.sh",
        tmp_path,
        "recipe=gpu/single_gpu",
        "run.name=two words",
        RAY_AUTH_TOKEN=TOKEN,
        MOPD_RUNS="/shared/runs",
        MOPD_MODELS='/mo"dels',
    )
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    first = printed.index("python")
    assert printed[first:-2] == [
        *("python", "launch/train.py", "launcher=ray"),
        *("run.dir=/shared/runs", "cache_dir=/shared/runs/.cache"),
        *("recipe=gpu/single_gpu", "run.name=two words"),
    ]
    assert '"MOPD_MODELS": "/mo\\"dels"' in done.stdout
    assert TOKEN not in "\n".join(printed[:-2])


def test_a_job_needs_a_directory_that_stays(tmp_path: Path) -> None:
    done = ray_script("submit.sh", tmp_path, RAY_AUTH_TOKEN=TOKEN, MOPD_RUNS="runs")
    assert (done.returncode, done.stdout) == (2, "")
    assert "MOPD_RUNS: expected an absolute path" in done.stderr


@pytest.mark.parametrize("name", ["cuda", "npu"])
def test_an_environment_keeps_what_is_set(name: str) -> None:
    source = f"set -eu; source launch/env/{name}.sh; env"
    kept = {"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "0", "ASCEND_HOME_PATH": "/cann"}
    done = subprocess.run(
        ["bash", "-c", source], cwd=ROOT, env=kept, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert {"HF_HUB_OFFLINE=0", "CUDA_DEVICE_MAX_CONNECTIONS=1"} <= set(done.stdout.splitlines())
