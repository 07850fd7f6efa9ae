"""Fixtures that are built once per session."""

from __future__ import annotations

from pathlib import Path

import pytest

from mopd.demo import World, WorldSpec, ensure_world


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """All files of the embedded world in seconds; its models know nothing."""
    return ensure_world(tmp_path_factory.mktemp("world"), spec=WorldSpec.tiny(), progress=False)


@pytest.fixture(scope="session")
def world() -> World:
    """The embedded world itself, shared with ``make train``."""
    root = Path(__file__).resolve().parents[1] / ".cache" / "mopd" / "world"
    return ensure_world(root, progress=False)
