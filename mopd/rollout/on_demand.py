"""A sampler that exists only during evaluations: for runs whose answers come with the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from torch import Tensor

from mopd.errors import SamplerError
from mopd.rollout.base import Sampler
from mopd.types import Prompt, Rollout


class OnDemandSampler:
    """`load_weights` makes the sampler, `release` frees it; in between it answers.

    Args:
        make: gives a fresh sampler.
    """

    def __init__(self, make: Callable[[], Sampler]) -> None:
        self._make = make
        self._live: Sampler | None = None

    @property
    def version(self) -> int:
        return -1 if self._live is None else self._live.version

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        if self._live is None:
            self._live = self._make()
        self._live.load_weights(weights, version=version)

    def generate(self, prompts: Sequence[Prompt], *, step: int, version: int) -> list[Rollout]:
        """Nothing is sampled for training.

        Raises:
            SamplerError: always.
        """
        raise SamplerError("rollout.backend.type=dataset samples nothing; set another type")

    def answer(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """Greedy answers.

        Raises:
            SamplerError: no weights were loaded since the last `release`.
        """
        if self._live is None:
            raise SamplerError("an evaluation asked for answers before it had weights")
        return self._live.answer(prompts)

    def probe(self, ids: np.ndarray) -> np.ndarray | None:
        return None if self._live is None else self._live.probe(ids)

    def release(self) -> None:
        """Frees the model; safe to call twice."""
        if self._live is not None:
            self._live.close()
            self._live = None

    def close(self) -> None:
        self.release()
