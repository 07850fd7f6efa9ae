"""Answers that the student did not sample: from the data, or written by a teacher."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from mopd.rollout.base import make_rollout
from mopd.serving.generation import Generated
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Prompt, Rollout, Source


def is_on_policy(prompt: Prompt, *, step: int, seed: int, lmbda: float) -> bool:
    """Whether the student answers ``prompt`` itself at ``step``: true for the share ``lmbda``.

    The same in every layout and after every restart (`lmbda` of GKD, 2306.13649, drawn per prompt).
    """
    if lmbda >= 1.0:
        return True
    key = hashlib.sha256(f"{seed}|lmbda|{prompt.id}|{step}".encode()).digest()
    return int.from_bytes(key[:8], "little") / 2.0**64 < lmbda


def written_rollout(
    prompt: Prompt,
    text: bytes,
    *,
    stopped: bool,
    source: Source,
    tokenizer: ChatTokenizer,
    sample_index: int,
    max_new_tokens: int,
    version: int,
) -> Rollout:
    """``text`` in the student's own tokens, cut at ``max_new_tokens``; it has no sampling logprobs.

    Args:
        stopped: whether the turn ends behind the text.
    """
    ids: Sequence[int] = tokenizer.vocabulary.encode(text)
    ids = [*ids, tokenizer.eos_id] if stopped else ids
    token_ids = np.asarray(ids[:max_new_tokens], dtype=np.int32)
    generated = Generated(
        token_ids=token_ids,
        logprobs=np.full(len(token_ids), np.nan, dtype=np.float32),
        stopped=stopped and len(ids) <= max_new_tokens,
    )
    return make_rollout(
        prompt,
        generated,
        tokenizer=tokenizer,
        prompt_ids=tokenizer.prompt_ids(prompt.messages),
        sample_index=sample_index,
        version=version,
        source=source,
    )
