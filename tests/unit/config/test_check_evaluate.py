"""Mistakes in data paths, in what is evaluated, and in a run that samples nothing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from mopd.config.check_evaluate import check_evaluate
from mopd.config.check_losses import check_losses
from mopd.config.check_rollout import check_rollout
from mopd.config.data_files import check_data, check_data_path, find_files
from mopd.config.load import load_config

HELDOUT, VALIDATION = "data.heldout_path=x", "data.validation_path=x"
EVERY = "evaluate.interval=5"
DATASET = "rollout.backend.type=dataset"
ULD = ["distillation.loss=uld", "teachers.a.model=x"]
OPD = ["distillation.loss=opd", "teachers.a.model=x"]


def problems(*words: str) -> list[str]:
    config = load_config("mopd_ctkd", list(words))
    found = [*check_evaluate(config), *check_rollout(config, world_size=1), *check_losses(config)]
    return found + [line for line in check_data(config) if "is not a file" not in line]


@pytest.mark.parametrize(
    "words",
    [
        [],
        [EVERY, HELDOUT],
        [EVERY, VALIDATION],
        [EVERY, HELDOUT, "evaluate.patience=3", "checkpoint.keep_best=1"],
        [EVERY, HELDOUT, "evaluate.metric=kl", "evaluate.patience=3"],
        [EVERY, VALIDATION, "evaluate.metric=loss", "evaluate.patience=3"],
        [EVERY, HELDOUT, "evaluate.kl_prompts_per_domain=0"],
        [DATASET],
        [DATASET, "rollout.lmbda=0", "data.train_on=all", "rollout.max_staleness=2"],
        ["rollout.lmbda=0.5", "data.train_on=all"],
        ["data.prompt_key=q", "data.response_key=a"],
    ],
)
def test_what_fits_together_passes(words: list[str]) -> None:
    assert problems(*words) == []


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([HELDOUT, "evaluate.patience=3"], "evaluate.patience=3: goes by evaluations on the way"),
        ([HELDOUT, "checkpoint.keep_best=2"], "checkpoint.keep_best=2: goes by evaluations"),
        ([EVERY], "evaluate.interval=5: there is nothing to evaluate on; set data.heldout_path"),
        (
            [EVERY, HELDOUT, "evaluate={metric: kl, patience: 1, kl_prompts_per_domain: 0}"],
            "evaluate.kl_prompts_per_domain=0: leaves evaluate.metric=kl without a number",
        ),
        (
            [EVERY, HELDOUT, "evaluate={metric: kl, patience: 1}", *ULD],
            "evaluate.metric=kl: evaluate.patience=1 goes by it, and uld has no divergence",
        ),
        ([EVERY, HELDOUT, "evaluate={metric: loss, patience: 1}"], "evaluate.metric=loss: "),
        ([EVERY, VALIDATION, "evaluate.patience=1"], "evaluate.metric=accuracy: evaluate.patie"),
        ([DATASET, "rollout.lmbda=0.5"], "rollout.lmbda=0.5: with rollout.backend.type=dataset"),
        ([DATASET, "rollout.temperature=0.7"], "rollout.temperature=0.7: with rollout.backend"),
        ([DATASET, "rollout.off_policy=teacher"], "rollout.off_policy=teacher: rollout.backend"),
        ([DATASET, "rollout.num_generations_per_prompt=2"], "rollout.num_generations_per_prompt"),
        ([DATASET, "rollout.backend.path=x"], "rollout.backend.path: is only read by type=replay"),
        (
            [DATASET, *OPD],
            "rollout.backend.type=dataset: opd needs the sampler's log-probabilities",
        ),
        ([VALIDATION, *OPD], "data.validation_path: opd needs"),
        (["data.train_on=all"], "data.train_on=all: is only read where answers come with"),
        (["data.prompt_key=q", "data.messages_key=m"], "data.prompt_key: is read instead of"),
        ([DATASET, "data.prompt_key=q", "data.train_on=all"], "data.train_on=all: needs turns"),
    ],
)
def test_a_mistake_is_named(words: list[str], found: str) -> None:
    assert problems(*words)[0].startswith(found)


def test_paths_of_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(path: Any) -> list[str]:
        return list(check_data_path("data.path", str(path)))

    (tmp_path / "a.jsonl").touch()
    (tmp_path / "empty").mkdir()
    for good in (tmp_path, tmp_path / "a.jsonl", f"{tmp_path}/*.jsonl"):
        assert found(good) == []
    assert found("openai/gsm8k")[0].startswith("data.path: openai/gsm8k is not a file")
    assert "the directory" in found(tmp_path / "empty")[0]
    (tmp_path / "b.parquet").touch()
    assert "mixes jsonl and parquet" in found(tmp_path)[0]
    assert [file.name for file in find_files(str(tmp_path))] == ["a.jsonl", "b.parquet"]
    assert found(tmp_path / "b.parquet") == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'mopd[data]'" in found(tmp_path / "b.parquet")[0]
    assert found(tmp_path / "a.jsonl") == []
