"""A sampler inside the lead rank: a full transformers copy of the student."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mopd.errors import StaleWeightsError
from mopd.rollout.base import make_rollout
from mopd.rollout.canonical import CanonicalModel
from mopd.rollout.tasks import SamplingOptions
from mopd.serving.generation import generate, sampling_stream
from mopd.serving.hf_experts import one_by_one
from mopd.serving.models import load_causal_lm
from mopd.tokens.canonical import CanonicalNext
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Prompt, Rollout


class HfSampler:
    """Keyed sampling: the same answer to (step, prompt, sample) of a version in every layout.

    Args:
        model_dir: architecture and, until the first `load_weights`, weights (version -1).
        options: as in the recipe.
    """

    def __init__(
        self,
        model_dir: Path,
        *,
        tokenizer: ChatTokenizer,
        device: torch.device,
        options: SamplingOptions,
        batch_size: int,
    ) -> None:
        self._model = load_causal_lm(model_dir, device=device)
        self._tokenizer = tokenizer
        self._options = options
        self._batch_size = batch_size
        self._canonical = None
        if options.canonical:
            self._canonical = CanonicalNext(tokenizer.vocabulary, stop_ids=options.stop_token_ids)
        self.version = -1

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Takes every parameter of the student under its Hugging Face name."""
        if version <= self.version:
            raise StaleWeightsError(f"version {version} is not newer than {self.version}")
        parameters = dict(one_by_one(self._model.named_parameters(remove_duplicate=False)))
        missing = set(parameters)
        self.version = -1  # half-loaded weights are no version
        for name, tensor in weights:
            if name in parameters:
                if tensor.shape != parameters[name].shape:
                    raise StaleWeightsError(f"{name}: shape {tuple(tensor.shape)} does not fit")
                parameters[name].copy_(tensor)
                missing.discard(name)
        tied = {"lm_head.weight"} if self._model.config.tie_word_embeddings else set()
        if missing - tied:
            raise StaleWeightsError(
                f"weights of version {version} lack {sorted(missing - tied)[:3]}"
            )
        self.version = version

    def generate(self, prompts: Sequence[Prompt], *, step: int, version: int) -> list[Rollout]:
        """Sampled answers under ``version``, which must be the one that was loaded."""
        if version != self.version:
            raise StaleWeightsError(f"asked for version {version}, have {self.version}")
        tasks = [(prompt, n) for prompt in prompts for n in range(self._options.num_generations)]
        keys = [f"{self._options.seed}|{prompt.id}|{n}|{step}" for prompt, n in tasks]
        streams = [sampling_stream(key, self._options.max_new_tokens) for key in keys]
        return self._decode(tasks, streams)

    def answer(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """Greedy answers, for evaluation."""
        return self._decode([(prompt, 0) for prompt in prompts], None)

    @torch.no_grad()
    def probe(self, ids: np.ndarray) -> np.ndarray:
        """[1, L - 1], of the copy."""
        device = next(self._model.parameters()).device
        tokens = torch.as_tensor(ids, dtype=torch.int64, device=device)
        logits = self._model(input_ids=tokens[None]).logits[0, :-1]
        scores = torch.log_softmax(logits[:, : self._tokenizer.vocabulary.size].float(), dim=-1)
        return scores.gather(1, tokens[1:, None]).T.cpu().numpy()

    def _decode(self, tasks: Sequence[tuple[Prompt, int]], streams: list | None) -> list[Rollout]:
        rollouts: list[Rollout] = []
        greedy = streams is None
        for begin in range(0, len(tasks), self._batch_size):
            part = tasks[begin : begin + self._batch_size]
            prompt_ids = [self._tokenizer.prompt_ids(prompt.messages) for prompt, _ in part]
            answers = generate(
                self._model if greedy else self._policy(),
                prompt_ids,
                eos_id=self._tokenizer.eos_id,
                vocab_size=self._tokenizer.vocabulary.size,
                max_new_tokens=self._options.max_new_tokens,
                temperature=1.0 if greedy else self._options.temperature,
                streams=None if streams is None else streams[begin : begin + len(part)],
                stop_ids=self._options.stop_token_ids,
            )
            rollouts += [
                make_rollout(
                    prompt,
                    answer,
                    tokenizer=self._tokenizer,
                    prompt_ids=ids,
                    sample_index=n,
                    version=self.version,
                )
                for (prompt, n), ids, answer in zip(part, prompt_ids, answers, strict=True)
            ]
        return rollouts

    def _policy(self) -> Any:
        """What a batch is sampled from; evaluations always ask the student as it is."""
        return (
            self._model if self._canonical is None else CanonicalModel(self._model, self._canonical)
        )

    def close(self) -> None:
        """Frees the copy of the model."""
        del self._model
