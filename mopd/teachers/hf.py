"""A transformers teacher inside the lead rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mopd.config.schema import PrivilegedSection
from mopd.errors import ConfigError
from mopd.serving.generation import Generated, generate, sampling_stream
from mopd.serving.models import load_causal_lm, model_fingerprint, model_limits
from mopd.teachers import context
from mopd.teachers.base import TeacherInput, share_right, teacher_input, teacher_messages
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Prompt, Rollout, TeacherScores

NO_ANSWER = Generated(
    token_ids=np.zeros(0, dtype=np.int32), logprobs=np.zeros(0, dtype=np.float32), stopped=False
)


def check_model(name: str, model_dir: Path, *, tokenizer: ChatTokenizer, min_length: int) -> None:
    """Whether a model can be this teacher, from its config.json alone.

    Raises:
        ConfigError: it has fewer tokens than the tokenizer, or a context below ``min_length``.
    """
    width, context = model_limits(model_dir)
    size = tokenizer.vocabulary.size
    if width is not None and width < size:
        raise ConfigError(
            f"teachers.{name}.model: {model_dir} has logits for {width} tokens and its tokenizer "
            f"has {size}; name the tokenizer of this model: teachers.{name}.tokenizer"
        )
    if context is not None and context < min_length:
        raise ConfigError(
            f"teachers.{name}.model: {model_dir} reads {context} tokens, and an answer may have "
            f"{min_length}; lower rollout.max_new_tokens to less than {context}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HfOptions:
    """What is asked of the model.

    Args:
        top_k: entries per position, the rest is one tail; None sends the whole vocabulary.
        temperature: the loss's, for the second log-sum-exp.
        privileged: what the teacher reads and the student does not.
    """

    top_k: int | None
    temperature: float
    batch_size: int
    privileged: PrivilegedSection | None = None


class HfTeacher:
    """Scores with one forward pass per batch; padded output columns never count.

    Tokens beyond the model's context (``max_length``, prompt included) have no valid row and are
    counted in ``missing``.
    """

    def __init__(
        self,
        name: str,
        model_dir: Path,
        *,
        tokenizer: ChatTokenizer,
        student: ChatTokenizer,
        device: torch.device,
        options: HfOptions,
    ) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.missing: Counter[str] = Counter()
        _, self.max_length = model_limits(model_dir)
        self._student = student
        self._model = load_causal_lm(model_dir, device=device)
        self._fingerprint = model_fingerprint(model_dir)
        self._device = device
        size = tokenizer.vocabulary.size
        self._top_k = None if options.top_k is None else min(options.top_k, size)
        self._temperature = options.temperature
        self._batch_size = options.batch_size
        self._privileged = options.privileged

    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        """One `TeacherScores` per rollout, in order."""
        scores: list[TeacherScores] = []
        for begin in range(0, len(rollouts), self._batch_size):
            part = [
                teacher_input(
                    rollout, self.tokenizer, student=self._student, privileged=self._privileged
                )
                for rollout in rollouts[begin : begin + self._batch_size]
            ]
            scores += self._score_batch(part)
        return scores

    def _score_batch(self, whole: Sequence[TeacherInput]) -> list[TeacherScores]:
        found: list[TeacherScores] = []
        read = self._read([context.cut(x, self.max_length) for x in whole])
        for x, arrays in zip(whole, read, strict=True):
            scores, missing = context.whole_scores(
                x,
                {"topk_ids": None, **arrays},
                valid=np.ones(len(arrays["logprobs"]), dtype=bool),
                who=(self.name, self._fingerprint),
                vocab_size=self.tokenizer.vocabulary.size,
            )
            self.missing.update(missing)
            found.append(scores)
        return found

    @torch.no_grad()
    def _read(self, inputs: Sequence[TeacherInput]) -> list[dict[str, np.ndarray]]:
        """Of each, the rows of its tokens by name; no ``topk_ids`` where rows are whole."""
        longest = max(len(x.prompt_ids) + len(x.token_ids) for x in inputs)
        ids = np.full((len(inputs), longest), self.tokenizer.pad_id, dtype=np.int64)
        for row, x in enumerate(inputs):
            ids[row, : len(x.prompt_ids)] = x.prompt_ids
            ids[row, len(x.prompt_ids) : len(x.prompt_ids) + len(x.token_ids)] = x.token_ids
        # right padding behind a causal mask needs no attention mask
        logits = self._model(input_ids=torch.as_tensor(ids, device=self._device)).logits
        sample = np.repeat(np.arange(len(inputs)), [len(x.token_ids) for x in inputs])
        row = np.concatenate(
            [len(x.prompt_ids) - 1 + np.arange(len(x.token_ids)) for x in inputs]
        ).astype(np.int64)
        actual = np.concatenate([x.token_ids for x in inputs]).astype(np.int64)
        arrays = self._rows(logits[torch.as_tensor(sample), torch.as_tensor(row)], actual)
        cuts = np.cumsum([len(x.token_ids) for x in inputs])[:-1]
        parts = {name: np.split(array, cuts) for name, array in arrays.items()}
        return [{name: part[i] for name, part in parts.items()} for i in range(len(inputs))]

    def _rows(self, logits: Tensor, actual: np.ndarray) -> dict[str, np.ndarray]:
        """Top-k, tail, actual token and log-sum-exps of rows [N, V]."""
        logits = logits[:, : self.tokenizer.vocabulary.size].float()
        lse = torch.logsumexp(logits, dim=-1)
        lse_tau = torch.logsumexp(logits / self._temperature, dim=-1)
        log_probs = logits - lse[:, None]
        index = torch.as_tensor(actual)[:, None].to(logits.device)
        arrays = {
            "logprobs": log_probs.gather(1, index)[:, 0],
            "lse": torch.stack([lse, lse_tau], dim=1),
        }
        if self._top_k is None:
            arrays |= {"topk_logprobs": log_probs, "log_tail": torch.full_like(lse, -torch.inf)}
        else:
            top = log_probs.topk(self._top_k, dim=-1)
            outside = log_probs.scatter(1, top.indices, -torch.inf)
            arrays |= {
                "topk_ids": top.indices.to(torch.int32),
                "topk_logprobs": top.values,
                "log_tail": torch.logsumexp(outside, dim=-1),
            }
        return {name: tensor.cpu().numpy() for name, tensor in arrays.items()}

    def accuracy(self, prompts: Sequence[Prompt], *, max_new_tokens: int) -> float | None:
        """Greedy exact match on prompts with a checkable answer; None where there are none."""
        checkable = [prompt for prompt in prompts if prompt.answer is not None]
        answers = self._answer(checkable, max_new_tokens=max_new_tokens, temperature=1.0)
        return share_right(checkable, self._texts(answers))

    def write(
        self,
        prompts: Sequence[Prompt],
        keys: Sequence[str],
        *,
        max_new_tokens: int,
        temperature: float,
    ) -> list[tuple[bytes, bool]]:
        """Sampled answers for off-policy training, drawn by ``keys``."""
        answers = self._answer(
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            streams=[sampling_stream(key, max_new_tokens) for key in keys],
        )
        return self._texts(answers)

    def _texts(self, answers: Sequence[Generated]) -> list[tuple[bytes, bool]]:
        decode = self.tokenizer.vocabulary.decode
        return [(decode(answer.token_ids), answer.stopped) for answer in answers]

    def _answer(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        temperature: float,
        streams: Sequence[np.ndarray] | None = None,
    ) -> list[Generated]:
        """Greedy without ``streams``; never more than the context holds, and nothing behind a
        prompt that fills it."""
        read = [
            self.tokenizer.prompt_ids(teacher_messages(prompt, self._privileged))
            for prompt in prompts
        ]
        rooms = [context.room(ids, max_new_tokens, self.max_length) for ids in read]
        answers = [NO_ANSWER] * len(prompts)
        for room in sorted(set(rooms) - {0}):
            alike = [i for i, own in enumerate(rooms) if own == room]
            for begin in range(0, len(alike), self._batch_size):
                part = alike[begin : begin + self._batch_size]
                found = generate(
                    self._model,
                    [read[i] for i in part],
                    eos_id=self.tokenizer.eos_id,
                    vocab_size=self.tokenizer.vocabulary.size,
                    max_new_tokens=room,
                    temperature=temperature,
                    streams=None if streams is None else [streams[i] for i in part],
                )
                for i, answer in zip(part, found, strict=True):
                    answers[i] = answer
        return answers

    def identity(self) -> dict[str, Any]:
        return {"model": self._fingerprint}

    def differs(self, before: Mapping[str, Any]) -> str | None:
        """The files of the model are compared."""
        return None if before.get("model") == self._fingerprint else "has other files"

    def drain(self) -> dict[str, dict[str, int]]:
        """`missing` since the last call."""
        found = {"missing": dict(self.missing)}
        self.missing.clear()
        return found

    def close(self) -> None:
        """Frees the model."""
        del self._model
