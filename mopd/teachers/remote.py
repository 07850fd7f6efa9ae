"""A teacher behind HTTP servers, which may be several replicas of one model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mopd.config.schema import PrivilegedSection
from mopd.errors import TeacherError
from mopd.serving.endpoint import Endpoint
from mopd.serving.http import ServerError
from mopd.serving.replicas import Replicas
from mopd.serving.reply import AMBIGUOUS, ArrayRows, Entries, token_names
from mopd.serving.scoring import ScoredSequence
from mopd.teachers.admission import Admitted, admit, nothing
from mopd.teachers.base import TeacherInput, teacher_input
from mopd.teachers.identity import Identity
from mopd.teachers.selftest import Canary, difference, fingerprint, recheck, self_test
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Prompt, Rollout, TeacherScores

CANARY_K = 64  # entries of the fixed text where whole rows are asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteOptions:
    """What is asked of the servers.

    Args:
        top_k: entries of a row; None asks for whole rows.
        min_length: tokens that a server must read at least, else it is refused.
        canary_interval: requests to a server between two looks at a fixed text; 0: only new
            connections are looked at.
        privileged: what the teacher reads and the student does not.
    """

    top_k: int | None
    tolerance: float
    min_length: int = 0
    canary_interval: int = 0
    privileged: PrivilegedSection | None = None


class RemoteTeacher:
    """Waits for its servers and tests them when it is made.

    ``missing`` counts response positions without a score by reason, ``events`` failed requests.

    Raises:
        TeacherError: a server that cannot be this teacher, in one line with the remedy.
    """

    concurrent = True

    def __init__(
        self,
        name: str,
        replicas: Replicas,
        *,
        tokenizer: ChatTokenizer,
        student: ChatTokenizer,
        options: RemoteOptions,
    ) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.missing: Counter[str] = Counter()
        self._student = student
        self._replicas = replicas
        self._privileged = options.privileged
        self._size = tokenizer.vocabulary.size
        self._k = None if options.top_k is None else min(options.top_k, self._size)
        self._canary = Canary.of(
            name,
            tokenizer,
            k=min(CANARY_K, self._size) if self._k is None else self._k,
            tolerance=options.tolerance,
            min_length=options.min_length,
        )
        self._identity = Identity(name, tokenizer)
        self._canary_interval = options.canary_interval
        try:
            self._reference = replicas.run(self._start())
        except BaseException:
            replicas.close()
            raise
        first = replicas.endpoints[0]
        self._sends_lse = first.protocol.sends_lse
        self._fingerprint = first.model
        if not first.protocol.is_identity:
            self._fingerprint = fingerprint(first.model, self._canary, self._reference)
        limits = [e.max_length for e in replicas.endpoints if e.max_length is not None]
        self.max_length = min(limits, default=None)

    @property
    def events(self) -> Counter[str]:
        return self._replicas.events

    async def _start(self) -> Admitted:
        found: list[Admitted] = []
        first = self._replicas.endpoints[0]
        for endpoint in self._replicas.endpoints:
            try:
                await endpoint.start()
                found.append(await self_test(endpoint, self._canary, self._identity))
            except ServerError as error:
                raise TeacherError(f"teachers.{self.name}: {error}") from error
            if endpoint.protocol.is_identity and endpoint.model != first.model:
                raise self._canary.error(
                    endpoint,
                    f"serves {endpoint.model[:12]}... and the first replica {first.model[:12]}...; "
                    f"start all of teachers.{self.name}.backend.urls from the same model",
                )
            if (worst := difference(found[0], found[-1])) > self._canary.tolerance:
                raise self._canary.error(
                    endpoint,
                    f"scores a fixed text {worst:.2g} away from the first replica: another model; "
                    f"start all of teachers.{self.name}.backend.urls from the same one",
                )
        for endpoint in self._replicas.endpoints:
            endpoint.probe, endpoint.probe_interval = self._probe, self._canary_interval
        return found[0]

    async def _probe(self, endpoint: Endpoint) -> None:
        await endpoint.find_model()
        await recheck(endpoint, self._canary, self._identity, self._reference)

    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        """One `TeacherScores` per rollout, in order; rows without a score are not valid.

        Raises:
            TeacherExhausted: no server answers. TeacherError: it is another one than before.
        """
        inputs = [
            teacher_input(r, self.tokenizer, student=self._student, privileged=self._privileged)
            for r in rollouts
        ]
        sent = [self._sent(x) for x in inputs]
        widths = [self._width(rollout.prompt) for rollout in rollouts]
        said: list[Entries | ArrayRows | str] = ["context"] * len(inputs)
        # those with few entries are not sent as many as the others
        for k in dict.fromkeys(widths):
            asked = {i: s for i, s in enumerate(sent) if s is not None and widths[i] == k}
            found = self._replicas.score(list(asked.values()), k)
            for i, one in zip(asked, found, strict=True):
                said[i] = one
        return [self._scores(*row) for row in zip(inputs, sent, widths, said, strict=True)]

    def _width(self, prompt: Prompt) -> int | None:
        """Entries of its rows; None: the whole vocabulary."""
        if self._k is None or prompt.top_k is None:
            return self._k
        return min(self._k, prompt.top_k)

    def _sent(self, x: TeacherInput) -> ScoredSequence | None:
        """[P + T'] as much as the server reads; None: not one token of the response."""
        ids = np.concatenate([x.prompt_ids, x.token_ids]).astype(np.int64)[: self.max_length]
        if not len(x.prompt_ids) or len(ids) <= len(x.prompt_ids):
            return None
        return ScoredSequence(ids=ids, start=len(x.prompt_ids))

    def _scores(
        self,
        x: TeacherInput,
        sent: ScoredSequence | None,
        k: int | None,
        said: Entries | ArrayRows | str,
    ) -> TeacherScores:
        total = len(x.token_ids)
        if isinstance(said, str) or sent is None:
            parts = [nothing(total, k, str(said), vocab_size=self._size)]
        else:
            admitted = admit(said, ids=sent.ids, num_prompt=sent.start, k=k, vocab_size=self._size)
            beyond = total - len(admitted.valid)
            rest = [nothing(beyond, k, "context", vocab_size=self._size)] if beyond else []
            parts = [admitted, *rest]
        for part in parts:
            self.missing.update(part.missing)
        return TeacherScores(
            teacher=self.name,
            model_fingerprint=self._fingerprint,
            token_ids=x.token_ids,
            byte_ends=x.byte_ends,
            logprobs=np.concatenate([part.logprobs for part in parts]),
            topk_ids=_joined([part.topk_ids for part in parts]),
            topk_logprobs=np.concatenate([part.topk_logprobs for part in parts]),
            log_tail=np.concatenate([part.log_tail for part in parts]),
            lse=_joined([part.lse for part in parts]) if self._sends_lse else None,
            valid=np.concatenate([part.valid for part in parts]),
        )

    def drain(self) -> dict[str, dict[str, int]]:
        """`missing` and `events` since the last call."""
        found = {"missing": dict(self.missing), "requests": dict(self.events)}
        self.missing.clear()
        self.events.clear()
        return found

    def drain_latencies(self) -> list[float]:
        """Seconds of every request that was answered since the last call, tries included."""
        found = list(self._replicas.latencies)
        self._replicas.latencies.clear()
        return found

    def identity(self) -> dict[str, Any]:
        """What it is called, and its scores of the fixed text (NaN as null)."""
        scores = self._reference.logprobs.astype(float).tolist()
        return {
            "model": self._fingerprint,
            "scores": [None if math.isnan(score) else score for score in scores],
        }

    def differs(self, before: Mapping[str, Any]) -> str | None:
        """The scores of the fixed text are compared, or the hashes of servers that tell one."""
        first = self._replicas.endpoints[0]
        if first.protocol.is_identity and before.get("model") == self._fingerprint:
            return None
        old, new = np.array(before.get("scores", ()), dtype=float), self._reference.logprobs
        if old.shape != new.shape:
            return "reads a fixed text in other tokens"
        worst = float(np.nanmax(np.abs(old - new), initial=0.0))
        if worst <= self._canary.tolerance:
            return None
        return (
            f"scores a fixed text {worst:.2g} away (backend.tolerance {self._canary.tolerance:g})"
        )

    def accuracy(self, prompts: Sequence[Prompt], *, max_new_tokens: int) -> float | None:
        """Not measured: the servers are asked for scores only."""
        return None

    def close(self) -> None:
        """Closes the connections; the servers stay."""
        self._replicas.close()


def _joined(parts: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """One behind another; None where no part has any."""
    known = [part for part in parts if part is not None]
    return np.concatenate(known) if known else None


def names_of(tokenizer: ChatTokenizer) -> dict[str, int]:
    """String -> id for servers that speak in strings."""
    vocabulary = tokenizer.vocabulary
    names = token_names(vocabulary.token_bytes)
    names[tokenizer.eos_text] = tokenizer.eos_id
    # servers that leave the end of the turn out leave out every control token
    silent = np.flatnonzero(vocabulary.control | (vocabulary.lengths == 0))
    names[""] = tokenizer.eos_id if len(silent) == 1 else AMBIGUOUS
    return names
