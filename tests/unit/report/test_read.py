"""Directories of runs in every state a reader can find them in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mopd.errors import ConfigError
from mopd.report.facts import headroom_of
from mopd.report.read import HIDDEN, read_run, without_secrets
from tests.helpers.report_runs import finished, sample, step_line, write_run


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    lines = [step_line(step) for step in range(3)]
    run = write_run(tmp_path / "r", lines=lines, samples=[sample(0)], torn='{"step": 3, "lo')
    found = read_run(run, now=0.0)
    assert [line["step"] for line in found.lines] == [0, 1, 2]
    assert len(found.samples) == 1
    assert found.num_steps == 3 and found.problems == ()


def test_damage_inside_a_file_is_told(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", lines=[step_line(0)], torn="what\nis\n")
    found = read_run(run, now=0.0)
    assert len(found.lines) == 1
    assert any("metrics.jsonl: 2 lines" in problem for problem in found.problems)


def test_a_run_is_running_while_it_writes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", lines=[step_line(0)])
    os.utime(run / "metrics.jsonl", (1000.0, 1000.0))
    assert read_run(run, now=1300.0).status == "running"
    assert read_run(run, now=1601.0).status == "unfinished"


def test_a_finished_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", lines=[step_line(0)], summary=finished())
    found = read_run(run, now=1e12)
    assert found.status == "finished"
    assert headroom_of(found)[0].recovered == pytest.approx(0.625)
    stopped = write_run(tmp_path / "s", summary=finished(stopped_early=7))
    assert read_run(stopped, now=0.0).status == "stopped early"


def test_a_run_that_wrote_nothing_yet(tmp_path: Path) -> None:
    found = read_run(write_run(tmp_path / "r"), now=0.0)
    assert found.lines == [] and found.num_steps == 0 and headroom_of(found) == []


def test_a_damaged_file_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", lines=[step_line(0)], summary={"domains": {"a": {}}})
    (run / "samples.jsonl").unlink()
    (run / "samples.jsonl").mkdir()
    found = read_run(run, now=0.0)
    assert found.summary == {} and headroom_of(found) == []
    assert any("summary.json: not what a run writes" in one for one in found.problems)
    assert any("samples.jsonl: cannot be read" in one for one in found.problems)


@pytest.mark.parametrize(
    "text", ["[]", "", "teachers: {a: null}", "rollout: {max_staleness: x}", "train: {steps: x}"]
)
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    run = write_run(tmp_path / "r")
    (run / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match="no recipe of a run"):
        read_run(run, now=0.0)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no run"):
        read_run(tmp_path, now=0.0)


def test_secrets_are_hidden() -> None:
    found = without_secrets(
        {
            "api_key": "sk-1",
            "api_key_env": "VARIABLE",
            "eos_token": "</s>",
            "answer_key": "answer",
            "urls": ["https://user:sk-2@host/v1"],
            "server": {
                "args": [
                    "--api-key",
                    "sk-3",
                    "--api-key=sk-4",
                    "--hf-token",
                    "sk-5",
                    "--dtype",
                    "half",
                ]
            },
        }
    )
    assert "sk-" not in str(found)
    assert found["api_key"] == HIDDEN
    assert found["api_key_env"] == "VARIABLE"
    assert found["eos_token"] == "</s>" and found["answer_key"] == "answer"
    assert found["server"]["args"][-2:] == ["--dtype", "half"]
