"""Addresses of this machine, and ports that nobody has."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from mopd.serving import address
from mopd.serving.address import (
    LOOPBACK,
    PORTS,
    address_towards,
    base_url,
    bound,
    free_ports,
    held_ports,
    is_free,
)
from tests.helpers.runs import ROOT


def test_the_way_to_the_loopback_begins_there() -> None:
    assert address_towards(LOOPBACK) == LOOPBACK
    with pytest.raises(OSError):
        address_towards("no-such-host.invalid")


@pytest.mark.parametrize(
    ("host", "url"),
    [("10.0.0.2", "http://10.0.0.2:80"), ("fd00::2", "http://[fd00::2]:80")],
)
def test_urls(host: str, url: str) -> None:
    assert base_url(host, 80) == url


def test_no_port_is_one_of_rays_workers() -> None:
    """`ray start --port` refuses those, and its workers take them as they come."""
    start = pytest.importorskip("ray.scripts.scripts").start
    defaults = {option.name: option.default for option in start.params}
    assert min(PORTS) > defaults["max_worker_port"]


def test_a_port_is_free_unless_somebody_listens() -> None:
    with bound(LOOPBACK, 0, reuse=True) as held:
        port = held.getsockname()[1]
        assert is_free(LOOPBACK, port)  # of a server that is gone, for example
        held.listen()
        assert not is_free(LOOPBACK, port)
    assert is_free(LOOPBACK, port)


def test_a_port_is_free_at_once_when_its_server_was_killed_with_connections_open() -> None:
    with bound(LOOPBACK, 0, reuse=True) as server:
        server.listen()
        port = server.getsockname()[1]
        with socket.create_connection((LOOPBACK, port)):
            accepted, _ = server.accept()
            server.close()
            accepted.close()  # first of the two, so the pair lingers in TIME_WAIT
    assert is_free(LOOPBACK, port)


def test_ports_are_those_of_one_address() -> None:
    ports = free_ports(3)
    assert len(set(ports)) == 3 and set(ports) <= set(PORTS)
    with pytest.raises(OSError):
        free_ports(1, host="192.0.2.77")  # RFC 5737: nobody's


@pytest.mark.skipif(sys.platform != "linux", reason="no other system shares a held port")
@pytest.mark.parametrize("host", [LOOPBACK, ""])
def test_a_held_port_is_for_its_server_alone(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address, "PORTS", free_ports(3))
    with held_ports(2, host=host) as held:
        (other,) = free_ports(3)  # there are no more
        assert {other, *held} == set(address.PORTS)
        with bound(LOOPBACK, held[0], reuse=True) as server:
            server.listen()
            socket.create_connection((LOOPBACK, held[0])).close()
    assert held[1] in free_ports(3)


def test_vllms_interpreter_and_an_actor_can_import_it() -> None:
    """Without torch, and without what mopd's recipes are read with."""
    code = (
        "import sys; sys.modules['omegaconf'] = sys.modules['torch'] = None\n"
        "import mopd.serving.address, mopd.serving.guard, mopd.serving.vllm_command\n"
        "del sys.modules['omegaconf']\n"
        "import mopd.serving.launch"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
