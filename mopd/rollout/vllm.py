"""A sampler around vLLM servers that take the student's weights (docs/samplers.md)."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from mopd.errors import SamplerError
from mopd.rollout.fleet import Fleet, FleetOptions
from mopd.rollout.push import BroadcastPush, FilePush, WeightPush
from mopd.rollout.tasks import Job, Jobs
from mopd.rollout.versions import VersionPolicy
from mopd.serving.loop_thread import LoopEnded, LoopThread
from mopd.serving.sample_server import SampleServer, SampleServerOptions
from mopd.serving.sampling import MAX_SEQUENCES, PROCESSED, EngineFacts, SampleRequest
from mopd.types import Prompt, Rollout

T = TypeVar("T")

CLOSE_S = 5.0  # for a call of another thread, before it is ended


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncOptions:
    """How weights travel.

    Args:
        session: random text of this trainer, the same on all its replicas.
        pushes: whether this replica brings the weights; one of them does.
        directory: of mode files, seen by trainer and servers.
        device: of the trainer.
        barrier: waits for the other replicas, that nobody samples the version before any more.
    """

    mode: Literal["files", "broadcast"]
    session: str
    pushes: bool
    directory: Path
    device: torch.device
    barrier: Callable[[], object] = lambda: None


class VllmSampler:
    """Calls block and exclude each other, so that no answer overlaps an update by this trainer.
    The requests run in a background thread, where servers that failed are looked after meanwhile.

    ``events`` counts failed requests by reason.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        jobs: Jobs,
        server: SampleServerOptions,
        fleet: FleetOptions,
        sync: SyncOptions,
        batch_size: int,
    ) -> None:
        if not urls:
            raise SamplerError("rollout.backend.urls: is empty; name a server")
        self._jobs, self._sync = jobs, sync
        self._batch_size = min(batch_size, MAX_SEQUENCES)
        self._num_servers = len(urls)
        self._policy = VersionPolicy(sync.session, pushes=sync.pushes)
        self._push = _push(sync, vocab_size=jobs.vocab_size, deadline_s=server.update_s)
        self._tempered = jobs.options(greedy=False).temperature != 1.0
        self._lock = threading.Lock()
        self._fleet = Fleet(
            [SampleServer(url, server) for url in urls],
            policy=self._policy,
            push=self._push,
            check=self._check,
            options=fleet,
        )
        self._thread = LoopThread("sampler", release=self._fleet.close)
        try:
            self._room = self._run(self._fleet.start())
        except BaseException:
            self.close()
            raise

    @property
    def version(self) -> int:
        return self._policy.step

    @property
    def events(self) -> Counter[str]:
        return self._fleet.events

    def drain(self) -> dict[str, dict[str, int]]:
        """`events` since the last call, for the metrics ``requests/rollout/<why>``."""
        found = {"requests": dict(self.events)}
        self.events.clear()
        return found

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Takes every parameter of the student under its Hugging Face name.

        Raises:
            StaleWeightsError: the version is not newer.
            SamplerError: they are not those of the servers' model.
        """
        with self._lock:
            # the student changes while servers may still ask for this version again
            tensors = {name: _snapshot(tensor) for name, tensor in weights}
            self._push.take(self._policy.advance(version), tensors)
            self._sync.barrier()
            self._run(self._fleet.load(push=self._sync.pushes))

    def generate(self, prompts: Sequence[Prompt], *, step: int, version: int) -> list[Rollout]:
        """Answers of exactly ``version``, whatever happens to servers meanwhile.

        Raises:
            StaleWeightsError: that is not the version that was loaded last.
            SamplerError: the servers do not answer within the budget.
        """
        return self._answers(self._jobs.sampled(prompts, step=step), version, greedy=False)

    def answer(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """Greedy answers, for evaluation."""
        return self._answers(self._jobs.greedy(prompts), self.version, greedy=True)

    def _answers(self, jobs: Sequence[Job], version: int, *, greedy: bool) -> list[Rollout]:
        if not jobs:
            return []
        self._jobs.refuse_long(jobs, room=self._room)
        with self._lock:
            asked = self._policy.asked(version)
            size = min(self._batch_size, -(-len(jobs) // self._num_servers))
            requests = [
                SampleRequest(
                    version=asked,
                    options=self._jobs.options(greedy=greedy),
                    tasks=tuple(job.task for job in jobs[begin : begin + size]),
                )
                for begin in range(0, len(jobs), size)
            ]
            found = self._run(self._fleet.sample(requests))
        answers = [answer for part in found for answer in part]
        return self._jobs.rollouts(jobs, answers, version=version)

    def probe(self, ids: np.ndarray) -> np.ndarray:
        """[servers that are well, L - 1] log-probabilities of the tokens of ``ids`` [L], at
        temperature 1; `probed` names the servers."""
        with self._lock:
            return self._run(self._fleet.logprobs(ids.tolist()))

    @property
    def probed(self) -> Sequence[str]:
        """URLs, in the order of the rows of the last `probe`."""
        return self._fleet.probed

    def _check(self, server: SampleServer, facts: EngineFacts) -> None:
        if facts.vocab_size < self._jobs.vocab_size:
            raise SamplerError(
                f"rollout.backend.urls: {server.url} has {facts.vocab_size} columns of logits and "
                f"the student's tokenizer {self._jobs.vocab_size} tokens; start it on student.model"
            )
        if self._tempered and facts.logprobs_mode != PROCESSED:
            raise SamplerError(
                f"rollout.backend.urls: {server.url} gives log-probabilities in mode "
                f"{facts.logprobs_mode}, not at rollout.temperature; start it with "
                f"--logprobs-mode {PROCESSED}"
            )

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return self._thread.run(work)
        except LoopEnded:
            ended = self._thread.ended
            why = "closed while it was asked"
            if ended is not None:
                why = f"the thread of its requests ended with {type(ended).__name__} ({ended})"
            raise SamplerError(f"rollout.backend: {why}") from ended

    def close(self) -> None:
        """Ends what is asked, within seconds; safe to call twice. The servers go on."""
        held = self._lock.acquire(timeout=CLOSE_S)
        try:
            self._thread.close()
            self._push.close()
        finally:
            if held:
                self._lock.release()


def _push(sync: SyncOptions, *, vocab_size: int, deadline_s: float) -> WeightPush:
    if sync.mode == "broadcast":
        return BroadcastPush(vocab_size=vocab_size, deadline_s=deadline_s, device=sync.device)
    return FilePush(
        sync.directory, vocab_size=vocab_size, deadline_s=deadline_s, writes=sync.pushes
    )


def _snapshot(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
