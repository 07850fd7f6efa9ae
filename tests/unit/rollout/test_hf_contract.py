"""The contract of samplers on servers, on transformers behind the standard library's server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mopd.demo import World
from tests.helpers.hf_host import hf_host
from tests.helpers.plain_model import PlainModel
from tests.helpers.sampler_contract import *  # noqa: F403 - its tests run here
from tests.helpers.samplers import Site


@pytest.fixture(scope="module")
def model(tiny_world: World) -> PlainModel:
    return PlainModel(tiny_world.student)


@pytest.fixture
def site(model: PlainModel, tmp_path: Path) -> Iterator[Site]:
    with hf_host(model.model_dir) as server:
        yield Site(urls=(server.url,), model=model, root=tmp_path / "weights")
