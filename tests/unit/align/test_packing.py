"""Samples behind each other, micro-batches by a budget of tokens, and shares of their loss rows."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from mopd.align.batch import Batching, Sample, make_micro_batches
from mopd.align.share import share_micro_batch
from mopd.types import MicroBatch, TeacherRows
from tests.unit.align.test_batch import rollout, rows


def sample(prompt: int, response: int) -> Sample:
    positions = list(range(0, response, 2))
    return Sample(
        rollout=rollout(prompt, response),
        rows={"a": rows(positions, width=2, paths=2)} if response > 1 else {},
    )


SAMPLES = [sample(2, 3), sample(4, 2), sample(1, 1), sample(3, 9), sample(2, 6)]
LENGTHS = [5, 6, 2, 12, 8]


def texts(micro: MicroBatch) -> list[list[int]]:
    """The real tokens of each text."""
    flat = micro.tokens.reshape(-1)
    starts = (
        np.arange(len(micro.lengths)) * micro.tokens.shape[1]
        if micro.offsets is None
        else micro.offsets[:-1]
    )
    return [flat[s : s + n].tolist() for s, n in zip(starts, micro.lengths.tolist(), strict=True)]


def test_packed_texts_lie_behind_each_other() -> None:
    batching = Batching(size=2, packing=True)
    first, second = make_micro_batches(SAMPLES[:3], batching=batching, pad_id=9)
    assert first.tokens.tolist() == [[1, 2, 50, 51, 52, 1, 2, 3, 4, 50, 51]]
    assert first.offsets is not None and first.offsets.tolist() == [0, 5, 11]
    assert first.lengths.tolist() == [5, 6]
    assert np.flatnonzero(first.response_mask).tolist() == [1, 2, 3, 8, 9]
    assert second.tokens.tolist() == [[1, 50]]


@pytest.mark.parametrize("batching", [Batching(size=2), Batching(size=8, max_tokens=24)], ids=str)
def test_packed_and_padded_say_the_same_of_each_text(batching: Batching) -> None:
    padded = make_micro_batches(SAMPLES, batching=batching, pad_id=9)
    packed = make_micro_batches(
        SAMPLES,
        batching=Batching(size=batching.size, max_tokens=batching.max_tokens, packing=True),
        pad_id=9,
    )
    assert sorted(t for m in padded for t in texts(m)) == sorted(
        t for m in packed for t in texts(m)
    )
    for name in ("position", "token_position", "path_position"):
        # the token that a row predicts, and its prefix, in both
        assert predicted(padded, name) == predicted(packed, name)


def predicted(micros: tuple[MicroBatch, ...], name: str) -> list[tuple[list[int], int]]:
    found = []
    for micro in micros:
        width = micro.tokens.shape[1]
        starts = (
            np.arange(len(micro.lengths)) * width if micro.offsets is None else micro.offsets[:-1]
        )
        flat = micro.tokens.reshape(-1)
        for position in getattr(micro.rows["a"], name).tolist():
            text = int(np.searchsorted(starts, position, side="right")) - 1
            found.append((flat[starts[text] : position + 1].tolist(), int(flat[position + 1])))
    return sorted(found)


@pytest.mark.parametrize("packing", [False, True])
def test_a_budget_of_tokens_is_kept_and_nothing_is_lost(packing: bool) -> None:
    generator = np.random.default_rng(0)
    many = [sample(int(p), int(r)) for p, r in generator.integers(1, 30, (60, 2))]
    limit = 64
    micros = make_micro_batches(
        many, batching=Batching(size=4, max_tokens=limit, packing=packing), pad_id=9
    )
    assert all(micro.tokens.size <= limit for micro in micros)
    assert sorted(n for m in micros for n in m.lengths.tolist()) == sorted(
        len(s.rollout.prompt_ids) + len(s.rollout.token_ids) for s in many
    )
    total = sum(int(m.lengths.sum()) for m in micros)
    used = sum(m.tokens.size for m in micros)
    if packing:
        assert used == total
        assert len(micros) <= -(-total // limit) + 2  # first fit, longest first
    else:
        assert used < 1.25 * total


def test_a_text_over_the_budget_is_alone() -> None:
    micros = make_micro_batches(
        SAMPLES, batching=Batching(size=9, max_tokens=10, packing=True), pad_id=9
    )
    alone = [m for m in micros if m.tokens.size > 10]
    assert [m.lengths.tolist() for m in alone] == [[12]]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("by", ["chunk", "sequence"])
def test_shares_are_the_whole_and_tear_nothing(size: int, by: str) -> None:
    (micro,) = make_micro_batches(SAMPLES, batching=Batching(size=9, packing=True), pad_id=9)
    whole = micro.rows["a"]
    parts = [share_micro_batch(micro, r, size, by=by) for r in range(size)]  # pyright: ignore
    masks = np.stack([part.response_mask for part in parts])
    assert (masks.sum(0) == micro.response_mask).all()
    owned = np.stack([part.rows["a"].chunk_owned for part in parts])
    assert (owned.sum(0) == 1).all()
    for name in ("position", "token_position", "path_position"):
        found = np.concatenate([getattr(part.rows["a"], name) for part in parts])
        assert sorted(found) == sorted(getattr(whole, name))
    for part, mine in zip(parts, owned, strict=True):
        tokens = part.rows["a"].token_chunk
        assert set(tokens) <= set(np.flatnonzero(mine))  # a chunk's tokens are where it is owned
        assert (part.tokens == micro.tokens).all()
    sequences = [set(whole.chunk_sequence[mine]) for mine in owned]
    if by == "sequence":
        assert not any(a & b for i, a in enumerate(sequences) for b in sequences[:i])
    else:
        counts = owned.sum(1)
        assert counts.max() - counts.min() <= 1


def test_a_share_without_chunks_and_of_one_rank() -> None:
    (micro,) = make_micro_batches(SAMPLES[2:3], batching=Batching(size=9), pad_id=9)
    assert share_micro_batch(micro, 0, 1) is micro
    micro = make_micro_batches(SAMPLES[:1], batching=Batching(size=9), pad_id=9)[0]
    parts = [share_micro_batch(micro, r, 4).rows["a"] for r in range(4)]
    assert sum(len(part.position) for part in parts) == len(micro.rows["a"].position)
    assert {f.name for f in fields(TeacherRows)} == {f.name for f in fields(parts[0])}
