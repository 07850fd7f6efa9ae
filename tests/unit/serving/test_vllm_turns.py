"""vLLM engines that take turns: asleep while others have the devices, whatever they are asked."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mopd.demo import World
from mopd.serving import vllm_leased
from mopd.serving.lease import LEASE_VARIABLE, DeviceLease, lease_environment
from mopd.serving.scoring import MODEL_PATH, SCORE_PATH
from mopd.serving.vllm_app import ScoreMiddleware
from mopd.serving.vllm_command import TOKEN_VARIABLE
from tests.helpers.plain_model import PlainModel
from tests.helpers.runs import ROOT, environment
from tests.helpers.sample_engine import SampleHost, make_up_params
from tests.helpers.samplers import PROMPTS, Site
from tests.helpers.small_server import wait_until

TOKEN = "a-token-of-enough-length"


class Engine:
    """Its moves, and how many requests it works on."""

    def __init__(self) -> None:
        self.moves: list[str] = []
        self.running = 0

    async def sleep(self, *, level: int, mode: str) -> None:
        assert (level, mode, self.running) == (1, "wait", 0)
        self.moves.append("sleep")

    async def wake_up(self) -> bool:
        self.moves.append("wake_up")
        return True


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "pool.lease"
    for name, text in lease_environment(path, owner="teachers.a").items():
        monkeypatch.setenv(name, text)
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    monkeypatch.setattr(vllm_leased, "_held", [])
    return path


def hold(path: Path, owner: str) -> None:
    """As the process of a server does before it loads."""
    lease = DeviceLease(path, owner=owner)
    assert lease.acquire(wait_s=20.0)
    vllm_leased._held.append(lease)


class Server:
    """vLLM's server around a made-up engine; ``seconds`` of each request."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.engine, self.seconds = Engine(), seconds
        self.app = SimpleNamespace(state=SimpleNamespace(engine_client=self.engine))
        self.middleware = ScoreMiddleware(self.stock)
        self.asked: list[str] = []

    async def stock(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        self.asked.append(scope.get("path", scope["type"]))
        if scope.get("method") == "POST" and not scope["path"].endswith("tokenize"):
            assert self.engine.moves[-1:] != ["sleep"], "it is asked while it sleeps"
        self.engine.running += 1
        await asyncio.sleep(self.seconds)
        self.engine.running -= 1
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 299, "headers": []})

    async def ask(self, method: str, path: str, token: str | None = None) -> int:
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"{}"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        headers = [(b"authorization", f"Bearer {token}".encode())] if token else []
        scope = {"type": "http", "method": method, "path": path, "headers": headers}
        scope |= {"server": ("127.0.0.1", 80), "app": self.app}
        await self.middleware(scope, receive, send)
        return sent[0]["status"]

    def close(self) -> None:
        self.middleware._devices.close()


async def until(what: Any) -> None:
    async with asyncio.timeout(20.0):
        while not what():
            await asyncio.sleep(0.005)


def test_it_sleeps_when_another_one_wants_the_devices_and_wakes_for_a_request(path: Path) -> None:
    hold(path, "teachers.a")
    server, other = Server(), DeviceLease(path, owner="teachers.b")

    async def work() -> None:
        # the server says that it starts: no request is needed for others to get the devices
        await server.middleware({"type": "lifespan", "app": server.app}, None, None)  # type: ignore[arg-type]
        assert await server.ask("POST", "/v1/completions") == 299
        assert server.engine.moves == []
        assert await asyncio.to_thread(other.acquire, wait_s=20.0)
        assert server.engine.moves == ["sleep"]
        for name in ("/health", "/v1/models", "/metrics"):
            assert await server.ask("GET", name) == 299
        assert await server.ask("POST", "/tokenize") == 299
        asking = asyncio.create_task(server.ask("POST", "/inference/v1/generate"))
        await asyncio.sleep(0.1)
        assert not asking.done() and server.engine.moves == ["sleep"]
        other.release()
        assert await asking == 299
        assert server.engine.moves == ["sleep", "wake_up"]
        await asyncio.to_thread(server.close)

    asyncio.run(work())


