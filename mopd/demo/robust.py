"""Does a teacher follow an answer that is cut into pieces it would not choose itself?"""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mopd.demo.decode import Example, end_of_turn
from mopd.demo.noise import Segmenter


def fitting_ids(
    token_ids: list[int], *, table: list[bytes], by_bytes: dict[bytes, list[int]], end_id: int
) -> list[list[int]]:
    """For every position: the next ids whose bytes the rest starts with; at the end, its token."""
    rest = b"".join(table[token] for token in token_ids)
    found = []
    for token in token_ids:
        starts = [rest[:length] for length in range(1, len(rest) + 1)]
        found.append([index for start in starts for index in by_bytes.get(start, [])])
        rest = rest[len(table[token]) :]
    return [*found, [end_id]]


@torch.inference_mode()
def fitting_mass(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    examples: list[Example],
    table: list[bytes],
    seed: int,
) -> dict[str, float]:
    """Mean probability, over answer positions, of the next tokens that continue the right answer.

    ``canonical``: along the tokenizer's own encoding; ``resplit``: along one random segmentation
    of every answer.
    """
    model.eval()
    end_id = end_of_turn(tokenizer)
    segmenter, rng = Segmenter(tokenizer), np.random.default_rng(seed)
    by_bytes: dict[bytes, list[int]] = {}
    for index, spelled in enumerate(table):
        by_bytes.setdefault(spelled, []).append(index)
    masses: dict[str, list[float]] = {"canonical": [], "resplit": []}
    for example in examples:
        ways = {
            "canonical": example.answer_ids[:-1],
            "resplit": segmenter.random(example.task.answer, rng=rng),
        }
        for way, ids in ways.items():
            inputs = torch.tensor([[*example.prompt_ids, *ids]])
            logits = model(input_ids=inputs, use_cache=False).logits[0]
            rows = logits[len(example.prompt_ids) - 1 :].softmax(-1)
            fitting = fitting_ids(ids, table=table, by_bytes=by_bytes, end_id=end_id)
            masses[way] += [
                float(row[wanted].sum()) for row, wanted in zip(rows, fitting, strict=True)
            ]
    return {way: round(float(np.mean(values)), 4) for way, values in masses.items()}
