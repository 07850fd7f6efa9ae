"""Servers: who has them, and the keys of those that are reached."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence

from mopd.config.backends import RolloutBackendSection, ServerSection, TeacherBackendSection
from mopd.config.urls import checked_url

ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
FOUND_KEYS = ("urls", "served_model", "api_key_env")  # who is asked; mopd knows its own
# Keys of both sections that only requests to servers read. `start_s` is left alone: recipes set it,
# and their types may be changed on the command line.
REMOTE_KEYS = (
    *FOUND_KEYS,
    *("deadline_s", "max_retries", "max_outstanding", "restart_budget_s"),
)
STARTED_TYPES = ("vllm", "mopd")


def is_started(backend: TeacherBackendSection | RolloutBackendSection) -> bool:
    """Whether mopd starts this section's servers."""
    mode = backend.mode if isinstance(backend, RolloutBackendSection) else "server"
    return backend.type in STARTED_TYPES and mode == "server" and not backend.urls


def check_reached(
    prefix: str, backend: TeacherBackendSection | RolloutBackendSection
) -> Iterator[str]:
    """Mistakes in how running servers are found. Never repeats a password or a key."""
    if len(set(backend.urls)) < len(backend.urls):
        yield f"{prefix}.urls: lists a server twice; give each replica once"
    for url in backend.urls:
        try:
            checked_url(url)
        except ValueError as error:
            yield f"{prefix}.urls: {re.sub('//.*@', '//***@', url)} {error}"
    variable = backend.api_key_env
    if variable is None:
        return
    if not ENVIRONMENT_NAME.fullmatch(variable):
        yield f"{prefix}.api_key_env: give the NAME of an environment variable, not the key"
    elif not os.environ.get(variable):
        yield f"{prefix}.api_key_env: the environment variable {variable} is not set; set it"


def unread(
    prefix: str,
    backend: TeacherBackendSection | RolloutBackendSection,
    keys: Sequence[str],
    readers: str,
) -> Iterator[str]:
    """Keys that nobody reads here and that are not what they are by default.

    Args:
        readers: what would read them, as in type=hf.
    """
    default = type(backend)()
    for key in keys:
        if getattr(backend, key) != getattr(default, key):
            yield f"{prefix}.{key}: is only read by {readers}; set that, or leave the key out"


def device_shares(server: ServerSection) -> list[str | None]:
    """The devices of each replica: an even share, or all of them those of one replica.

    None: not named.
    """
    if server.devices is None:
        return [None] * server.replicas
    names = server.devices.split(",")
    if len(names) == server.tensor_parallel_size:
        return [server.devices] * server.replicas
    size = len(names) // server.replicas
    return [",".join(names[i * size : (i + 1) * size]) for i in range(server.replicas)]
