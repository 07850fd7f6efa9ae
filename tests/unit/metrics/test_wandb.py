"""W&B gets what a run logs, one W&B run per directory, no secret, and cannot stop a training."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from mopd.metrics import wandb_sink
from mopd.metrics.wandb_sink import HIDDEN, WandbSink, public, run_id
from tests.helpers.wandb_files import about, history, offline_files

SECRET = "canary-51c2-token"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """W&B finds no key and no network here, and keeps nothing in the user's folders."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "runs" / "first"
    path.mkdir(parents=True)
    return path


def opened(directory: Path, said: list[str], **config: Any) -> WandbSink:
    return WandbSink(directory, project="study", name="first", config=config, say=said.append)


def processes() -> list[str]:
    """W&B's own, below this one."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has just ended
            if "wandb" in (name := child.name()):
                found.append(name)
    return found


def test_offline_files_hold_what_was_logged(directory: Path) -> None:
    said: list[str] = []
    sink = opened(directory, said, train={"steps": 3}, server={"args": ["--api-key", SECRET]})
    assert processes(), "else this test would not see one that stays"
    sink.log(0, {"loss": 1.5, "kl/math": 0.25, "grad_norm": math.nan})
    sink.log(0, {"eval/accuracy/math": 0.5})
    sink.log(1, {"loss": 0.5})
    sink.note("no business of W&B")
    sink.close()
    sink.close()
    assert processes() == []
    assert said == []
    (written,) = offline_files(directory)
    config = {"train": {"steps": 3}, "server": {"args": [HIDDEN, HIDDEN]}}
    assert about(written) == {
        "project": "study",
        "name": "first",
        "id": run_id(directory),
        "config": config,
    }
    first, second = history(written)
    assert math.isnan(first.pop("grad_norm"))
    assert first == {"_step": 0, "loss": 1.5, "kl/math": 0.25, "eval/accuracy/math": 0.5}
    assert second == {"_step": 1, "loss": 0.5}
    texts = [path.read_bytes() for path in directory.rglob("*") if path.is_file()]
    assert texts and not any(SECRET.encode() in text for text in texts)


def test_a_run_that_continues_is_the_same_run(directory: Path) -> None:
    said: list[str] = []
    for start in (0, 2):
        sink = opened(directory, said)
        sink.truncate_from(start)
        for step in range(start, start + 3):
            sink.log(step, {"loss": float(step)})
        sink.close()
    before, after = offline_files(directory)
    assert about(before)["id"] == about(after)["id"] == run_id(directory)
    assert [row["_step"] for row in history(before)] == [0, 1, 2]
    assert [row["_step"] for row in history(after)] == [2, 3, 4]
    assert run_id(directory.parent / "second") != run_id(directory)
    assert said == []


def test_steps_that_it_has_already_are_left_out(directory: Path) -> None:
    """By W&B itself, which never goes back."""
    said: list[str] = []
    sink = opened(directory, said)
    sink.log(5, {"loss": 5.0})
    sink.truncate_from(3)
    for step in (3, 4, 5, 6):
        sink.log(step, {"loss": float(step), "again": 1.0})
    sink.close()
    (written,) = offline_files(directory)
    assert [row["_step"] for row in history(written)] == [5, 6]


@pytest.mark.parametrize("key", [None, "0" * 40])
def test_without_a_network_or_a_key_it_writes_files(
    directory: Path, monkeypatch: pytest.MonkeyPatch, key: str | None
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(wandb_sink, "INIT_TIMEOUT_S", 5.0)  # also for the files
    if key is not None:
        monkeypatch.setenv("WANDB_API_KEY", key)
    said: list[str] = []
    sink = opened(directory, said)
    sink.log(0, {"loss": 1.0})
    sink.close()
    assert len(said) == 1 and said[0].startswith("warning: W&B cannot be used now (")
    assert "wandb sync" in said[0] and "\n" not in said[0]
    assert history(offline_files(directory)[-1]) == [{"_step": 0, "loss": 1.0}]
    assert processes() == []


def test_when_its_process_dies_the_training_goes_on(directory: Path) -> None:
    said: list[str] = []
    sink = opened(directory, said)
    sink.log(0, {"loss": 1.0})
    for child in psutil.Process().children(recursive=True):
        if "wandb" in child.name():
            child.kill()
    psutil.wait_procs(psutil.Process().children(), timeout=5.0)
    for step in range(1, 50):
        sink.log(step, {"loss": 1.0})
    sink.close()
    assert all(message.startswith("warning: W&B gets no more of this run") for message in said)
    assert 1 <= len(said) <= 2
    assert processes() == []


def test_a_secret_is_hidden_wherever_it_stands() -> None:
    recipe = {
        "teachers": {"math": {"backend": {"api_key_env": "KEY", "urls": ["http://a"]}}},
        "rollout": {"backend": {"server": {"args": ["--token", "abc"]}}},
        "run": {"name": f"with-{SECRET}", "seed": 1, "none": None},
    }
    assert public(recipe, environment={"KEY": SECRET}) == {
        "teachers": {"math": {"backend": {"api_key_env": "KEY", "urls": ["http://a"]}}},
        "rollout": {"backend": {"server": {"args": [HIDDEN, HIDDEN]}}},
        "run": {"name": f"with-{HIDDEN}", "seed": 1, "none": None},
    }
