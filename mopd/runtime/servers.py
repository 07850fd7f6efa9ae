"""The vLLM servers that a run starts for itself, on the host of rank 0."""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mopd.config.backends import RemoteSection
from mopd.config.check_servers import device_shares, is_started
from mopd.config.schema import RunConfig
from mopd.errors import ConfigError
from mopd.runtime.payloads import active_teachers
from mopd.runtime.replica import from_main
from mopd.serving.launch import (
    Launch,
    ServerProcess,
    close_all,
    find_python,
    free_ports,
    importable,
)
from mopd.serving.vllm_command import ServedModel, started_environment, started_words

ROLLOUT = "rollout"
KEY_VARIABLE = "MOPD_SERVER_TOKEN"  # where the clients of these servers find their key
FOLDER, IMPORTS = "servers", "python"  # in a run's directory: logs, and what they import
JOURNAL = "journal"
LOOK_S = 1.0

SectionT = TypeVar("SectionT", bound=RemoteSection)


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    """What rank 0 tells the others."""

    urls: Mapping[str, tuple[str, ...]]  # by the section's owner, as in teachers.math
    key: str
    failure: str | None
    is_ready: bool


class Servers:
    """Empty until `start`, and on every rank but the first; `close` is safe at any time."""

    def __init__(self, config: RunConfig) -> None:
        self.processes: list[ServerProcess] = []
        self._config = config
        self._sections = _started_sections(config)
        self._key = secrets.token_urlsafe(32)
        self._closed = threading.Event()

    def start(self, directory: Path, *, device: str) -> None:
        """Starts all of them and does not wait; rank 0 alone does something.

        Args:
            directory: of the run.
            device: cpu, cuda or npu.
        Raises:
            ConfigError: no interpreter has vLLM, or the job has several hosts.
        """
        if not self._sections:
            return
        _refuse_many_hosts(next(iter(self._sections)))
        if os.environ.get("RANK", "0") != "0":
            return
        folder = directory / FOLDER
        imports = importable(folder / IMPORTS)
        pythons = {
            owner: find_python(f"{owner}.backend", section.server.python, os.environ)
            for owner, section in self._sections.items()
        }
        total = sum(section.server.replicas for section in self._sections.values())
        ports = iter(free_ports(total))
        for owner, section in self._sections.items():
            served = _served(self._config, owner, device=device)
            for number, devices in enumerate(device_shares(section.server)):
                port = next(ports)
                launch = Launch(
                    owner=owner,
                    words=(pythons[owner], *started_words(served, port=port)),
                    environment=started_environment(
                        os.environ, token=self._key, imports=imports, device=device, devices=devices
                    ),
                    port=port,
                    log=folder / f"{owner}-{number}.log",
                    max_restarts=section.server.max_restarts,
                )
                self.processes.append(ServerProcess(launch, _say))

    def reach(self) -> RunConfig:
        """The recipe with their URLs and the name of their key, once all were healthy.

        Collective over all ranks.

        Raises:
            ConfigError: one ended while it was starting, or is not healthy in time.
        """
        if not self._sections:
            return self._config
        while True:
            state: _State = from_main(self._state() if self.processes else None)
            if state.failure is not None:
                raise ConfigError(state.failure)
            if state.is_ready:
                break
            self._closed.wait(LOOK_S)
        os.environ[KEY_VARIABLE] = state.key
        return _filled(self._config, state.urls)

    def _state(self) -> _State:
        urls = {
            owner: tuple(p.url for p in self.processes if p.launch.owner == owner)
            for owner in self._sections
        }
        return _State(
            urls=urls,
            key=self._key,
            failure=next(self._failures(), None),
            is_ready=all(process.was_healthy for process in self.processes),
        )

    def _failures(self) -> Iterator[str]:
        for process in self.processes:
            if process.failure is not None:
                yield process.failure
            start_s = self._sections[process.launch.owner].start_s
            if not process.was_healthy and process.seconds > start_s:
                yield (
                    f"{process.launch.key}: its vLLM server is not healthy after {start_s:g} s; "
                    f"raise {process.launch.key}.start_s, or see {process.launch.log}"
                )

    def close(self) -> None:
        """Ends the servers and everything that they started."""
        self._closed.set()
        close_all(self.processes)
        if self.processes:
            os.environ.pop(KEY_VARIABLE, None)


def is_failed_start(directory: Path) -> bool:
    """Whether a run's directory holds nothing, or no more than a start that failed leaves there:
    logs of servers, journals without a line."""
    for path in directory.rglob("*"):
        top = path.relative_to(directory).parts[0]
        if path.is_dir():
            known = top in (FOLDER, JOURNAL)
        elif top == JOURNAL:
            known = path.stat().st_size == 0
        else:
            known = path.parent == directory / FOLDER and path.suffix == ".log"
        if not known and IMPORTS not in path.relative_to(directory).parts:
            return False
    return True


def _say(message: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads any more, and restarts go on
        print(message, flush=True)


def _started_sections(config: RunConfig) -> dict[str, RemoteSection]:
    """Sections whose servers mopd starts, by their owner: rollout, teachers.math."""
    sections: dict[str, RemoteSection] = {}
    if is_started(config.rollout.backend):
        sections[ROLLOUT] = config.rollout.backend
    for name, teacher in active_teachers(config).items():
        if is_started(teacher.backend):
            sections[f"teachers.{name}"] = teacher.backend
    return sections


def _served(config: RunConfig, owner: str, *, device: str) -> ServedModel:
    """What the servers of one section serve.

    A teacher scores in vLLM's choice of a type; the sampler's weights are the student's, and so is
    their type.
    """
    is_small = device == "cpu"
    if owner == ROLLOUT:
        model, tokenizer = config.student.model, config.student.tokenizer
        section: RemoteSection = config.rollout.backend
        dtype = config.student.dtype
        top_k = None
    else:
        teacher = config.teachers[owner.partition(".")[2]]
        model, tokenizer, section = teacher.model, teacher.tokenizer, teacher.backend
        dtype = "float32" if is_small else None
        top_k = config.distillation.top_k
    assert model is not None  # check_config
    return ServedModel(
        model=Path(model).absolute(),
        tokenizer=None if tokenizer is None else str(Path(tokenizer).absolute()),
        name=section.served_model or owner,
        max_logprobs=top_k,
        processed_logprobs=owner == ROLLOUT,
        dtype=dtype,
        is_small=is_small,
        more=section.server.args,
    )


def _refuse_many_hosts(owner: str) -> None:
    world = os.environ.get("WORLD_SIZE", "1")
    if os.environ.get("LOCAL_WORLD_SIZE", world) != world:
        raise ConfigError(
            f"{owner}.backend.urls: is empty, and servers that mopd starts are on the loopback of "
            "one host; start them yourself for a job of several hosts, and give their urls"
        )


def _filled(config: RunConfig, urls: Mapping[str, tuple[str, ...]]) -> RunConfig:
    """A copy whose started sections are those of servers that are running."""
    rollout, teachers = config.rollout, dict(config.teachers)
    if ROLLOUT in urls:
        backend = _reached(rollout.backend, urls[ROLLOUT])
        rollout = rollout.model_copy(update={"backend": backend})
    for name, teacher in config.teachers.items():
        if (owner := f"teachers.{name}") in urls:
            backend = _reached(teacher.backend, urls[owner])
            teachers[name] = teacher.model_copy(update={"backend": backend})
    return config.model_copy(update={"rollout": rollout, "teachers": teachers})


def _reached(section: SectionT, urls: tuple[str, ...]) -> SectionT:
    return section.model_copy(update={"urls": urls, "api_key_env": KEY_VARIABLE})
