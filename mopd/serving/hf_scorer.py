"""The scoring endpoint's engine without vLLM: a transformers model in this process."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import torch

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
