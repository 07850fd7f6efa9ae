"""`mopd study` for real: killed and continued, with an arm that fails, and its table."""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from mopd.demo import World
from tests.helpers.runs import ROOT, environment, words

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

MAIN = "import sys; from mopd.cli.main import main; sys.exit(main())"
STEPS = 40  # so many that a run is not at its end by the time that it hears it is to stop


@pytest.fixture(scope="module")
def file(tiny_world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("study")
    common = words(tiny_world, directory, "none", train__steps=STEPS, checkpoint__save_interval=2)
    study = {
        "name": "tiny",
        "seeds": [1, 2],
        "common": [word for word in common if not word.startswith(("run.name", "run.dir"))],
        "groups": {"g": {"title": "All"}},
        "arms": {
            "broken": {
                "group": "g",
                "recipe": "mopd_ctkd",
                "asks": "what becomes of the others",
                "overrides": ["rollout.stop_token_ids=[99999]"],
            },
            "orphan": {"group": "g", "recipe": "mopd_ctkd", "asks": "nothing", "after": "broken"},
            "second": {"group": "g", "recipe": "mopd_gold", "asks": "more", "after": "plain"},
            "plain": {"group": "g", "recipe": "mopd_ctkd", "asks": "how it goes"},
        },
    }
    path = directory / "tiny.yaml"
    OmegaConf.save(OmegaConf.create(study), path)
    return path


@contextmanager
def begun(file: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    """A study; it does not outlive the block, nor do its runs where it can still tell them."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            MAIN,
            "study",
            str(file),
            "--runs",
            str(file.parent / "runs"),
            *more,
        ],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=60)
        process.kill()
        process.communicate()


def results(file: Path) -> dict[tuple[str, int], dict[str, Any]]:
    path = file.parent / "runs" / "study-tiny" / "raw.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines]
    return {(one["arm"], one["seed"]): one for one in found}


def test_a_study_is_stopped_continued_and_told(file: Path) -> None:
    work = file.parent / "runs" / "study-tiny"
    with begun(file) as first:
        deadline = time.monotonic() + 200
        while not list((work / "plain-s1").glob("checkpoints/step-*")):
            assert first.poll() is None, first.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        first.send_signal(signal.SIGTERM)
        _, said = first.communicate(timeout=120)
    assert first.returncode == 130 and "goes on" in said
    before = results(file)
    assert ("second", 2) not in before

    with begun(file) as second:
        out, errors = second.communicate(timeout=400)
    assert second.returncode == 1, errors  # two arms failed
    found = results(file)
    assert len(found) == 8
    for seed in (1, 2):
        assert found["broken", seed]["status"] == "failed"
        assert "stop_token_ids: 99999 is beyond" in found["broken", seed]["error"]
        assert f"broken-s{seed}" in found["orphan", seed]["error"]
        for arm in ("plain", "second"):
            one = found[arm, seed]
            assert one["status"] == "done" and one["steps"] == STEPS and one["first_loss"] > 0
            assert not (work / f"{arm}-s{seed}" / "checkpoints").exists()
            assert (work / f"{arm}-s{seed}" / "hf" / "config.json").exists()
        given = (work / f"second-s{seed}" / "config.yaml").read_text()
        assert str(work / f"plain-s{seed}" / "hf") in given
    assert found["plain", 1]["first_loss"] != found["plain", 2]["first_loss"]
    assert "continuing from step" in (work / "plain-s1.log").read_text()
    assert "broken-s1 failed" in out

    table = (work / "table.md").read_text()
    row = next(line for line in table.splitlines() if line.startswith("| `plain`"))
    values = [found["plain", seed]["domains"]["sort"]["after"] for seed in (1, 2)]
    low, high = (f"{100 * value:.1f}" for value in (min(values), max(values)))
    deviation = 100 * statistics.stdev(values)
    mean = f"{100 * statistics.mean(values):.1f} ± {deviation:.1f} ({low}-{high})"
    assert row.split(" | ")[1] == mean and row.endswith("| 2 of 2 |")

    with begun(file, "--only", "plain", "--json") as third:
        out, errors = third.communicate(timeout=60)
    assert third.returncode == 0 and "0 runs to make" in errors  # what is done stays done
    assert len(json.loads(out)["runs"]) == 8


def test_a_run_over_the_limit_is_stopped_and_told(file: Path) -> None:
    study = OmegaConf.load(file)
    study.name, study.limit_s, study.seeds = "short", 0.5, [1]
    study.arms = {"plain": study.arms.plain}
    path = file.parent / "short.yaml"
    OmegaConf.save(study, path)
    with begun(path) as process:
        _, errors = process.communicate(timeout=200)
    assert process.returncode == 1, errors
    raw = (file.parent / "runs" / "study-short" / "raw.jsonl").read_text()
    (one,) = [json.loads(line) for line in raw.splitlines()]
    assert one["status"] == "stopped" and "limit of 0.5 s" in one["error"]
