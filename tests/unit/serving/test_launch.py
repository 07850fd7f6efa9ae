"""A server of our own: started, watched, started again, and gone with us."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from mopd.errors import ConfigError
from mopd.serving import launch as launching
from mopd.serving.address import LOOPBACK, PORTS, bound, free_ports
from mopd.serving.launch import Launch, ServerProcess, find_python, importable
from tests.helpers.small_server import (
    is_gone,
    kill_group,
    left_over,
    small_server,
    starts,
    wait_until,
)


class Started:
    """A server in a test's folder, and what it reported."""

    def __init__(
        self,
        directory: Path,
        *more: str,
        max_restarts: int = 1,
        host: str = LOOPBACK,
        port: int | None = None,
    ) -> None:
        self.script = small_server(directory)
        self.news: list[str] = []
        port = free_ports(1, host=host)[0] if port is None else port
        launch = Launch(
            owner="teachers.a",
            words=(str(self.script), "--host", host, "--port", str(port), *more),
            environment=dict(os.environ),
            host=host,
            port=port,
            log=directory / "a-0.log",
            max_restarts=max_restarts,
        )
        self.process = ServerProcess(launch, self.news.append)

    def healthy(self, times: int) -> bool:
        return sum("is ready" in line for line in self.news) == times


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(launching, "RESTART_PAUSE_S", 0.1)
    yield tmp_path
    assert left_over(tmp_path / "python-with-vllm") == []


def test_a_server_that_dies_is_started_again_on_its_port_and_then_not(folder: Path) -> None:
    server = Started(folder)
    try:
        wait_until(lambda: server.healthy(1))
        wait_until(lambda: server.process.was_healthy)  # which follows the news
        kill_group(starts(server.script)[0]["pid"])
        wait_until(lambda: server.healthy(2))
        first, second = starts(server.script)
        assert first["words"] == second["words"] and first["pid"] != second["pid"]
        assert is_gone(first["child"])
        os.kill(second["pid"], 9)  # it alone: what it brought along must go, too
        wait_until(lambda: server.process.failure is not None)
        wait_until(lambda: is_gone(second["child"]))
        assert len(starts(server.script)) == 2
        assert "stays away after 1 restarts" in (server.process.failure or "")
        assert (
            "died (exit code 137, log in " in server.news[-1]
            and server.news[-1] == server.process.failure
        )
        assert any("starting it again, 1 of 1" in line for line in server.news)
    finally:
        server.process.close()


def test_a_server_that_dies_while_it_starts_is_not_tried_again(folder: Path) -> None:
    server = Started(folder, "--fail", max_restarts=3)
    try:
        wait_until(lambda: server.process.failure is not None)
        failure = server.process.failure or ""
        assert len(starts(server.script)) == 1
        assert failure.startswith("teachers.a.backend: ") and "exit code 3" in failure
        assert "log says: ValueError: too large; see " in failure and "\n" not in failure
        assert str(folder / "a-0.log") in failure
        assert not server.process.was_healthy
    finally:
        server.process.close()


def test_closing_is_quick_and_final_whatever_it_is_doing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "RESTART_PAUSE_S", 60.0)
    (folder / "resting").mkdir()
    starting, resting = Started(folder, "--slow"), Started(folder / "resting")
    wait_until(lambda: resting.healthy(1))
    kill_group(starts(resting.script)[0]["pid"])
    wait_until(lambda: resting.process.restarts == 1)
    wait_until(lambda: starts(starting.script))
    began = time.monotonic()
    launching.close_all([starting.process, resting.process])
    assert time.monotonic() - began < 10.0
    assert not left_over(resting.script) and len(starts(resting.script)) == 1
    assert not starting.process.was_healthy
    starting.process.close()


def test_a_server_on_another_address_is_asked_there(folder: Path) -> None:
    server = Started(folder, host="127.0.0.2")
    try:
        wait_until(lambda: server.healthy(1))
        assert server.process.url.startswith("http://127.0.0.2:")
        with urllib.request.urlopen(f"{server.process.url}/health", timeout=10) as reply:
            assert reply.status == 200
        assert not launching.answers(LOOPBACK, server.process.launch.port)
    finally:
        server.process.close()


