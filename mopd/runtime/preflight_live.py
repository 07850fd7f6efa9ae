"""Every teacher and the sampler of a recipe, really loaded or reached, with its start-up self test.

In one process: the student's parallel sizes do not count here, and the student itself is built only
where a teacher lies on its ranks. Nothing is trained, and no server gets weights: one that samples
may be in use by a run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch

from mopd.config.pools import ROLLOUT, teacher_owner
from mopd.config.schema import ParallelSection, RunConfig
from mopd.device import get_device
from mopd.errors import MopdError
from mopd.metrics.span import Spans
from mopd.rollout.base import Sampler
from mopd.runtime.inside import InsideTeachers, build_engines
from mopd.runtime.parts import Tokenizers
from mopd.runtime.payloads import active_teachers
from mopd.runtime.preflight import Finding, looked_at, skipped
from mopd.runtime.sampler import build_sampler
from mopd.runtime.served import started_sections
from mopd.runtime.servers import Servers
from mopd.runtime.teachers import build_teacher, context_warnings
from mopd.student.model import build_student
from mopd.student.parallel import Topology, initialize, shutdown
from mopd.teachers.base import Bounded, Teacher
from mopd.teachers.pool import TeacherPool
from mopd.types import Prompt

INSIDE = ("megatron", "self")


def live_findings(
    config: RunConfig, tokenizers: Tokenizers, prompts: list[Prompt], *, directory: Path
) -> Iterator[Finding]:
    """One for each teacher and the sampler, and one more for each warning. Servers that the recipe
    leaves to mopd are started before and ended after it.

    Args:
        prompts: rows of data.path.
        directory: for the logs of servers that are started.
    """
    alone = config.student.model_copy(update={"parallel": ParallelSection()})
    config = config.model_copy(update={"student": alone})
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    backend = get_device(config.run.device)
    with ExitStack() as opened:
        topology = initialize(alone.parallel, backend=backend, seed=config.run.seed)
        opened.callback(shutdown)
        live = _Live(config, tokenizers, prompts, topology)
        yield from live.start_servers(opened, directory, device=backend.name)
        for name in active_teachers(config):
            yield from live.teacher(name)
        yield live.sampler(directory)


class _Live:
    def __init__(
        self, config: RunConfig, tokenizers: Tokenizers, prompts: list[Prompt], topology: Topology
    ) -> None:
        self._config, self._tokenizers = config, tokenizers
        self._prompts, self._topology = prompts, topology
        self._unreached: set[str] = set()  # owners whose servers did not start

    def start_servers(
        self, opened: ExitStack, directory: Path, *, device: str
    ) -> Iterator[Finding]:
        owners = set(started_sections(self._config))
        if not owners:
            return
        servers = Servers(self._config)
        opened.callback(servers.close)

        def start() -> str:
            servers.start(directory, device=device)
            self._config = servers.reach()
            return f"started for {', '.join(sorted(owners))}; they end with this check"

        found = looked_at("servers", start)
        if found.status == "problem":
            self._unreached = owners
        yield found

    def teacher(self, name: str) -> Iterator[Finding]:
        item = f"teachers.{name}"
        if teacher_owner(name) in self._unreached:
            yield skipped(item, "its server did not start")
            return
        warnings: list[str] = []
        yield looked_at(item, lambda: self._test(name, warnings))
        for warning in warnings:
            yield Finding(item=item, status="warning", detail=warning)

    def _test(self, name: str, warnings: list[str]) -> str:
        """A server's self test runs while its teacher is made."""
        config, tokenizers = self._config, self._tokenizers
        teacher = build_teacher(
            config,
            name,
            tokenizers.teachers[name],
            student=tokenizers.student,
            device=self._topology.device,
        )
        try:
            if config.teachers[name].backend.type in INSIDE:
                self._test_inside(name, teacher)
            pool = TeacherPool({name: teacher})
            warnings += context_warnings(config, pool, self._prompts)
            return _describe(config, name, teacher)
        finally:
            teacher.close()

    def _test_inside(self, name: str, teacher: Teacher) -> None:
        config, topology = self._config, self._topology
        only = {name: config.teachers[name]}
        student = build_student(config.student, topology=topology, seed=config.run.seed)
        engines = build_engines(
            config.model_copy(update={"teachers": only}), student, self._tokenizers.teachers
        )
        InsideTeachers(engines, topology=topology, teachers={name: teacher}, spans=Spans()).check()

    def sampler(self, directory: Path) -> Finding:
        backend = self._config.rollout.backend
        item = "rollout.backend"
        if ROLLOUT in self._unreached:
            return skipped(item, "its server did not start")
        return looked_at(item, lambda: self._sample(directory, backend.type))

    def _sample(self, directory: Path, kind: str) -> str:
        config = self._config
        found = build_sampler(config, self._tokenizers.student, self._topology, directory=directory)
        if found is None or kind == "dataset":
            return "answers come with the data; nothing samples"
        try:
            return f"{kind}: {_asked(found, kind, config, self._prompts)}"
        finally:
            found.close()


def _asked(sampler: Sampler, kind: str, config: RunConfig, prompts: list[Prompt]) -> str:
    """One greedy answer, where the weights are the student's own without a push."""
    urls = config.rollout.backend.urls
    if kind == "vllm" and urls:
        return f"{', '.join(urls)}: reached, and what the student needs; no weights were pushed"
    if kind == "custom":
        return "was built; it is asked once it has the student's weights"
    (answer,) = sampler.answer(prompts[:1])
    if not len(answer.token_ids):
        raise MopdError("an answer has no token, not even the end of its turn")
    return f"answered row {answer.prompt.id} with {len(answer.token_ids)} tokens"


def _describe(config: RunConfig, name: str, teacher: Teacher) -> str:
    backend = config.teachers[name].backend
    parts = [backend.type, *backend.urls]
    limit = teacher.max_length if isinstance(teacher, Bounded) else None
    if limit is not None:
        parts.append(f"reads {limit} tokens")
    return ", ".join(parts)
