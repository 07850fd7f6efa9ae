"""Building W asks the tokenizers for batches, never token by token."""

from __future__ import annotations

import random
import time

import pytest

from mopd.projection import ProjectionOptions, build_projection
from mopd.tokens.vocabulary import Vocabulary
from tests.helpers.vocabularies import byte_level

NUM_WORDS = 4000


def words(seed: int) -> list[str]:
    draw = random.Random(seed)
    return [
        "".join(draw.choices("abcdefghijklmnop ", k=draw.randint(2, 5))) for _ in range(NUM_WORDS)
    ]


def test_large_vocabularies_take_a_handful_of_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = byte_level(words(1)), byte_level(words(2))
    assert min(student.size, teacher.size) > NUM_WORDS
    sizes: list[int] = []
    batched = Vocabulary.encode_many

    def counted(self: Vocabulary, segments: list[bytes]) -> list[list[int]]:
        sizes.append(len(segments))
        return batched(self, segments)

    monkeypatch.setattr(Vocabulary, "encode_many", counted)
    begin = time.perf_counter()
    projection = build_projection(student, teacher, ProjectionOptions(max_length=4, gamma=0.1))
    # 128k x 152k tokens take 5 s; these take a thirtieth of it
    assert time.perf_counter() - begin < 5
    assert projection.trie.num_nodes > 100
    # by_bytes of both sides, rows, fold, stop tokens
    assert len(sizes) == 5
    assert sum(sizes) <= 3 * (student.size + teacher.size)
