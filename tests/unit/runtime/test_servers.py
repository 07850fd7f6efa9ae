"""Servers that a run starts: which, how, and what the other ranks learn of them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mopd.config.schema import RunConfig
from mopd.demo import World
from mopd.errors import ConfigError
from mopd.runtime.reached import KEY_VARIABLE
from mopd.runtime.servers import Servers
from tests.helpers.dist import run_ranks
from tests.helpers.runs import ROOT, launch, step_lines, train_here, words
from tests.helpers.small_server import (
    SCRIPT,
    TEACHER,
    left_over,
    small_server,
    starts,
    wait_until,
)


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Path]:
    script = small_server(tmp_path)
    yield script
    assert left_over(script) == []


def recipe(script: Path, **sections: Any) -> RunConfig:
    """Two replicas of one teacher, one of another, a sampler, and a teacher in process."""
    server = {"python": str(script)}
    backend = {"type": "vllm", "server": server, "start_s": 30}
    return RunConfig.model_validate(
        {
            "student": {"model": "s", "dtype": "bfloat16"},
            "teachers": {
                "a": {"model": "a", "backend": backend | {"server": server | {"replicas": 2}}},
                "b": {"model": "b", "tokenizer": "t", "backend": backend},
                "near": {"model": "c"},
                "idle": {"model": "d", "weight": 0.0, "backend": backend},
            },
            "distillation": {"top_k": 12},
            "rollout": {"backend": backend},
        }
        | sections
    )


def alone(script: Path, **keys: Any) -> RunConfig:
    backend = {"type": "vllm", "server": {"python": str(script)}, "start_s": 30} | keys
    return RunConfig.model_validate({"teachers": {"a": {"model": "a", "backend": backend}}})


def reached(config: RunConfig, directory: Path, *, device: str = "cpu") -> tuple[Servers, Any]:
    import torch.distributed as dist
    from torch.distributed import TCPStore

    servers = Servers(config)
    store = TCPStore("127.0.0.1", 0, world_size=1, is_master=True)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        servers.start(directory, device=device)
        return servers, servers.reach()
    except BaseException:
        servers.close()
        raise
    finally:
        dist.destroy_process_group()


def test_a_lease_that_cannot_be_had_is_told_by_all(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raised in `reach`, where every rank hears of it, and not on the one that starts servers."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"mopd-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    backend = {"type": "vllm", "server": {"python": str(script)}}
    teacher = {"model": "a", "pool": "judges", "backend": backend}
    config = RunConfig.model_validate(
        {"teachers": {"a": teacher}, "pools": {"judges": {"shared": True}}}
    )
    with pytest.raises(ConfigError, match="others may write there"):
        reached(config, tmp_path / "run")
    assert starts(script) == []


def value(told: list[str], name: str) -> str | None:
    return told[told.index(name) + 1] if name in told else None


def test_every_section_gets_its_servers_and_their_urls(script: Path, tmp_path: Path) -> None:
    config = recipe(script)
    servers, filled = reached(config, tmp_path / "run")
    try:
        found = {value(one["words"], "--served-model-name"): one for one in starts(script)}
        assert len(starts(script)) == 4
        assert set(found) == {"teachers.a", "teachers.b", "rollout"}
        logs = sorted(path.name for path in (tmp_path / "run" / "servers").glob("*.log"))
        assert logs == ["rollout-0.log", "teachers.a-0.log", "teachers.a-1.log", "teachers.b-0.log"]

        a, b = filled.teachers["a"].backend, filled.teachers["b"].backend
        ports = {value(one["words"], "--port") for one in starts(script)}
        urls = [*a.urls, *b.urls, *filled.rollout.backend.urls]
        assert {url.rpartition(":")[2] for url in urls} == ports and len(ports) == 4
        assert (len(a.urls), len(b.urls), len(filled.rollout.backend.urls)) == (2, 1, 1)
        assert {a.api_key_env, b.api_key_env, filled.rollout.backend.api_key_env} == {KEY_VARIABLE}
        # what mopd did not start is as the user wrote it, and so is the recipe itself
        assert filled.teachers["near"] == config.teachers["near"]
        assert filled.teachers["idle"] == config.teachers["idle"]
        assert config == recipe(script)

        assert value(found["teachers.a"]["words"], "--model") == str(Path("a").absolute())
        assert value(found["teachers.b"]["words"], "--tokenizer") == str(Path("t").absolute())
        assert value(found["teachers.a"]["words"], "--max-logprobs") == "12"
        assert value(found["teachers.a"]["words"], "--dtype") == "float32"
        assert "--logprobs-mode" not in found["teachers.a"]["words"]
        sampler = found["rollout"]["words"]
        assert value(sampler, "--logprobs-mode") == "processed_logprobs"
        assert value(sampler, "--dtype") == "bfloat16" and "--max-logprobs" not in sampler
    finally:
        servers.close()


def test_a_key_of_this_run_alone_guards_them(script: Path, tmp_path: Path) -> None:
    keys = set()
    for _ in range(2):
        servers, _ = reached(alone(script), tmp_path / "run")
        keys.add(key := os.environ[KEY_VARIABLE])
        last = starts(script)[-1]
        servers.close()
        assert last["env"]["MOPD_SERVE_TOKEN"] == last["env"]["VLLM_API_KEY"] == key
        assert len(key) >= 32 and key not in str(last["words"])
        assert KEY_VARIABLE not in os.environ
    assert len(keys) == 2
    for path in (tmp_path / "run").rglob("*.log"):
        assert not any(key in path.read_text() for key in keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"args": ["--fail"]}, "ended while it was starting (exit code 3); its log says: ValueErr"),
        ({"args": ["--slow"]}, "is not healthy after 1 s; raise teachers.a.backend.start_s"),
    ],
)
def test_a_server_that_does_not_come_up_ends_the_start(
    script: Path, tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    start_s = 1 if keys["args"] == ["--slow"] else 60
    config = alone(script, server={"python": str(script)} | keys, start_s=start_s)
    began = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        reached(config, tmp_path / "run")
    assert time.monotonic() - began < 20.0
    assert message in str(caught.value) and "teachers.a-0.log" in str(caught.value)


def both_ranks(script: str, directory: str) -> dict[str, Any]:
    from mopd.config.schema import ParallelSection
    from mopd.device import get_device
    from mopd.student.parallel import initialize

    initialize(ParallelSection(), backend=get_device("cpu"), seed=1)
    servers = Servers(alone(Path(script)))
    servers.start(Path(directory), device="cpu")
    try:
        backend = servers.reach().teachers["a"].backend
        assert backend.api_key_env is not None
        return {
            "urls": backend.urls,
            "key": os.environ[backend.api_key_env],
            "processes": len(servers.processes),
        }
    finally:
        servers.close()
        assert KEY_VARIABLE not in os.environ


@pytest.mark.dist
def test_one_rank_starts_and_all_know(script: Path, tmp_path: Path) -> None:
    first, second = run_ranks(both_ranks, 2, str(script), str(tmp_path / "run"))
    assert len(starts(script)) == 1
    assert (first.pop("processes"), second.pop("processes")) == (1, 0)
    assert first == second and len(first["urls"]) == 1


def on_a_node(scripts: list[str], directory: str, args: list[str]) -> dict[str, Any]:
    """Every rank is a node of its own, with another loopback address; ``args`` are node 1's."""
    from mopd.config.schema import ParallelSection
    from mopd.device import get_device
    from mopd.student.parallel import initialize

    node = int(os.environ["RANK"])
    before = dict(os.environ)
    os.environ |= {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "GROUP_WORLD_SIZE": "2"}
    os.environ |= {"GROUP_RANK": str(node), "MOPD_HOST_ADDRESS": f"127.0.0.{1 + node}"}
    os.environ["MOPD_VLLM_PYTHON"] = scripts[node]
    backend = {"type": "vllm", "start_s": 30}
    config = RunConfig.model_validate(
        {
            "cluster": {"num_nodes": 2, "num_devices_per_node": 3},
            "teachers": {
                "a": {"model": "a", "backend": backend | {"server": {"replicas": 3}}},
                "b": {"model": "b", "backend": backend | {"server": {"args": args}}},
            },
        }
    )
    initialize(ParallelSection(), backend=get_device("cpu"), seed=1)
    servers = Servers(config)
    try:
        servers.start(Path(directory), device="cpu")
        try:
            teachers = servers.reach().teachers
        except ConfigError as error:
            return {"said": str(error)}
        return {
            "urls": {name: one.backend.urls for name, one in teachers.items()},
            "key": os.environ[KEY_VARIABLE],
            "own": [one.url for one in servers.processes],
        }
    finally:
        servers.close()
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def two_scripts(tmp_path: Path) -> Iterator[list[Path]]:
    for name in ("zero", "one"):
        (tmp_path / name).mkdir()
    scripts = [small_server(tmp_path / name) for name in ("zero", "one")]
    yield scripts
    assert [left_over(script) for script in scripts] == [[], []]


