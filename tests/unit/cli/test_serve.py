"""`mopd serve`: what it refuses at once, and one server from start to interrupt."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mopd.cli import serve
from mopd.cli.main import main
from mopd.demo import World
from mopd.serving.models import model_fingerprint
from mopd.serving.scoring import MODEL_PATH

COMMAND = "import sys; from mopd.cli.main import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--host", "0.0.0.0"], "--token-env"),
        (["--token-env", "MOPD_NOT_SET"], "MOPD_NOT_SET: the variable is not set"),
        (["--token-env", "MOPD_SHORT"], "16 characters"),
        (["--engine", "vllm", "--host", "::"], "--token-env"),
        ([], "no such directory"),
    ],
)
def test_a_wrong_start_is_one_line_and_exit_code_2(
    words: list[str],
    wanted: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MOPD_SHORT", "abc")
    assert main(["serve", "--model", str(tmp_path / "none"), *words]) == 2
    error = capsys.readouterr().err
    assert wanted in error and error.count("\n") == 1 and "abc" not in error


def test_vllm_is_started_with_the_token_in_its_environment_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(serve.os, "execve", lambda *call: started.append(call))
    monkeypatch.setenv("MY_TOKEN", "a-token-of-enough-length")
    words = ["--model", str(tmp_path), "--engine", "vllm", "--token-env", "MY_TOKEN"]
    serve.run([*words, "--host", "0.0.0.0", "--", "--dtype", "float32"])
    ((program, arguments, environment),) = started
    assert program == sys.executable and arguments[-2:] == ["--dtype", "float32"]
    assert environment["VLLM_API_KEY"] == "a-token-of-enough-length"
    assert "a-token-of-enough-length" not in arguments


@pytest.mark.parametrize(
    ("word", "module"), [("--sample", "vllm_sampling"), ("--score", "vllm_app")]
)
def test_vllm_gets_the_paths_that_are_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str, module: str
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(serve.os, "execve", lambda *call: started.append(call))
    serve.run(["--model", str(tmp_path), "--engine", "vllm", word])
    ((_, arguments, _),) = started
    middleware = arguments[arguments.index("--middleware") + 1]
    assert middleware.startswith(f"mopd.serving.{module}.")


def test_a_server_serves_until_it_is_interrupted(tiny_world: World) -> None:
    model = tiny_world.teachers["sort"]
    words = ["serve", "--model", str(model), "--port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, *words],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=Path(__file__).resolve().parents[3],
        # who runs the tests in the background ignores it, and children inherit that
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[-1]
            with urllib.request.urlopen(url + MODEL_PATH, timeout=30) as reply:
                assert json.loads(reply.read())["model"] == model_fingerprint(model)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) == 0
        finally:
            process.kill()
