"""Sampling from a small model on the CPU, and judging what came out."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import cast

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from mopd.demo.tasks import Task

MAX_NEW_TOKENS = 20


@dataclass(frozen=True, kw_only=True)
class Example:
    """A task in one tokenizer. ``answer_ids`` ends with the end-of-turn token."""

    task: Task
    prompt_ids: list[int]
    answer_ids: list[int]


def end_of_turn(tokenizer: PreTrainedTokenizerFast) -> int:
    """The id that ends a response."""
    eos_id = tokenizer.eos_token_id
    assert isinstance(eos_id, int)
    return eos_id


def encode_tasks(tokenizer: PreTrainedTokenizerFast, *, tasks: list[Task]) -> list[Example]:
    """Prompt through the chat template; the answer as a segment of its own."""
    examples = []
    for task in tasks:
        prompt_ids = tokenizer.apply_chat_template(
            task.messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        answer_ids = tokenizer.encode(task.answer, add_special_tokens=False)
        examples.append(
            Example(
                task=task,
                prompt_ids=cast(list[int], prompt_ids),
                answer_ids=[*answer_ids, end_of_turn(tokenizer)],
            )
        )
    return examples


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    *,
    prompts: list[list[int]],
    eos_id: int,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """Responses up to and including ``eos_id``; greedy without a generator, else at T = 1.

    Prompts of equal length go together, so that no row is ever padded.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        groups[len(prompt)].append(index)
    responses: list[list[int]] = [[] for _ in prompts]
    for _, indices in sorted(groups.items()):
        batch = torch.tensor([prompts[index] for index in indices])
        rows = _generate(model, batch=batch, eos_id=eos_id, generator=generator)
        for index, row in zip(indices, rows, strict=True):
            responses[index] = row[: row.index(eos_id) + 1] if eos_id in row else row
    return responses


def _generate(
    model: PreTrainedModel,
    *,
    batch: torch.Tensor,
    eos_id: int,
    generator: torch.Generator | None,
) -> list[list[int]]:
    cache = DynamicCache(config=model.config)
    done = torch.zeros(len(batch), dtype=torch.bool)
    columns = []
    for _ in range(MAX_NEW_TOKENS):
        output = model(input_ids=batch, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = output.logits[:, -1]
        if generator is None:
            tokens = logits.argmax(-1)
        else:
            tokens = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        columns.append(tokens)
        done |= tokens == eos_id
        if bool(done.all()):
            break
        batch = tokens[:, None]
    return torch.stack(columns, dim=1).tolist()


@dataclass(frozen=True, kw_only=True)
class Score:
    """Shares over one domain's examples. Canonical: the ids are the encoding of their own text."""

    accuracy: float
    canonical: float


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, examples: list[Example]
) -> dict[str, Score]:
    """Greedy decoding; right means the exact text and an end-of-turn token."""
    eos_id = end_of_turn(tokenizer)
    model.eval()
    prompts = [example.prompt_ids for example in examples]
    right, canonical = defaultdict(list), defaultdict(list)
    for example, ids in zip(examples, generate(model, prompts=prompts, eos_id=eos_id), strict=True):
        ended = ids[-1] == eos_id
        text_ids = ids[:-1] if ended else ids
        text = tokenizer.decode(text_ids, skip_special_tokens=False)
        domain = example.task.domain
        right[domain].append(ended and text == example.task.answer)
        canonical[domain].append(tokenizer.encode(text, add_special_tokens=False) == text_ids)
    return {
        domain: Score(
            accuracy=round(sum(right[domain]) / len(right[domain]), 4),
            canonical=round(sum(canonical[domain]) / len(canonical[domain]), 4),
        )
        for domain in sorted(right)
    }
