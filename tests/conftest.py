"""Fixtures that are built once per session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from mopd.demo import World, WorldSpec, ensure_world
from tests.helpers.vllm_server import VllmServer, run_vllm_server, vllm_python

# A slow machine is no counterexample.
# The same examples every time: a run that fails was changed. Others are tried by
# `pytest --hypothesis-profile=explore`.
settings.register_profile("mopd", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile("mopd")


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """All files of the embedded world in seconds; its models know nothing."""
    return ensure_world(tmp_path_factory.mktemp("world"), spec=WorldSpec.tiny(), progress=False)


@pytest.fixture(scope="session")
def world() -> World:
    """The embedded world itself, shared with ``make train``."""
    root = Path(__file__).resolve().parents[1] / ".cache" / "mopd" / "world"
    return ensure_world(root, progress=False)


@pytest.fixture(scope="session")
def vllm_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmServer]:
    """One real vLLM server on the teacher `sort` of the tiny world; skips where vLLM is missing."""
    vllm_python()  # before the world is built for nothing
    world = request.getfixturevalue("tiny_world")
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    with run_vllm_server(world.teachers["sort"], log=log) as server:
        yield server
