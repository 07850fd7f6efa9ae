"""Addresses and ports of this machine. Nothing but the standard library: vLLM's workers import it,
too."""

from __future__ import annotations

import contextlib
import ipaddress
import random
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack

LOOPBACK = "127.0.0.1"
# Below the range from which systems take ports for outgoing connections, above those of Ray's
# workers (10002 to 19999), on which `ray start` refuses to listen.
PORTS = range(20_000, 32_000)
ANY_PORT = 9  # a route is looked up, nothing is sent


def address_towards(host: str, port: int = ANY_PORT) -> str:
    """This machine's address on its way to ``host``, a name or an address.

    Raises:
        OSError: the name leads nowhere, or there is no way.
    """
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return probe.getsockname()[0]


def is_loopback(host: str) -> bool:
    """Whether a socket bound to ``host`` can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def base_url(host: str, port: int) -> str:
    """With the brackets that an IPv6 address needs."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def bound(host: str, port: int, *, reuse: bool = False) -> socket.socket:
    """A socket that holds an address and does not listen there.

    Args:
        reuse: connections of a server that is gone do not count, as for servers themselves.
    Raises:
        OSError: somebody listens there, or the address is not this machine's.
    """
    with ExitStack() as opened:
        probe = opened.enter_context(
            socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        )
        if reuse:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        opened.pop_all()
        return probe


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now."""
    try:
        bound(host, port, reuse=True).close()
    except OSError:
        return False
    return True


def free_ports(count: int, *, host: str = LOOPBACK) -> list[int]:
    """Different ports of ``host`` that nobody listens on, or holds, at this moment.

    Raises:
        OSError: ``host`` is no address of this machine.
    """
    with held_ports(count, host=host) as found:
        return found


@contextlib.contextmanager
def held_ports(count: int, *, host: str = LOOPBACK) -> Iterator[list[int]]:
    """Such ports, which on Linux nobody else is given within. Servers can listen there meanwhile:
    they reuse addresses. Other systems would not let them, so there nothing is held.

    Raises:
        OSError: ``host`` is no address of this machine.
    """
    bound(host, 0).close()
    found: list[int] = []
    with ExitStack() as held:
        for port in random.SystemRandom().sample(PORTS, len(PORTS)):
            if len(found) == count:
                break
            with contextlib.suppress(OSError):
                one = held.enter_context(bound(host, port))
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                found.append(port)
        if sys.platform != "linux":
            held.close()
        yield found
