"""Versions of a small student, and what a plain forward pass says of them. Needs no HTTP client."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mopd.serving.models import load_causal_lm
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Prompt


def prompts_of(*contents: str) -> list[Prompt]:
    """One prompt for each text."""
    return [
        Prompt(id=str(n), messages=({"role": "user", "content": content},), domain="d")
        for n, content in enumerate(contents)
    ]


class PlainModel:
    """A transformers model; ``weights(n)`` are its stored ones with noise of seed n."""

    def __init__(self, model_dir: Path) -> None:
        self.model_dir = model_dir
        self.tokenizer = ChatTokenizer.load(model_dir)
        self._model = load_causal_lm(model_dir, device=torch.device("cpu"))
        self._stored = {n: p.detach().clone() for n, p in self._model.named_parameters()}

    def weights(self, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {
            name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in self._stored.items()
        }

    @torch.no_grad()
    def scores(
        self, weights: dict[str, Tensor], ids: Sequence[int], *, temperature: float = 1.0
    ) -> np.ndarray:
        """[L - 1]: of the tokens of ``ids`` but the first."""
        for name, parameter in self._model.named_parameters():
            parameter.copy_(weights[name])
        logits = self._model(input_ids=torch.as_tensor([list(ids)])).logits[0, :-1]
        scores = torch.log_softmax(logits[:, : self.tokenizer.vocabulary.size] / temperature, -1)
        return scores.gather(1, torch.as_tensor(ids[1:])[:, None].long())[:, 0].numpy()
