"""Decoding with a transformers causal LM in this process: keyed sampling and greedy answers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """One answer. ``token_ids`` include the end-of-turn token when ``stopped``.

    When ``cut``, another stop token ended it, which is left out.
    """

    token_ids: np.ndarray  # [S] int32
    logprobs: np.ndarray  # [S] float32, at the sampling temperature
    stopped: bool
    cut: bool = False


def sampling_stream(key: str, length: int) -> np.ndarray:
    """[length] uniform numbers that depend on ``key`` alone, not on rank, batch or arrival."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(seed)).random(length)


class AbandonedError(Exception):
    """Whoever asked does not want the answers any more."""


def generate(
    model: Any,
    prompts: Sequence[np.ndarray],
    *,
    eos_id: int,
    vocab_size: int,
    max_new_tokens: int,
    temperature: float,
    streams: Sequence[np.ndarray] | None,
    stop_ids: Sequence[int] = (),
) -> list[Generated]:
    """Answers to ``prompts`` (each [P] ids), sampled by inverse transform, or greedy.

    Args:
        vocab_size: true size; padded output columns are never sampled.
        streams: [max_new_tokens] uniforms per prompt, one per position; None decodes greedily.
        stop_ids: other tokens that end an answer; they are left out of it.
    """
    ends = (eos_id, *stop_ids)
    tokens, logprobs = decode(
        model,
        prompts,
        ends=ends,
        vocab_size=vocab_size,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        streams=streams,
    )
    return _cut(tokens, logprobs, ends)


@torch.no_grad()
def decode(
    model: Any,
    prompts: Sequence[np.ndarray],
    *,
    ends: Sequence[int],
    vocab_size: int,
    max_new_tokens: int,
    temperature: float,
    streams: Sequence[np.ndarray] | None,
    is_abandoned: Callable[[], bool] = lambda: False,
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, S] and their log-probabilities [B, S] float32, S <= ``max_new_tokens``.

    What is behind the first of ``ends`` in a row is no part of its answer. The other arguments are
    those of `generate`.

    Raises:
        AbandonedError: ``is_abandoned``, which is asked before every token, was true.
    """
    from transformers import DynamicCache

    device = next(model.parameters()).device
    ids, mask, positions = _left_padded(prompts, ends[0], device)
    cache = DynamicCache(config=model.config)
    uniforms = None if streams is None else torch.as_tensor(np.stack(streams), device=device)
    alive = torch.ones(len(prompts), dtype=torch.bool, device=device)
    last = torch.tensor(ends, device=device)
    tokens: list[Tensor] = []
    logprobs: list[Tensor] = []
    for step in range(max_new_tokens):
        if is_abandoned():
            raise AbandonedError
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        scores = torch.log_softmax(output.logits[:, -1, :vocab_size].float() / temperature, dim=-1)
        column = None if uniforms is None else uniforms[:, step]
        token = _choose(scores, column)
        tokens.append(torch.where(alive, token, ends[0]))
        logprobs.append(scores.gather(1, token[:, None])[:, 0])
        alive &= ~torch.isin(token, last)
        if not bool(alive.any()):
            break
        ids = tokens[-1][:, None]
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return torch.stack(tokens, 1).cpu().numpy(), torch.stack(logprobs, 1).float().cpu().numpy()


def _left_padded(
    prompts: Sequence[np.ndarray], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    longest = max(len(prompt) for prompt in prompts)
    ids = np.full((len(prompts), longest), pad_id, dtype=np.int64)
    mask = np.zeros((len(prompts), longest), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    positions = np.clip(np.cumsum(mask, axis=1) - 1, 0, None)
    return tuple(torch.as_tensor(array, device=device) for array in (ids, mask, positions))  # type: ignore[return-value]


def _choose(scores: Tensor, uniform: Tensor | None) -> Tensor:
    """Greedy, or the first token whose cumulative probability exceeds the uniform number."""
    if uniform is None:
        return scores.argmax(dim=-1)
    cumulative = torch.cumsum(torch.exp(scores.double()), dim=-1)
    threshold = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp_max(
        scores.shape[1] - 1
    )


def _cut(tokens: np.ndarray, logprobs: np.ndarray, ends: Sequence[int]) -> list[Generated]:
    """``ends``: the end of the turn, which is kept, and stop tokens, which are not."""
    eos_id, *_ = ends
    answers = []
    for ids, lps in zip(tokens, logprobs, strict=True):
        found = np.flatnonzero(np.isin(ids, ends))
        last = int(ids[found[0]]) if len(found) else None
        size = int(found[0]) + (last == eos_id) if len(found) else len(ids)
        answers.append(
            Generated(
                token_ids=ids[:size].astype(np.int32),
                logprobs=lps[:size].astype(np.float32),
                stopped=last == eos_id,
                cut=last not in (None, eos_id),
            )
        )
    return answers
