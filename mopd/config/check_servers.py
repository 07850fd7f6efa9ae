"""Servers that mopd starts itself: who has them, and the keys that go with them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence

from mopd.config.backends import RolloutBackendSection, ServerSection, TeacherBackendSection
from mopd.config.schema import RunConfig
from mopd.config.urls import checked_url

ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Keys of both sections that only requests to servers read. `start_s` is left alone: recipes set it,
# and their types may be changed on the command line.
REMOTE_KEYS = (
    *("urls", "served_model", "api_key_env"),
    *("deadline_s", "max_retries", "max_outstanding", "restart_budget_s"),
)
STARTED_TYPES = ("vllm", "mopd")
# Words that mopd writes itself, by their beginning: vLLM takes `--host=x` too.
OWN_WORDS = ("--model", "--host", "--port", "--uds", "--served-model-name", "--api-key")
TENSOR_PARALLEL_WORDS = ("--tensor-parallel-size", "-tp")


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
    """Keys that nobody reads here and that are not what they are by default."""
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


def check_started(config: RunConfig) -> Iterator[str]:
    """One line per mistake: the key, what is wrong, the remedy."""
    yield from _section("rollout.backend", config.rollout.backend)
    for name, teacher in config.teachers.items():
        yield from _section(f"teachers.{name}.backend", teacher.backend)


def _section(prefix: str, backend: TeacherBackendSection | RolloutBackendSection) -> Iterator[str]:
    server, default = backend.server, ServerSection()
    if not is_started(backend):
        for key in ServerSection.model_fields:
            if getattr(server, key) != getattr(default, key):
                yield (
                    f"{prefix}.server.{key}: is only read where mopd starts the server itself: "
                    f"type={' or '.join(STARTED_TYPES)} without urls; leave one of them out"
                )
        return
    if backend.api_key_env is not None:
        yield (
            f"{prefix}.api_key_env: servers that mopd starts get a key of their own; set it to "
            "null, or give urls"
        )
    yield from _devices(prefix, server)
    for word in server.args:
        name = word.partition("=")[0].replace("_", "-")
        if name in TENSOR_PARALLEL_WORDS:
            yield (
                f"{prefix}.server.args: {name} is a key of its own; set {prefix}.server."
                "tensor_parallel_size instead"
            )
        if name in OWN_WORDS:
            yield f"{prefix}.server.args: {name} is written by mopd itself; leave it out"


def _devices(prefix: str, server: ServerSection) -> Iterator[str]:
    if server.devices is None:
        return
    count, size = len(server.devices.split(",")), server.tensor_parallel_size
    whole = server.replicas * size
    if count != size and count % whole:
        yield (
            f"{prefix}.server.devices: {count} cannot be shared evenly by {server.replicas} "
            f"replicas (server.tensor_parallel_size={size}); name {size} for all of them, or a "
            f"multiple of {whole}"
        )
