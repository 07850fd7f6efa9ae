"""Context-parallel parts of a payload, and canonical prefixes."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from mopd.align.batch import Batching, Sample, make_micro_batches
from mopd.align.paths import PathOptions
from mopd.align.payload import PayloadOptions
from mopd.align.positions import canonical_prefix, context_slice, zigzag_positions
from mopd.types import Prompt, Rollout, TeacherRows
from tests.helpers.losses import make_rows
from tests.helpers.payloads import MAX_LENGTH, random_problem

SAMPLES = 6


@pytest.mark.parametrize(
    ("sampled", "encoded", "expected"),
    [
        ([1, 2, 3], [1, 2, 3], 3),
        ([1, 2, 3], [1, 9], 1),
        ([4], [5], 0),
        ([1, 2], [1, 2, 3], 2),
        ([], [1], 0),
    ],
)
def test_the_canonical_prefix(sampled: list[int], encoded: list[int], expected: int) -> None:
    assert canonical_prefix(np.array(sampled), np.array(encoded)) == expected


def test_zigzag_pieces() -> None:
    assert zigzag_positions(8, 2, 0).tolist() == [0, 1, 6, 7]
    assert zigzag_positions(8, 2, 1).tolist() == [2, 3, 4, 5]
    assert zigzag_positions(5, 1, 0).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="multiple of 2"):
        zigzag_positions(6, 2, 0)


def local_map(batch: int, length: int, cp_size: int, rank: int) -> np.ndarray:
    """Flattened [batch, length] -> this rank's flattened [batch, length / cp_size], or -1."""
    held = zigzag_positions(length, cp_size, rank)
    found = np.full((batch, length), -1, dtype=np.int64)
    found[:, held] = np.arange(batch * len(held)).reshape(batch, -1)
    return found.reshape(-1)


def micro_batch(length: int) -> tuple[TeacherRows, int]:
    """(rows, padded length) of random samples with paths and chunks of several tokens."""
    samples = []
    for seed in range(SAMPLES):
        problem = random_problem(["13"], ["11", "22", "32", "2112"], "123", seed=seed, size=60)
        projection = problem.projection
        path = PathOptions(trie=projection.trie, fold=projection.fold, max_length=MAX_LENGTH)
        options = PayloadOptions(temperature=1.0, fold=projection.fold, path=path)
        size = len(problem.student_ids)
        rollout = Rollout(
            prompt=Prompt(id="p", messages=(), domain="d"),
            sample_index=0,
            prompt_ids=np.zeros(length - size - seed, dtype=np.int32),
            token_ids=problem.student_ids.astype(np.int32),
            loss_mask=np.ones(size, dtype=bool),
            logprobs=np.zeros(size, dtype=np.float32),
            byte_ends=problem.student.byte_ends(problem.student_ids),
            response=b"",
            policy_version=0,
            finish_reason="length",
        )
        rows = problem.rows(problem.listed(8), options)
        samples.append(Sample(rollout=rollout, rows={"t": rows}))
    (micro,) = make_micro_batches(samples, batching=Batching(size=SAMPLES), pad_id=0)
    return micro.rows["t"], micro.tokens.shape[1]


def paths_by_position(rows: TeacherRows, origin: np.ndarray) -> dict[int, list]:
    """Position in the whole micro-batch -> [weight, (target, entries) of every slot]."""
    found = {}
    for q, position in enumerate(rows.path_position.tolist()):
        slots = range(rows.path_offsets[q], rows.path_offsets[q + 1])
        found[int(origin[position])] = [float(rows.path_weight[q])] + [
            (float(rows.path_target[e]), rows.path_entry[rows.path_entry_slot == e].tolist())
            for e in slots
        ]
    return found


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_the_parts_of_all_ranks_are_the_whole_54(cp_size: int) -> None:
    rows, length = micro_batch(64)
    everywhere = np.arange(SAMPLES * length)
    whole = paths_by_position(rows, everywhere)
    owned, cut, paths = np.zeros(len(rows.position), dtype=int), 0, {}
    seen: dict[str, list[np.ndarray]] = {"position": [], "token_position": []}
    assert rows.topk_ids is not None
    for rank in range(cp_size):
        local = local_map(SAMPLES, length, cp_size, rank)
        part = context_slice(rows, local)
        origin = np.flatnonzero(local >= 0)
        boundary = np.isin(rows.position, origin)
        assert (origin[part.position] == rows.position[boundary]).all()
        assert (part.topk_ids == rows.topk_ids[boundary]).all()
        assert (part.topk_logprobs == rows.topk_logprobs[boundary]).all()
        assert (part.chunk_logprob == rows.chunk_logprob).all()
        assert part.chunk_owned.tolist() == boundary.tolist()
        token = np.isin(rows.token_position, origin)
        assert (part.token_id == rows.token_id[token]).all()
        assert (part.token_chunk == rows.token_chunk[token]).all()
        cut += len(set(part.token_chunk) - set(np.flatnonzero(part.chunk_owned)))
        paths |= paths_by_position(part, origin)
        owned += part.chunk_owned
        for name, parts in seen.items():
            parts.append(origin[getattr(part, name)])
    assert (owned == 1).all()
    for name, parts in seen.items():
        assert sorted(np.concatenate(parts)) == getattr(rows, name).tolist()
    assert paths == whole and len(whole) > 10
    assert cp_size == 1 or cut > 0  # some chunk begins on another rank


def test_a_rank_without_rows_and_native_and_shared_columns() -> None:
    rows = make_rows([1, 4], np.zeros((2, 1)), np.full((2, 1), 0.5), tokens=[(1, 5, 0), (4, 5, 1)])
    rows = replace(
        rows,
        topk_ids=np.array([3], dtype=np.int32),
        native_position=np.array([2, 4]),
        native_weight=np.array([0.25, 0.75]),
        native_ids=np.array([[7], [8]], dtype=np.int32),
        native_logprobs=np.zeros((2, 1)),
        native_log_tail=np.zeros(2),
    )
    local = np.array([-1, -1, -1, -1, 0, 1])
    part = context_slice(rows, local)
    assert (part.position.tolist(), part.native_position.tolist()) == ([0], [0])
    assert part.native_ids.tolist() == [[8]] and part.native_weight.tolist() == [0.75]
    assert part.topk_ids is rows.topk_ids
    assert context_slice(replace(rows, topk_ids=None), local).topk_ids is None
    none = context_slice(rows, np.full(6, -1))
    lengths = {f.name: len(getattr(none, f.name)) for f in fields(none) if "position" in f.name}
    assert set(lengths.values()) == {0}
    assert none.path_offsets.tolist() == [0]
    assert none.chunk_owned.tolist() == [False, False]


def test_a_map_that_turns_the_order_is_refused() -> None:
    rows = make_rows([0], np.zeros((1, 1)), np.full((1, 1), 0.5))
    with pytest.raises(ValueError, match="ascend"):
        context_slice(rows, np.array([1, 0]))
