"""The scoring endpoint's engine without vLLM: a transformers model in this process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from mopd.serving.completions import CompletionRequest
from mopd.serving.generation import decode, sampling_stream
from mopd.serving.hf_turns import TurnTakingModel
from mopd.serving.lease import DeviceLease
from mopd.serving.models import model_fingerprint
from mopd.serving.rows import BLOCK_ELEMENTS, rows_of_logits
from mopd.serving.scoring import ScoredSequence, ScoreLimits, ScoreRequest, join_rows
from mopd.serving.wire import RawRows


class TransformersScorer:
    """Scores one request at a time, in batches of at most ``BLOCK_ELEMENTS`` logits.

    Args:
        lease: of a device that others use as well; the weights are there while this one scores.
    """

    def __init__(
        self, model_dir: Path, *, device: torch.device, lease: DeviceLease | None = None
    ) -> None:
        self._taking_turns = TurnTakingModel(model_dir, device=device, lease=lease)
        self._model = self._taking_turns.model
        self._device = device
        self._lock = threading.Lock()
        config = self._model.config
        self.fingerprint = model_fingerprint(model_dir)
        self.limits = ScoreLimits(
            vocab_size=config.vocab_size, max_length=config.max_position_embeddings
        )

    def score(self, request: ScoreRequest) -> RawRows:
        """The rows of all sequences, in order.

        Raises:
            LeaseTimeout: the device did not come free in time.
        """
        longest = max(len(sequence.ids) for sequence in request.sequences)
        batch = max(1, BLOCK_ELEMENTS // (longest * self.limits.vocab_size))
        with self._taking_turns.turn(), self._lock:
            parts = [
                self._score_batch(request.sequences[begin : begin + batch], request)
                for begin in range(0, len(request.sequences), batch)
            ]
        return join_rows(parts)

    def write(self, request: CompletionRequest, *, gone: Callable[[], bool]) -> list[np.ndarray]:
        """Per prompt the ids of an answer, with the one that ended it.

        Raises:
            AbandonedError: ``gone`` was true, which is asked before every token.
            LeaseTimeout: the device did not come free in time.
        """
        streams = [
            sampling_stream(f"{request.seed}|{i}", request.max_tokens)
            for i in range(len(request.prompts))
        ]
        with self._taking_turns.turn(), self._lock:
            tokens, _ = decode(
                self._model,
                request.prompts,
                ends=request.stop_ids,
                vocab_size=self.limits.vocab_size,
                max_new_tokens=request.max_tokens,
                temperature=request.temperature or 1.0,
                streams=streams if request.temperature else None,
                is_abandoned=gone,
            )
        return [_ended(row, request.stop_ids) for row in tokens]

    def close(self) -> None:
        """Lets go of a shared device."""
        self._taking_turns.close()

    @torch.no_grad()
    def _score_batch(self, sequences: tuple[ScoredSequence, ...], request: ScoreRequest) -> RawRows:
        longest = max(len(sequence.ids) for sequence in sequences)
        ids = np.zeros((len(sequences), longest), dtype=np.int64)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence.ids)] = sequence.ids
        # right padding behind a causal mask needs no attention mask
        logits = self._model(input_ids=torch.as_tensor(ids, device=self._device)).logits
        counts = [len(sequence.ids) - sequence.start for sequence in sequences]
        sample = np.repeat(np.arange(len(sequences)), counts)
        positions = [np.arange(sequence.start, len(sequence.ids)) for sequence in sequences]
        position = np.concatenate(positions)
        rows = logits[torch.as_tensor(sample), torch.as_tensor(position - 1)]
        return rows_of_logits(
            rows[:, : request.vocab_size],
            torch.as_tensor(ids[sample, position], device=self._device),
            top_k=request.top_k,
            temperature=request.temperature,
        )


def _ended(ids: np.ndarray, ends: tuple[int, ...]) -> np.ndarray:
    found = np.flatnonzero(np.isin(ids, ends))
    return ids[: found[0] + 1] if len(found) else ids