@pytest.mark.dist
def test_each_node_starts_its_share_and_all_know_all(
    two_scripts: list[Path], tmp_path: Path
) -> None:
    names = [str(script) for script in two_scripts]
    found = run_ranks(on_a_node, 2, names, str(tmp_path / "run"), [])
    assert [len(one["own"]) for one in found] == [len(starts(s)) for s in two_scripts] == [2, 2]
    for node, one in enumerate(found):
        assert all(url.startswith(f"http://127.0.0.{1 + node}:") for url in one["own"])
        assert one["urls"] == found[0]["urls"] and one["key"] == found[0]["key"]
    told = [url for urls in found[0]["urls"].values() for url in urls]
    assert sorted(told) == sorted(found[0]["own"] + found[1]["own"])
    assert [len(found[0]["urls"][name]) for name in "ab"] == [3, 1]
    for script in two_scripts:
        for one in starts(script):
            assert one["env"]["MOPD_SERVE_TOKEN"] == found[0]["key"]
    logs = sorted(path.name for path in (tmp_path / "run" / "servers").glob("*.log"))
    assert logs == [*(f"teachers.a-{n}.log" for n in range(3)), "teachers.b-0.log"]


@pytest.mark.dist
def test_what_fails_on_one_node_all_nodes_say(two_scripts: list[Path], tmp_path: Path) -> None:
    names = [str(script) for script in two_scripts]
    first, second = run_ranks(on_a_node, 2, names, str(tmp_path / "run"), ["--fail"])
    assert first == second
    assert first["said"].startswith("teachers.b.backend: its vLLM server ended while it was")
    assert first["said"].endswith("(on node 1)") and "too large" in first["said"]
    begun = len(starts(two_scripts[1]))  # the other one may be ended before it tells of its start
    names[1] = "/no/python"
    first, second = run_ranks(on_a_node, 2, names, str(tmp_path / "run"), [])
    assert first == second
    assert first["said"].startswith("MOPD_VLLM_PYTHON: /no/python is no interpreter")
    assert len(starts(two_scripts[1])) == begun in (1, 2)  # of the first try alone


