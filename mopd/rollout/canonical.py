"""A model that gives every token which leaves the canonical segmentation probability 0."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mopd.tokens.canonical import CanonicalNext


class CanonicalModel:
    """For one call of `mopd.serving.generation.decode`: the restricted policy of one batch.

    Log-probabilities that are taken from its logits are those of the restricted policy, whose
    tokens add up to 1 again.
    """

    def __init__(self, model: Any, following: CanonicalNext) -> None:
        self._model = model
        self._following = following
        self._written: list[list[int]] | None = None
        self.config = model.config

    def parameters(self) -> Iterator[Tensor]:
        return self._model.parameters()

    def __call__(self, *, input_ids: Tensor, **arguments: Any) -> Any:
        if self._written is None:  # the prompts
            self._written = [[] for _ in range(len(input_ids))]
        else:
            for row, (token,) in zip(self._written, input_ids.tolist(), strict=True):
                row.append(token)
        output = self._model(input_ids=input_ids, **arguments)
        logits = output.logits
        for number, ids in enumerate(self._written):
            mask = torch.as_tensor(self._following.allowed(ids), device=logits.device)
            logits[number, -1, : len(mask)].masked_fill_(~mask, float("-inf"))
        return output