def test_a_start_waits_until_the_port_is_free(folder: Path) -> None:
    """As where the server of a starter that was killed still ends."""
    with bound(LOOPBACK, 0, reuse=True) as old:
        old.listen()
        server = Started(folder, port=old.getsockname()[1])
        time.sleep(4 * launching.LOOK_S)
        assert not starts(server.script) and server.process.failure is None
    try:
        wait_until(lambda: server.healthy(1))
        assert len(starts(server.script)) == 1
    finally:
        server.process.close()


def test_a_port_that_stays_taken_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "PORT_S", 0.1)
    with bound(LOOPBACK, 0, reuse=True) as other:
        other.listen()
        server = Started(folder, port=other.getsockname()[1])
        wait_until(lambda: server.process.failure is not None)
        assert f"cannot listen at {server.process.url}" in (server.process.failure or "")
        assert not starts(server.script)
        server.process.close()


def test_closing_ends_the_wait_for_a_port(folder: Path) -> None:
    with bound(LOOPBACK, 0, reuse=True) as other:
        other.listen()
        server = Started(folder, port=other.getsockname()[1])
        began = time.monotonic()
        server.process.close()
        assert time.monotonic() - began < 20.0
    assert not starts(server.script) and server.process.failure is None


TRAINER = """
import sys, time
from pathlib import Path
from mopd.serving.launch import Launch, ServerProcess
words, port = sys.argv[2:], int(sys.argv[1])
launch = Launch(owner="a", words=(*words, "--port", str(port)), environment={}, port=port,
                log=Path(words[0] + ".log"), max_restarts=1)
ServerProcess(launch, print)
time.sleep(120)
"""


def test_a_trainer_that_is_killed_takes_its_servers_along(folder: Path) -> None:
    script = small_server(folder)
    words = [sys.executable, "-c", TRAINER, str(free_ports(1)[0]), str(script)]
    trainer = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: starts(script))
    finally:
        trainer.kill()
        trainer.wait()
    wait_until(lambda: not left_over(script))


def test_ports_differ_and_are_free() -> None:
    ports = free_ports(50)
    assert len(set(ports)) == 50 and set(ports) <= set(PORTS)


class TestInterpreter:
    """The recipe's, the environment's, this one if it has vLLM, or the project's."""

    @pytest.fixture(autouse=True)
    def nothing_installed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(launching, "PACKAGE", tmp_path / "project" / "mopd")
        monkeypatch.syspath_prepend(tmp_path / "path")
        (tmp_path / "path" / "vllm").mkdir(parents=True)  # a mere folder of that name

    def executable(self, path: Path) -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o755)
        return str(path)

    def test_without_any_the_remedy_is_told(self) -> None:
        with pytest.raises(ConfigError, match=r"teachers.a.backend.urls.*make setup-vllm.*python"):
            find_python("teachers.a.backend", None, {})

    def test_the_order(self, tmp_path: Path) -> None:
        beside = self.executable(tmp_path / "project" / ".venv-vllm" / "bin" / "python")
        assert find_python("k", None, {}) == beside
        (tmp_path / "path" / "vllm" / "__init__.py").touch()
        assert find_python("k", None, {}) == sys.executable
        other = {"MOPD_VLLM_PYTHON": self.executable(tmp_path / "other")}
        assert find_python("k", None, other) == other["MOPD_VLLM_PYTHON"]
        given = self.executable(tmp_path / "given")
        assert find_python("k", given, other) == given

    @pytest.mark.parametrize(
        ("given", "variable", "named"),
        [("/no/python", None, "k.server.python: "), (None, "/no/python", "MOPD_VLLM_PYTHON: ")],
    )
    def test_one_that_is_not_there_is_named(
        self, given: str | None, variable: str | None, named: str
    ) -> None:
        environment = {} if variable is None else {"MOPD_VLLM_PYTHON": variable}
        with pytest.raises(ConfigError, match="/no/python is no interpreter") as caught:
            find_python("k", given, environment)
        assert str(caught.value).startswith(named)


def test_a_server_can_import_mopd_and_nothing_that_lies_beside_it(tmp_path: Path) -> None:
    for _ in range(2):
        folder = importable(tmp_path / "python")
    code = "import mopd.serving.vllm_command as m; print(m.__file__)\nimport tests"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert str(folder) in done.stdout
    assert "No module named 'tests'" in done.stderr