def test_two_servers_are_never_awake_together(path: Path) -> None:
    """The second one starts when the first one sleeps, as it would load its weights then."""
    counts: list[int] = []

    async def work() -> None:
        hold(path, "teachers.a")
        first = Server(0.01)
        await first.ask("GET", "/health")
        await asyncio.to_thread(hold, path, "teachers.b")
        assert first.engine.moves == ["sleep"]
        second = Server(0.01)
        for server in (first, second):
            server.middleware._devices.attend({"app": server.app})
            server.middleware._devices._turns._quantum_s = 0.05  # type: ignore[union-attr]

        async def keep_asking(server: Server) -> None:
            while len(server.engine.moves) < 6:
                assert await server.ask("POST", "/v1/completions") == 299
                other = second if server is first else first
                counts.append(other.engine.running)

        async with asyncio.timeout(30.0):
            await asyncio.gather(*(keep_asking(one) for one in (first, second) * 2))
        await asyncio.gather(*(asyncio.to_thread(one.close) for one in (first, second)))
        assert min(len(first.asked), len(second.asked)) > 6

    asyncio.run(work())
    assert not any(counts)


def test_a_stranger_wakes_nobody(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    hold(path, "teachers.a")
    server, other = Server(), DeviceLease(path, owner="teachers.b")

    async def work() -> None:
        assert await server.ask("GET", "/health") == 299
        await asyncio.to_thread(other.acquire, wait_s=20.0)
        for name in ("/v1/completions", SCORE_PATH, MODEL_PATH):
            assert await server.ask("POST", name) == 401
        assert not other.is_wanted()
        other.release()
        assert await server.ask("POST", "/v1/completions", TOKEN) == 299
        assert server.engine.moves == ["sleep", "wake_up"]
        await asyncio.to_thread(server.close)

    asyncio.run(work())


def test_a_request_without_a_turn_is_told_to_come_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(path, "teachers.a")
    server, other = Server(), DeviceLease(path, owner="teachers.b")

    async def work() -> None:
        await server.ask("GET", "/health")
        await asyncio.to_thread(other.acquire, wait_s=20.0)
        server.middleware._devices._turns._wait_s = 0.05  # type: ignore[union-attr]
        assert await server.ask("POST", "/v1/completions") == 429
        assert server.asked == ["/health"]
        other.release()
        await asyncio.to_thread(server.close)

    asyncio.run(work())


def test_without_a_lease_nothing_ever_sleeps(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LEASE_VARIABLE)
    server = Server()
    assert asyncio.run(server.ask("POST", "/v1/completions")) == 299
    assert server.engine.moves == [] and not path.exists()


@pytest.fixture
def site(tiny_world: World, tmp_path: Path, path: Path) -> Iterator[tuple[Site, SampleHost]]:
    hold(path, "rollout")
    with SampleHost(tiny_world.student) as host:
        model = PlainModel(tiny_world.student)
        yield Site(urls=(host.url,), model=model, root=tmp_path / "weights"), host
        host._app._devices.close()


def test_a_sampler_keeps_its_weights_over_a_sleep(
    site: tuple[Site, SampleHost], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers are those of a server that never slept, and updates wake it as well."""
    make_up_params(monkeypatch)
    where, host = site
    other = DeviceLease(path, owner="teachers.b")
    found = []
    with where.sampler() as sampler:
        for version in range(2):
            sampler.load_weights(where.model.weights(version).items(), version=version)
            for asleep in (False, True):
                if asleep:
                    assert other.acquire(wait_s=20.0)
                    assert host.engine.moves[-1] == "sleep"
                    other.release()
                rollouts = sampler.generate(PROMPTS, step=version, version=version)
                found.append([(r.token_ids.tolist(), r.policy_version) for r in rollouts])
            other.acquire(wait_s=20.0)
            other.release()
    assert found[0] == found[1] and found[2] == found[3] and found[0] != found[2]
    assert host.engine.moves == ["sleep", "wake_up"] * 3 + ["sleep"]


FAKE = """
import sys
from mopd.serving.vllm_leased import take_held
if __name__ == "__main__":
    lease = take_held()
    print(lease.is_held, lease.owner, sys.argv[1:], take_held(), flush=True)
    sys.stdin.read()
"""


def test_a_server_waits_for_its_turn_before_it_loads(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "fake" / "vllm" / "entrypoints" / "openai"
    folder.mkdir(parents=True)
    (folder / "api_server.py").write_text(FAKE)
    env = {**environment(), **lease_environment(path, owner="teachers.b")}
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "fake"), str(ROOT)])
    before = DeviceLease(path, owner="teachers.a")
    before.acquire(wait_s=0.0)
    command = [sys.executable, "-m", "mopd.serving.vllm_leased", "--model", "m"]
    with subprocess.Popen(
        command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        wait_until(before.is_wanted)
        before.release()
        assert process.stdout.readline() == "True teachers.b ['--model', 'm'] None\n"
        assert not before.acquire(wait_s=None, is_given_up=iter([False, False, True]).__next__)
        process.stdin.close()
    assert before.acquire(wait_s=5.0)
    before.release()
