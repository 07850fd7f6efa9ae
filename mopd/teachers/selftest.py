"""Is a server the teacher that the recipe means? Asked at the start and on reconnecting."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mopd.errors import TeacherError
from mopd.serving.endpoint import Endpoint
from mopd.serving.http import RefusedError
from mopd.teachers.admission import Admitted, admit
from mopd.teachers.identity import USER, Identity
from mopd.tokens.chat import ChatTokenizer

MESSAGES = (USER,)
SPREAD = 24  # ids over the whole vocabulary behind the template


@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """Fixed prompts that any model of this vocabulary can score, and what is asked of them.

    Args:
        prompts: three; the first holds the highest id of the vocabulary.
        min_length: tokens of a prompt that the recipe needs at least.
    """

    name: str
    prompts: tuple[np.ndarray, ...]
    k: int
    vocab_size: int
    tolerance: float
    min_length: int

    @classmethod
    def of(
        cls, name: str, tokenizer: ChatTokenizer, *, k: int, tolerance: float, min_length: int
    ) -> Canary:
        size = tokenizer.vocabulary.size
        spread = np.linspace(size - 1, 0, SPREAD).astype(np.int64)
        chat = tokenizer.prompt_ids(MESSAGES).astype(np.int64)
        return cls(
            name=name,
            prompts=(
                np.concatenate([chat, spread]),
                np.concatenate([spread[::-2], chat]),
                np.concatenate([chat, chat[::-1]]),
            ),
            k=k,
            vocab_size=size,
            tolerance=tolerance,
            min_length=max(min_length, len(chat) * 2 + SPREAD),
        )

    def read(self, endpoint: Endpoint, entries: Sequence, which: Sequence[int]) -> list[Admitted]:
        """Raises TeacherError where the contract does not hold on this text."""
        found: list[Admitted] = []
        for one, index in zip(entries, which, strict=True):
            admitted = admit(
                one,
                ids=self.prompts[index],
                num_prompt=1,
                k=self.k,
                vocab_size=self.vocab_size,
            )
            vague = admitted.missing["ambiguous"] > len(admitted.valid) // 2
            if set(admitted.missing) - {"ambiguous"} or vague:
                raise self.error(endpoint, _explain(admitted, self))
            found.append(admitted)
        return found

    def error(self, endpoint: Endpoint, text: str) -> TeacherError:
        return TeacherError(f"teachers.{self.name}: {endpoint.url} {text}")


def _explain(admitted: Admitted, canary: Canary) -> str:
    counts = ", ".join(f"{reason} {count}" for reason, count in sorted(admitted.missing.items()))
    if set(admitted.missing) == {"ambiguous"}:
        return (
            f"names tokens by strings that several tokens share ({counts} of "
            f"{len(admitted.valid)} positions); use backend.type=vllm, or a server that sends ids"
        )
    if "vocabulary" in admitted.missing:
        return (
            f"lists token ids beyond the {canary.vocab_size} of the tokenizer; name the tokenizer "
            f"of its model: teachers.{canary.name}.tokenizer"
        )
    if {"mass", "positive"} & set(admitted.missing):
        return (
            f"sends numbers that are no log-probabilities ({counts}); start it with "
            "--logprobs-mode raw_logprobs"
        )
    return f"breaks the contract of scores on a fixed text ({counts}); check backend.type"


def difference(one: Admitted, two: Admitted) -> float:
    """The largest difference of the actual tokens' log-probabilities; inf: nothing to compare."""
    both = one.valid & two.valid
    return float(np.abs(one.logprobs - two.logprobs)[both].max()) if both.any() else np.inf


async def self_test(endpoint: Endpoint, canary: Canary, identity: Identity) -> Admitted:
    """Scores of the first prompt.

    Raises:
        TeacherError: one line: what is wrong with the server, and the remedy.
    """
    check_context(endpoint, canary)
    await identity.check(endpoint, whole=True)
    first = await check_order(endpoint, canary)
    await check_temperature(endpoint, canary, first)
    return first