TRAINER = """
import sys, time
from pathlib import Path
from tests.unit.runtime.test_servers import alone, reached
_servers = reached(alone(Path(sys.argv[1])), Path(sys.argv[2]))
print("ready", flush=True)
time.sleep(120)
"""


def test_a_trainer_that_is_killed_leaves_nothing(script: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", TRAINER, str(script), str(tmp_path / "run")]
    trainer = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    try:
        said = [line for line in iter(trainer.stdout.readline, "ready\n") if line]
        assert "starting vLLM for teachers.a at" in said[0] and "is ready" in said[1]
        assert len(left_over(script)) == 2
    finally:
        trainer.kill()
        trainer.wait()
        trainer.stdout.close()
    wait_until(lambda: not left_over(script))


def left_by_a_run(script: str, overrides: list[str]) -> tuple[str, list[int]]:
    """What went wrong, and the servers that are left in a process that goes on."""
    try:
        train_here("mopd_ctkd", overrides)
    except ConfigError as error:
        return str(error), left_over(Path(script))
    return "", left_over(Path(script))


@pytest.mark.dist
@pytest.mark.parametrize(
    ("kind", "more", "wrong"),
    [
        (TEACHER, {}, ""),
        (TEACHER, {"served_model": "other"}, "serves no model 'other'"),
        # long enough for it to tell of its start
        (SCRIPT, {"server__args": "[--slow]", "start_s": 5}, "is not healthy after 5 s"),
    ],
)
def test_servers_end_with_the_run_and_not_with_the_process(
    tiny_world: World, tmp_path: Path, kind: str, more: dict[str, Any], wrong: str
) -> None:
    """The run teaches by a server that wants its key; or it fails before its first step."""
    script = small_server(tmp_path, script=kind)
    keys = {"type": "vllm", "server__python": script, **more}
    overrides = words(
        tiny_world,
        tmp_path,
        "x",
        train__steps=2,
        distillation__top_k=16,
        **{f"teachers__sort__backend__{key}": value for key, value in keys.items()},
    )
    ((said, left),) = run_ranks(left_by_a_run, 1, str(script), overrides, timeout=120)
    assert wrong in said and bool(said) == bool(wrong)
    assert left == [] and len(starts(script)) == 1
    if not wrong:
        lines = step_lines(tmp_path / "x")
        assert len(lines) == 2 and all(line["alignment/sort"] > 0 for line in lines)
        assert "http://" not in (tmp_path / "x" / "config.yaml").read_text()


@pytest.mark.e2e
def test_a_start_that_fails_is_one_line_and_binds_nobody(
    script: Path, tiny_world: World, tmp_path: Path
) -> None:
    keys = {
        "teachers__sort__backend__type": "vllm",
        "teachers__sort__backend__server__python": script,
        "teachers__sort__backend__server__args": "[--fail]",
        "run__overwrite": "true",
    }
    for _ in range(2):  # again, over what the first one left
        done = launch("mopd_ctkd", words(tiny_world, tmp_path, "x", **keys), timeout=100)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: teachers.sort.backend: ") and "too large" in line
        assert "starting vLLM for teachers.sort at" in done.stdout
        assert [path.name for path in (tmp_path / "x").iterdir()] == ["servers"]
    assert len(starts(script)) == 2
