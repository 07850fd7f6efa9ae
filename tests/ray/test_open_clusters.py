"""A cluster that asks for no token is refused, wherever it listens and whatever the driver has."""

from __future__ import annotations

import os
import random
import secrets
import socket
from collections.abc import Iterator

import pytest

from mopd.errors import ConfigError
from mopd.runtime.ray import head as head_module
from mopd.runtime.ray.head import LocalHead
from mopd.serving.address import LOOPBACK, is_free
from tests.helpers.ray_attached import attached, head

pytestmark = pytest.mark.ray


def _refused(*, allow: bool = False) -> str:
    from mopd.config.schema import RunConfig
    from mopd.runtime.ray.cluster import refuse_open_cluster

    config = RunConfig.model_validate({"ray": {"allow_unauthenticated": allow}})
    try:
        refuse_open_cluster(config, "HEAD:6379")
    except ConfigError as error:
        return str(error)
    return "accepted"


def _accepted() -> str:
    return _refused(allow=True)


@pytest.fixture(scope="module", params=["any address", "the loopback"])
def open_cluster(request: pytest.FixtureRequest) -> Iterator[str]:
    """The head listens on every address in both cases."""
    words = ["--node-ip-address", LOOPBACK] if request.param == "the loopback" else []
    with head(*words, token=False) as (address, _):
        yield address


@pytest.mark.parametrize("has_token", [False, True])
def test_an_open_cluster(open_cluster: str, has_token: bool) -> None:
    """It takes a driver with a token as well, and looks alike from there."""
    environment = {"RAY_AUTH_MODE": "disabled"}
    if has_token:
        environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with attached(open_cluster, environment) as call:
        assert call(_refused).startswith("ray.address: HEAD:6379 asks for no token")
        assert call(_accepted) == "accepted"


def test_one_with_a_token(ray_address: str) -> None:
    with attached(ray_address) as call:
        assert call(_refused) == "accepted"


def _port_of_rays_workers() -> int:
    """A free one in the range that Ray has for them by default. Drawn: other suites look, too."""
    ports = random.SystemRandom().sample(range(18_100, 20_000), 1_900)
    return next(port for port in ports if is_free(LOOPBACK, port))


def test_a_ray_of_this_host_may_have_any_port(monkeypatch: pytest.MonkeyPatch) -> None:
    port = _port_of_rays_workers()
    monkeypatch.setattr(head_module, "free_ports", lambda count: [port] * count)
    before = {name: os.environ.get(name) for name in head_module.TOKEN_VARIABLES}
    own = LocalHead(num_cpus=1)
    try:
        own.wait()
        with socket.create_connection((LOOPBACK, port), timeout=5):
            pass
    finally:
        own.close()
    assert {name: os.environ.get(name) for name in head_module.TOKEN_VARIABLES} == before
