"""Engines that mopd starts itself: the keys that go with them."""

from __future__ import annotations

from collections.abc import Iterator

from mopd.config.backends import RolloutBackendSection, ServerSection, TeacherBackendSection
from mopd.config.check_servers import STARTED_TYPES, is_started
from mopd.config.pools import actor_hint, backends_of, is_actor
from mopd.config.schema import RunConfig

# Words that mopd writes itself, by their beginning: vLLM takes `--host=x` too.
OWN_WORDS = ("--model", "--host", "--port", "--uds", "--served-model-name", "--api-key")
TENSOR_PARALLEL_WORDS = ("--tensor-parallel-size", "-tp")
# Of `server`, what an actor with transformers reads; the others are vLLM's.
ACTOR_KEYS = ("replicas", "max_restarts")


def check_started(config: RunConfig) -> Iterator[str]:
    """One line per mistake: the key, what is wrong, the remedy."""
    for owner, backend in backends_of(config).items():
        yield from _section(config, owner, backend)


def _section(
    config: RunConfig, owner: str, backend: TeacherBackendSection | RolloutBackendSection
) -> Iterator[str]:
    prefix = f"{owner}.backend"
    if is_actor(config, owner):
        yield from _actor(prefix, backend.server)
        return
    server = backend.server
    if not is_started(backend):
        for key in _changed(server):
            yield (
                f"{prefix}.server.{key}: is only read where mopd starts the server itself: "
                f"type={' or '.join(STARTED_TYPES)} without urls{actor_hint(config, owner)}; leave "
                "one of them out"
            )
        return
    if backend.api_key_env is not None:
        yield (
            f"{prefix}.api_key_env: servers that mopd starts get a key of their own; set it to "
            "null, or give urls"
        )
    if config.launcher == "ray" and server.devices is not None:
        yield (
            f"{prefix}.server.devices: with launcher=ray Ray gives the devices; leave it out "
            f"({owner}.pool says with whom they are shared)"
        )
    else:
        yield from _devices(prefix, server)
    yield from _words(prefix, server)


def _actor(prefix: str, server: ServerSection) -> Iterator[str]:
    """Transformers in an actor of Ray."""
    for key in _changed(server):
        if key not in ACTOR_KEYS:
            yield (
                f"{prefix}.server.{key}: is vLLM's, and backend.type=hf is transformers on one "
                f"device; leave it out, or set type={' or '.join(STARTED_TYPES)}"
            )


def _changed(server: ServerSection) -> list[str]:
    default = ServerSection()
    return [
        key for key in ServerSection.model_fields if getattr(server, key) != getattr(default, key)
    ]


def _words(prefix: str, server: ServerSection) -> Iterator[str]:
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
