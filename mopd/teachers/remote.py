"""A teacher behind HTTP servers, which may be several replicas of one model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mopd.errors import TeacherError
from mopd.serving.endpoint import Endpoint
from mopd.serving.http import ServerError
from mopd.serving.replicas import Replicas
from mopd.serving.reply import Entries, token_names
from mopd.teachers.admission import Admitted, admit, nothing
from mopd.teachers.base import TeacherInput, teacher_input
from mopd.teachers.identity import Identity
from mopd.teachers.selftest import Canary, difference, fingerprint, recheck, self_test
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Prompt, Rollout, TeacherScores


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteOptions:
    """``min_length``: tokens that a server must read at least, else it is refused.

    ``canary_interval``: requests to a server between two looks at a fixed text; 0: only new
    connections are looked at.
    """

    top_k: int
    tolerance: float
    min_length: int = 0
    canary_interval: int = 0


class RemoteTeacher:
    """Waits for its servers and tests them when it is made.

    ``missing`` counts response positions without a score by reason, ``events`` failed requests.

    Raises:
        TeacherError: a server that cannot be this teacher, in one line with the remedy.
    """

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
        self._k = min(options.top_k, tokenizer.vocabulary.size)
        self._canary = Canary.of(
            name,
            tokenizer,
            k=self._k,
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
        self._fingerprint = fingerprint(first.model, self._canary, self._reference)
        limits = [e.max_length for e in replicas.endpoints if e.max_length is not None]
        self._max_length = min(limits, default=None)

    @property
    def events(self) -> Counter[str]:
        return self._replicas.events

    async def _start(self) -> Admitted:
        found: list[Admitted] = []
        for endpoint in self._replicas.endpoints:
            try:
                await endpoint.start()
                found.append(await self_test(endpoint, self._canary, self._identity))
            except ServerError as error:
                raise TeacherError(f"teachers.{self.name}: {error}") from error
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
        inputs = [teacher_input(r, self.tokenizer, student=self._student) for r in rollouts]
        asked = [i for i, x in enumerate(inputs) if len(x.token_ids) and self._sent(x) is not None]
        said: list[Entries | str] = ["context"] * len(inputs)
        prompts = [self._sent(inputs[i]) for i in asked]
        found = self._replicas.score([p for p in prompts if p is not None], self._k)
        for i, entries in zip(asked, found, strict=True):
            said[i] = entries
        return [self._scores(x, entries) for x, entries in zip(inputs, said, strict=True)]

    def _sent(self, x: TeacherInput) -> np.ndarray | None:
        """[P + T'] as much as the server reads; None: not one token of the response."""
        ids = np.concatenate([x.prompt_ids, x.token_ids]).astype(np.int64)[: self._max_length]
        return ids if len(x.prompt_ids) and len(ids) > len(x.prompt_ids) else None

    def _scores(self, x: TeacherInput, said: Entries | str) -> TeacherScores:
        total = len(x.token_ids)
        if isinstance(said, str):
            parts = [nothing(total, self._k, said)]
        else:
            ids = self._sent(x)
            assert ids is not None
            admitted = admit(
                said,
                ids=ids,
                num_prompt=len(x.prompt_ids),
                k=self._k,
                vocab_size=self.tokenizer.vocabulary.size,
            )
            beyond = total - len(admitted.valid)
            parts = [admitted, nothing(beyond, self._k, "context")]
        for part in parts:
            self.missing.update(part.missing)
        return TeacherScores(
            teacher=self.name,
            model_fingerprint=self._fingerprint,
            token_ids=x.token_ids,
            byte_ends=x.byte_ends,
            logprobs=np.concatenate([part.logprobs for part in parts]),
            topk_ids=np.concatenate([part.topk_ids for part in parts]),
            topk_logprobs=np.concatenate([part.topk_logprobs for part in parts]),
            log_tail=np.concatenate([part.log_tail for part in parts]),
            lse=None,
            valid=np.concatenate([part.valid for part in parts]),
        )

    def drain(self) -> dict[str, dict[str, int]]:
        """`missing` and `events` since the last call."""
        found = {"missing": dict(self.missing), "requests": dict(self.events)}
        self.missing.clear()
        self.events.clear()
        return found

    def accuracy(self, prompts: Sequence[Prompt], *, max_new_tokens: int) -> float | None:
        """Not measured: the servers are asked for scores only."""
        return None

    def close(self) -> None:
        """Closes the connections; the servers stay."""
        self._replicas.close()


def names_of(tokenizer: ChatTokenizer) -> dict[str, int]:
    """String -> id for servers that speak in strings."""
    names = token_names(tokenizer.vocabulary.token_bytes)
    # the end of the turn has no bytes; some servers leave it out, others write its name
    names[""] = names[tokenizer.eos_text] = tokenizer.eos_id
    return names
