"""Rows of supervised training, and the noise that makes a teacher robust to foreign prefixes."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import numpy as np
from transformers import PreTrainedTokenizerFast

from mopd.demo.decode import Example, end_of_turn
from mopd.demo.spec import WorldSpec

Row = tuple[list[int], list[int]]  # inputs, and targets with -100 where there is none


def make_row(prompt: list[int], *, inputs: list[int], targets: list[int]) -> Row:
    """Shift by one: position i predicts token i + 1, and only the answer is predicted."""
    return [*prompt, *inputs[:-1]], [-100] * (len(prompt) - 1) + targets


class Segmenter:
    """Cuts a text anywhere and encodes the parts, as a foreign tokenizer's pieces arrive.

    Every segmentation into vocabulary pieces can come out: the number of cuts is uniform between
    none and one after every character. Texts are ASCII, so a character is a byte.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._encode = tokenizer.backend_tokenizer.encode
        self._cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """The canonical encoding of one part."""
        if text not in self._cache:
            self._cache[text] = self._encode(text, add_special_tokens=False).ids
        return self._cache[text]

    def random(self, text: str, *, rng: np.random.Generator) -> list[int]:
        """Token ids of ``text`` in a random segmentation."""
        is_cut = rng.random(len(text) - 1) < rng.random()
        bounds = [0, *(np.flatnonzero(is_cut) + 1).tolist(), len(text)]
        parts = [text[start:end] for start, end in pairwise(bounds)]
        return [token for part in parts for token in self.encode(part)]


class PrefixNoise:
    """Makes a model robust to prefixes it would not write itself.

    ``resplit_share`` of the samples have their answer cut at random in the inputs, while every
    target is the canonical next token of what remains: the model follows any segmentation and
    itself writes only its own. Half of all samples get some answer inputs replaced, and targets
    stay. In a cut answer only the number of bytes tells where it stands, so there a replacement
    has the length of the original.
    """

    def __init__(
        self,
        spec: WorldSpec,
        *,
        tokenizer: PreTrainedTokenizerFast,
        examples: list[Example],
        table: list[bytes],
    ) -> None:
        self.spec = spec
        self.end_id = end_of_turn(tokenizer)
        self.segmenter = Segmenter(tokenizer)
        self.lengths = [len(spelled) for spelled in table]
        pool = {token for example in examples for token in example.answer_ids[:-1]}
        self.pool = sorted(pool)
        for letter in sorted({letter for e in examples for letter in e.task.answer}):
            pool.update(self.segmenter.encode(letter))
        self.same_length: dict[int, list[int]] = defaultdict(list)
        for token in sorted(pool):
            self.same_length[self.lengths[token]].append(token)

    def row(self, example: Example, *, rng: np.random.Generator) -> Row:
        """One noisy training row."""
        inputs = list(example.answer_ids)
        targets = example.answer_ids
        is_cut = rng.random() < self.spec.resplit_share
        if is_cut:
            inputs = [*self.segmenter.random(example.task.answer, rng=rng), self.end_id]
            targets = [*self._canonical_next(example.task.answer, inputs[:-1]), self.end_id]
        if rng.random() < 0.5:
            for index, token in enumerate(inputs[:-1]):
                if rng.random() < self.spec.replace_rate:
                    pool = self.pool
                    if is_cut:
                        pool = self.same_length[self.lengths[token]] or [token]
                    inputs[index] = pool[int(rng.integers(len(pool)))]
        return make_row(example.prompt_ids, inputs=inputs, targets=targets)

    def _canonical_next(self, text: str, pieces: list[int]) -> list[int]:
        """Before each piece, the first token of the canonical encoding of the rest of ``text``."""
        starts = np.cumsum([0, *(self.lengths[piece] for piece in pieces[:-1])])
        return [self.segmenter.encode(text[start:])[0] for start in starts.tolist()]
