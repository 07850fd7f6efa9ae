"""`mopd checkpoint` and `mopd export` on what whole runs leave behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mopd.cli.main import main
from mopd.demo import World
from tests.helpers.dist import run_ranks
from tests.helpers.runs import ROOT, train_here, words
from tests.helpers.upcycle import upcycle

pytestmark = [pytest.mark.dist, pytest.mark.e2e]

SHORT: dict[str, Any] = {
    "train__steps": 2,
    "checkpoint__save_interval": 1,
    "evaluate__max_prompts_per_domain": 2,
    "logging__tensorboard": "false",
    "student__optimizer__lr": 1e-2,
}
LORA: dict[str, Any] = {
    "student__lora__rank": 4,
    "student__dtype": "bfloat16",
    "student__parallel__pipeline_model_parallel_size": 2,
}
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (
        2,
        {
            "student__parallel__tensor_model_parallel_size": 2,
            "student__dtype": "bfloat16",
            "student__optimizer__use_distributed_optimizer": "true",
            "evaluate__interval": 1,
            "checkpoint__keep_best": 1,
        },
    ),
    "lora-pp2": (2, LORA),
    "moe-ep2": (2, {"student__parallel__expert_model_parallel_size": 2}),
}


@pytest.fixture(scope="module")
def run_of(tiny_world: World, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A finished run of that name, made when it is first asked for."""
    directory = tmp_path_factory.mktemp("exported")

    def get(name: str) -> Path:
        if not (directory / name).exists():
            size, keys = RUNS[name]
            if name.startswith("moe"):
                student = upcycle(tiny_world.student, directory / "student", noise=0.01)
                keys = keys | {"student__model": student}
            given = words(tiny_world, directory, name, **(SHORT | keys))
            run_ranks(train_here, size, "mopd_ctkd", given, timeout=120)
        return directory / name

    return get


def call(*wanted: object) -> None:
    """In this process, as a rank of the pool."""
    os.environ.pop("RANK", None)
    assert main([str(word) for word in wanted]) == 0


def export(*wanted: object) -> None:
    run_ranks(call, 1, "export", *wanted)


@pytest.mark.parametrize("name", RUNS)
def test_the_last_checkpoint_is_what_the_run_exports(
    run_of: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    run = run_of(name)
    export(run, "--output", tmp_path / "hf")
    names = sorted(path.name for path in (run / "hf").iterdir())
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == names
    for file in names:
        assert (tmp_path / "hf" / file).read_bytes() == (run / "hf" / file).read_bytes(), file
    export(run, "--step", 1, "--output", tmp_path / "first")
    first = (tmp_path / "first" / "model.safetensors").read_bytes()
    assert first != (run / "hf" / "model.safetensors").read_bytes()


def test_an_adapter_is_exported(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    run = run_of("lora-pp2")
    export(run, "--format", "peft", "--output", tmp_path / "adapter")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        found = (tmp_path / "adapter" / file).read_bytes()
        assert found == (run / "adapter" / file).read_bytes(), file


def test_float32_of_a_bfloat16_run_has_the_main_weights(
    run_of: Callable[[str], Path], tmp_path: Path
) -> None:
    run = run_of("tp2")
    export(run, "--dtype", "float32", "--output", tmp_path / "wide")
    wide = load_file(tmp_path / "wide" / "model.safetensors")
    narrow = load_file(run / "hf" / "model.safetensors")
    for name, tensor in wide.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor.to(torch.bfloat16), narrow[name]), name
    assert any(not torch.equal(wide[name], narrow[name].float()) for name in wide)
    assert "float32" in (tmp_path / "wide" / "config.json").read_text()


def refuse(*wanted: object, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a refusal."""
    assert main([str(word) for word in wanted]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("mopd: "), captured.err
    return captured.err


def test_what_cannot_be_exported_is_told_in_one_line(
    run_of: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_of("moe-ep2"), run)
    out = ("--output", tmp_path / "out")
    assert "has no config.yaml" in refuse("export", tmp_path, *out, capsys=capsys)
    wrong = refuse("export", run, "--step", 9, *out, capsys=capsys)
    assert "--step 9: no such checkpoint; there are 1, 2" in wrong
    assert "has a score" in refuse("export", run, "--best", *out, capsys=capsys)
    assert "has no adapter" in refuse("export", run, "--format", "peft", *out, capsys=capsys)
    assert "is there already" in refuse("export", run, "--output", run, capsys=capsys)
    moved = refuse("export", run, "--model", tmp_path / "gone", *out, capsys=capsys)
    assert "tell with --model where it is now" in moved
    file = run / "checkpoints" / "step-000002" / "rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    damaged = refuse("export", run, *out, capsys=capsys)
    assert "SHA-256" in damaged and "try --step 1" in damaged
    assert not (tmp_path / "out").exists()


def test_checkpoints_are_listed_and_verified(
    run_of: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_of("tp2"), run)
    assert main(["checkpoint", "list", str(run)]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["step", "saved", "size", "layout", "score"]
    assert [row.split()[0] for row in rows] == ["1", "2"]
    assert "tp2" in rows[0] and "one of the last 2" in rows[0]
    assert "newest" in rows[1] and sum("best" in row for row in rows) == 1
    newest = run / "checkpoints" / "step-000002"
    assert main(["checkpoint", "list", str(run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(one["step"], one["layout"]["tensor"]) for one in told] == [(1, 2), (2, 2)]
    assert told[1]["path"] == str(newest) and "newest" in told[1]["why"]
    assert main(["checkpoint", "verify", str(run), "--all"]) == 0
    assert capsys.readouterr().out.count(": intact (") == 2
    (newest / "notes.txt").touch()
    file = newest / "rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    for path in (run, newest):
        assert main(["checkpoint", "verify", str(path)]) == 1
        said = capsys.readouterr().out.splitlines()
        assert len(said) == 2
        assert "notes.txt is not in the manifest" in said[0] and "SHA-256" in said[1]
        assert main(["checkpoint", "verify", str(path), "--json"]) == 1
        (told,) = json.loads(capsys.readouterr().out)
        assert told["path"] == str(newest) and told["problems"] == said
    (newest / "manifest.json").write_text("{}")
    assert main(["checkpoint", "list", str(run)]) == 0
    assert "DAMAGED" in capsys.readouterr().out
    assert "is no run" in refuse("checkpoint", "verify", tmp_path, capsys=capsys)


def test_listing_costs_neither_torch_nor_megatron(
    run_of: Callable[[str], Path],
) -> None:
    probe = (
        "import json, sys; from mopd.cli.main import main;"
        f"main(['checkpoint', 'list', {str(run_of('tp2'))!r}]);"
        f"main(['checkpoint', 'verify', {str(run_of('tp2'))!r}]);"
        "import mopd.cli.export;"
        "print(json.dumps([name.split('.')[0] for name in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {"torch", "megatron", "transformers"} & {*json.loads(done.stdout.splitlines()[-1])}
