"""One Ray of this host for all tests of Ray mode."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mopd.runtime.ray.head import LocalHead


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """Eight processors' worth of a cluster; its token is in the environment."""
    head = LocalHead(num_cpus=8)
    try:
        head.wait()
        yield head.address
    finally:
        head.close()
