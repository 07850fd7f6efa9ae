"""A recipe whose engines are running: their URLs in the sections that asked for them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, TypeVar

from mopd.config.backends import RolloutBackendSection, TeacherBackendSection
from mopd.config.pools import ROLLOUT, teacher_owner
from mopd.config.schema import RunConfig

KEY_VARIABLE = "MOPD_SERVER_TOKEN"  # where the clients of these servers find their key

SectionT = TypeVar("SectionT", TeacherBackendSection, RolloutBackendSection)


class ServerSource(Protocol):
    """Where a run's servers come from."""

    def start(self, directory: Path, *, device: str) -> None:
        """Begins to start them and does not wait."""
        ...

    def reach(self) -> RunConfig:
        """The recipe with their URLs. Collective over all ranks."""
        ...

    def close(self) -> None:
        """Ends what `start` began. Safe at any time."""
        ...


class GivenServers:
    """Servers that somebody else started for this run, and ends.

    Args:
        urls: by owner (rollout, teachers.math), in the order of the replicas.
    """

    def __init__(self, config: RunConfig, urls: Mapping[str, tuple[str, ...]], *, key: str) -> None:
        self._config = filled(config, urls)
        self._key = key

    def start(self, directory: Path, *, device: str) -> None:
        os.environ[KEY_VARIABLE] = self._key

    def reach(self) -> RunConfig:
        return self._config

    def close(self) -> None:
        os.environ.pop(KEY_VARIABLE, None)


def filled(config: RunConfig, urls: Mapping[str, tuple[str, ...]]) -> RunConfig:
    """A copy in which the owners of ``urls`` are servers that are running."""
    rollout, teachers = config.rollout, dict(config.teachers)
    if ROLLOUT in urls:
        backend = _reached(rollout.backend, urls[ROLLOUT], hf="vllm")
        rollout = rollout.model_copy(update={"backend": backend})
    for name, teacher in config.teachers.items():
        if (owner := teacher_owner(name)) in urls:
            backend = _reached(teacher.backend, urls[owner], hf="mopd")
            teachers[name] = teacher.model_copy(update={"backend": backend})
    return config.model_copy(update={"rollout": rollout, "teachers": teachers})


def _reached(section: SectionT, urls: tuple[str, ...], *, hf: str) -> SectionT:
    """``hf``: how an engine of transformers is spoken to, whatever the recipe calls it."""
    update: dict[str, object] = {"urls": urls, "api_key_env": KEY_VARIABLE}
    return section.model_copy(update=update | ({"type": hf} if section.type == "hf" else {}))
