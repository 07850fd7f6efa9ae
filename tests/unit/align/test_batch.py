"""Samples into padded micro-batches: offsets, widths and empty rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mopd.align.batch import Batching, Sample, concatenate_rows, make_micro_batches
from mopd.types import Prompt, Rollout, TeacherRows
from tests.helpers.losses import make_rows

PAD = 99


def rollout(prompt: int, response: int, *, mask: list[bool] | None = None) -> Rollout:
    return Rollout(
        prompt=Prompt(id="p", messages=(), domain="d"),
        sample_index=0,
        prompt_ids=np.arange(1, 1 + prompt, dtype=np.int32),
        token_ids=np.arange(50, 50 + response, dtype=np.int32),
        loss_mask=np.ones(response, dtype=bool) if mask is None else np.array(mask),
        logprobs=np.zeros(response, dtype=np.float32),
        byte_ends=np.arange(1, 1 + response),
        response=b"x" * response,
        policy_version=0,
        finish_reason="length",
    )


def rows(positions: list[int], *, width: int, paths: int = 0) -> TeacherRows:
    """One token a chunk; ``paths`` rows of two targets each on the first position."""
    size = len(positions)
    return make_rows(
        positions,
        np.tile(np.arange(width), (size, 1)).reshape(size, width),
        np.full((size, width), 0.5 / width),
        paths=[(positions[0], [q, -1 - q], [0.25, 0.75], 1.0) for q in range(paths)],
        tokens=[(p, 50 + p, c) for c, p in enumerate(positions)],
        chunk_logprob=[-1.0 - p for p in positions],
    )


EMPTY = replace(rows([], width=2), chunk_size=np.zeros((0, 2), dtype=np.int32))


def test_padding_lengths_and_masks() -> None:
    samples = [
        Sample(rollout=rollout(2, 3), rows={}),
        Sample(rollout=rollout(4, 2, mask=[True, False]), rows={}),
        Sample(rollout=rollout(1, 1), rows={}),
    ]
    first, second = make_micro_batches(samples, batching=Batching(size=2), pad_id=PAD)
    assert first.tokens.tolist() == [[1, 2, 50, 51, 52, PAD], [1, 2, 3, 4, 50, 51]]
    assert second.tokens.tolist() == [[1, 50, PAD, PAD, PAD, PAD]]  # one length for the whole step
    assert [*first.lengths, *second.lengths] == [5, 6, 2]
    assert [np.flatnonzero(m).tolist() for m in first.response_mask] == [[1, 2, 3], [3]]
    assert np.flatnonzero(second.response_mask[0]).tolist() == [0]


def test_positions_move_to_the_flattened_axis() -> None:
    samples = [
        Sample(rollout=rollout(2, 3), rows={"a": rows([0, 2], width=2, paths=1)}),
        Sample(rollout=rollout(3, 3), rows={"a": rows([1], width=2), "b": rows([0], width=2)}),
    ]
    (micro,) = make_micro_batches(samples, batching=Batching(size=2), pad_id=PAD)
    length = micro.tokens.shape[1]
    assert micro.rows["a"].position.tolist() == [1, 3, length + 2 + 1]
    assert micro.rows["a"].token_position.tolist() == [1, 3, length + 2 + 1]
    assert micro.rows["a"].path_position.tolist() == [1]
    assert micro.rows["b"].position.tolist() == [length + 2]
    flat = micro.tokens.reshape(-1)
    for found in micro.rows.values():
        assert (flat[found.token_position + 1] == found.token_id).all()


def test_concatenation_moves_chunk_and_path_offsets_and_pads_the_width() -> None:
    parts = [rows([0, 1], width=3, paths=2), rows([4], width=1), rows([6, 7], width=2, paths=1)]
    joined = concatenate_rows(parts)
    assert joined.position.tolist() == [0, 1, 4, 6, 7]
    assert joined.token_chunk.tolist() == [0, 1, 2, 3, 4]
    assert joined.path_offsets.tolist() == [0, 2, 4, 6]
    assert joined.path_entry.tolist() == [0, -1, 1, -2, 0, -1]  # entries name tokens, not places
    assert joined.path_entry_slot.tolist() == [0, 1, 2, 3, 4, 5]
    assert joined.topk_ids is not None
    assert joined.topk_ids[2].tolist() == [0, -1, -1]
    assert joined.topk_ids[4].tolist() == [0, 1, -1]
    assert np.isneginf(joined.topk_logprobs[joined.topk_ids < 0]).all()
    assert joined.chunk_logprob.tolist() == [-1, -2, -5, -7, -8]


def test_a_sample_without_rows_leaves_no_trace() -> None:
    parts = [rows([0], width=2, paths=1), EMPTY, rows([3], width=2, paths=1)]
    joined, without = concatenate_rows(parts), concatenate_rows([parts[0], parts[2]])
    for name in (
        "position",
        "token_chunk",
        "path_offsets",
        "path_entry",
        "path_entry_slot",
        "topk_ids",
    ):
        assert (getattr(joined, name) == getattr(without, name)).all()
    alone = concatenate_rows([EMPTY, EMPTY])
    assert len(alone.position) == 0
    assert alone.path_offsets.tolist() == [0]


def test_the_parts_are_not_changed() -> None:
    sample = Sample(rollout=rollout(3, 3), rows={"a": rows([0], width=2)})
    before = replace(sample.rows["a"])
    make_micro_batches([sample], batching=Batching(size=1), pad_id=PAD)
    assert sample.rows["a"].position.tolist() == before.position.tolist() == [0]


def test_chunks_know_their_rollout() -> None:
    parts = [rows([0, 2], width=2), EMPTY, rows([1], width=2)]
    assert concatenate_rows(parts).chunk_sequence.tolist() == [0, 0, 2]
