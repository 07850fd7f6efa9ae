"""The directory of a run: fresh, continued, refused, overwritten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mopd.config.schema import RunConfig
from mopd.errors import ConfigError, DidNotLearnError
from mopd.runtime.session import clear_directory, run_session, write_config


def config(directory: Path, **changes: Any) -> RunConfig:
    sections = {"run": {"dir": str(directory), "name": "r"}, **changes}
    sections["run"] = {"dir": str(directory), "name": "r", **changes.get("run", {})}
    return RunConfig.model_validate(sections)


def prepare(root: Path, **changes: Any) -> Path:
    run = root / "r"
    clear_directory(run, config(root, **changes))
    write_config(run, config(root, **changes))
    return run


def test_a_fresh_run_gets_its_resolved_recipe(tmp_path: Path) -> None:
    run = prepare(tmp_path)
    assert "num_prompts_per_step: 64" in (run / "config.yaml").read_text()
    assert [path.name for path in run.iterdir()] == ["config.yaml"]


def test_a_start_that_failed_binds_nobody(tmp_path: Path) -> None:
    clear_directory(tmp_path / "r", config(tmp_path))
    assert not (tmp_path / "r").exists()
    clear_directory(tmp_path / "r", config(tmp_path, run={"seed": 2}))


def test_the_same_recipe_continues_and_free_keys_may_change(tmp_path: Path) -> None:
    run = prepare(tmp_path)
    (run / "kept").touch()
    prepare(tmp_path, run={"threads": 3}, logging={"tensorboard": False})
    placed = {"cluster": {"num_nodes": 2}, "pools": {"judges": {"shared": True}}}
    prepare(tmp_path, **placed, launcher="ray", rollout={"pool": "judges"})
    prepare(tmp_path, checkpoint={"save_interval": 7})
    assert (run / "kept").exists()
    assert "save_interval: 7" in (run / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"run": {"seed": 2}}, "run.seed"),
        ({"train": {"steps": 7}}, "train.steps"),
        ({"teachers": {"a": {"weight": 2.0}}}, "teachers.a"),
        ({"ctkd": {"path_terms": False}}, "ctkd.path_terms"),
    ],
)
def test_another_recipe_is_refused_by_key(
    tmp_path: Path, changes: dict[str, Any], key: str
) -> None:
    run = prepare(tmp_path)
    before = (run / "config.yaml").read_text()
    with pytest.raises(ConfigError) as caught:
        prepare(tmp_path, **changes)
    assert key in str(caught.value) and "run.overwrite=true" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (run / "config.yaml").read_text() == before


def test_overwrite_starts_afresh(tmp_path: Path) -> None:
    run = prepare(tmp_path)
    (run / "journal").mkdir()
    (run / "summary.json").touch()
    prepare(tmp_path, run={"overwrite": True, "seed": 2})
    assert [path.name for path in run.iterdir()] == ["config.yaml"]


def test_overwrite_does_not_delete_what_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "thesis.tex").touch()
    with pytest.raises(ConfigError):
        prepare(tmp_path, run={"overwrite": True})
    assert (tmp_path / "r" / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("left", "is_kept"),
    [("teachers.a-0.log", False), ("python", False), ("thesis.tex", True), (None, True)],
)
def test_overwrite_removes_what_a_failed_start_of_servers_left(
    tmp_path: Path, left: str | None, is_kept: bool
) -> None:
    folder = tmp_path / "r" / "servers"
    folder.mkdir(parents=True)
    (folder / (left or "x.log")).touch()
    if left is None:
        (tmp_path / "r" / "beside.log").touch()
    if is_kept:
        with pytest.raises(ConfigError):
            prepare(tmp_path, run={"overwrite": True})
    else:
        prepare(tmp_path, run={"overwrite": True})
    assert folder.exists() == is_kept


@pytest.mark.parametrize("place", ["python", "checkpoints/python", "servers/other/python"])
def test_overwrite_does_not_take_any_folder_for_what_servers_import(
    tmp_path: Path, place: str
) -> None:
    folder = tmp_path / "r" / place
    folder.mkdir(parents=True)
    (folder / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="is not a run"):
        prepare(tmp_path, run={"overwrite": True})
    assert (folder / "thesis.tex").exists()


@pytest.mark.parametrize("line", ["", "{}\n"])
def test_overwrite_removes_a_journal_without_a_line_only(tmp_path: Path, line: str) -> None:
    folder = tmp_path / "r" / "journal"
    (folder / "replies-0").mkdir(parents=True)
    (folder / "rollouts-0.jsonl").write_text(line)
    if line:
        with pytest.raises(ConfigError, match="is not a run"):
            prepare(tmp_path, run={"overwrite": True})
    else:
        prepare(tmp_path, run={"overwrite": True})
    assert folder.exists() == bool(line)


def test_a_finished_run_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = prepare(tmp_path)
    (run / "summary.json").write_text('{"learned": true}')
    assert run_session(config(tmp_path), world=None) is None
    assert "is finished" in capsys.readouterr().out
    (run / "summary.json").write_text('{"learned": false}')
    with pytest.raises(DidNotLearnError):  # a second start does not turn a failure green
        run_session(config(tmp_path), world=None)