def check_context(endpoint: Endpoint, canary: Canary) -> None:
    """Whether the server reads what the recipe may send."""
    limit = endpoint.max_length
    if limit is not None and limit < canary.min_length:
        raise canary.error(
            endpoint,
            f"reads {limit} tokens and this recipe needs {canary.min_length}; start it with "
            f"--max-model-len {canary.min_length + 1} or more",
        )


async def check_order(endpoint: Endpoint, canary: Canary) -> Admitted:
    """Scores of the first prompt, which do not depend on what stands beside it."""
    first = await _score(endpoint, canary, (0, 1, 2))
    again = await _score(endpoint, canary, (2, 0, 1))
    worst = max(difference(first[i], again[j]) for i, j in enumerate((1, 2, 0)))
    if worst > canary.tolerance:
        raise canary.error(
            endpoint,
            f"scores the same text {worst:.2g} apart in another order (backend.tolerance "
            f"{canary.tolerance:g}); switch off what mixes requests, or raise backend.tolerance",
        )
    return first[0]


async def check_temperature(endpoint: Endpoint, canary: Canary, first: Admitted) -> None:
    """Whether scores are those of temperature 1, whatever the server samples at."""
    cooler = await _score(endpoint, canary, (0,), temperature=0.5)
    if (shift := difference(first, cooler[0])) > canary.tolerance:
        raise canary.error(
            endpoint,
            f"applies the sampling temperature to prompt log-probabilities (off by {shift:.2g}); "
            "start it with --logprobs-mode raw_logprobs",
        )


async def _score(
    endpoint: Endpoint, canary: Canary, which: Sequence[int], *, temperature: float = 1.0
) -> list[Admitted]:
    prompts = [canary.prompts[i] for i in which]
    try:
        entries = await endpoint.probe_score(prompts, canary.k, temperature=temperature)
    except RefusedError as error:
        raise canary.error(endpoint, await _cause(endpoint, canary, prompts, error)) from error
    return canary.read(endpoint, entries, which)


async def _cause(
    endpoint: Endpoint, canary: Canary, prompts: Sequence[np.ndarray], error: RefusedError
) -> str:
    """Which part of a refused request the server minds."""
    if error.reason != "status_4xx":
        return str(error.args[2])
    low = [np.minimum(prompt, 9) for prompt in prompts]
    for probes, k, text in (
        (
            prompts,
            1,
            f"refuses {canary.k} log-probabilities a token; start it with --max-logprobs "
            f"{canary.k}, or lower distillation.top_k",
        ),
        (
            low,
            canary.k,
            f"refuses ids below the {canary.vocab_size} of the tokenizer; name the tokenizer of "
            f"its model: teachers.{canary.name}.tokenizer",
        ),
    ):
        try:
            await endpoint.probe_score(probes, k)
        except RefusedError:
            continue
        return text
    return str(error.args[2])


async def recheck(
    endpoint: Endpoint, canary: Canary, identity: Identity, reference: Admitted
) -> None:
    """Raises TeacherError when the server scores, or reads, otherwise than it did."""
    await identity.check(endpoint, whole=False)
    entries = await endpoint.probe_score([canary.prompts[0]], canary.k)
    (found,) = canary.read(endpoint, entries, (0,))
    if (worst := difference(reference, found)) > canary.tolerance:
        raise canary.error(
            endpoint,
            f"scores a fixed text {worst:.2g} away from before (backend.tolerance "
            f"{canary.tolerance:g}): other weights; start all replicas from the same model",
        )


def fingerprint(model: str, canary: Canary, scores: Admitted) -> str:
    """Of the served name and of the scores of the fixed text to one decimal."""
    digest = hashlib.sha256(np.round(scores.logprobs.astype(np.float64), 1).tobytes())
    digest.update(b"".join(prompt.tobytes() for prompt in canary.prompts))
    return f"{model}@{digest.hexdigest()[:16]}"
