"""The contract of samplers on servers, on a made-up engine behind the real endpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mopd.demo import World
from tests.helpers.plain_model import PlainModel
from tests.helpers.sample_engine import SampleHost
from tests.helpers.sampler_contract import *  # noqa: F403 - its tests run here
from tests.helpers.samplers import Site

pytestmark = pytest.mark.usefixtures("made_up_params")


@pytest.fixture(scope="module")
def model(tiny_world: World) -> PlainModel:
    return PlainModel(tiny_world.student)


@pytest.fixture
def site(model: PlainModel, tmp_path: Path) -> Iterator[Site]:
    with SampleHost(model.model_dir) as host:
        yield Site(urls=(host.url,), model=model, root=tmp_path / "weights")
