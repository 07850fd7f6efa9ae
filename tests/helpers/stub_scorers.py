"""What stands in for a teacher's model behind `StubServer`."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

Scorer = Callable[[Sequence[int]], np.ndarray]  # ids [T] -> [T - 1, V] log-probabilities


class PrefixScorer:
    """Log-probabilities drawn from a hash of the prefix: no model, the same in every process."""

    def __init__(self, vocab_size: int, *, seed: int = 0) -> None:
        self._size, self._seed = vocab_size, seed

    def __call__(self, ids: Sequence[int]) -> np.ndarray:
        digest = 0
        rows = []
        for index in ids[:-1]:
            digest = zlib.crc32(index.to_bytes(4, "little"), digest)
            logits = np.random.default_rng([self._seed, digest]).normal(size=self._size) * 3.0
            top = logits.max()
            rows.append(logits - top - np.log(np.exp(logits - top).sum()))
        return np.array(rows).reshape(len(rows), self._size)


class ModelScorer:
    """A transformers model, one sequence at a time."""

    def __init__(self, model_dir: Path, *, vocab_size: int) -> None:
        import torch

        from mopd.serving.models import load_causal_lm

        self._model = load_causal_lm(model_dir, device=torch.device("cpu"))
        self._size = vocab_size

    def __call__(self, ids: Sequence[int]) -> np.ndarray:
        import torch

        with torch.no_grad():
            logits = self._model(input_ids=torch.as_tensor([list(ids)])).logits[0, :-1]
        return torch.log_softmax(logits[:, : self._size].float(), dim=-1).numpy()
