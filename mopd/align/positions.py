"""Which positions of a response, or of a context-parallel rank, have rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mopd.types import TeacherRows, ragged_arange


def canonical_prefix(token_ids: np.ndarray, encoded_ids: np.ndarray) -> int:
    """Number of leading sampled tokens that are those of the student's own encoding of the text."""
    size = min(len(token_ids), len(encoded_ids))
    differs = np.asarray(token_ids[:size]) != np.asarray(encoded_ids[:size])
    return int(differs.argmax()) if differs.any() else size


def zigzag_positions(length: int, cp_size: int, rank: int) -> np.ndarray:
    """Positions of a sequence that a context-parallel rank holds, ascending.

    Megatron cuts a sequence into ``2 * cp_size`` pieces and gives rank r the pieces r and
    ``2 * cp_size - 1 - r``, so that causal attention costs every rank the same.

    Raises:
        ValueError: the length is no multiple of ``2 * cp_size``.
    """
    if cp_size == 1:
        return np.arange(length)
    if length % (2 * cp_size):
        raise ValueError(f"length {length} is no multiple of 2 * cp_size = {2 * cp_size}")
    piece = np.arange(length).reshape(2 * cp_size, -1)
    return piece[[rank, 2 * cp_size - 1 - rank]].reshape(-1)


def context_slice(rows: TeacherRows, local_of_global: np.ndarray) -> TeacherRows:
    """A context-parallel rank's part of a micro-batch's rows.

    Args:
        local_of_global: [B * L] this rank's flattened position of each flattened position of the
            whole micro-batch, -1 where another rank holds it; ascending where it is not -1.
    Chunk arrays stay whole, in the order of the boundary rows of the whole micro-batch: a chunk is
    scored from the tokens of several ranks, and owned where its boundary row is.
    Raises:
        ValueError: the map does not keep the order.
    """
    held = local_of_global[local_of_global >= 0]
    if (np.diff(held) <= 0).any():
        raise ValueError("the local positions of a rank must ascend with the global ones")
    boundary = local_of_global[rows.position]
    mine = {
        name: np.flatnonzero(local_of_global[getattr(rows, name)] >= 0)
        for name in ("position", "token_position", "path_position", "native_position")
    }
    row, token = mine["position"], mine["token_position"]
    path, native = mine["path_position"], mine["native_position"]
    ids = rows.topk_ids
    return replace(
        rows,
        position=boundary[row],
        row_weight=rows.row_weight[row],
        topk_ids=ids[row] if ids is not None and ids.ndim == 2 else ids,
        topk_logprobs=rows.topk_logprobs[row],
        log_tail=rows.log_tail[row],
        chunk_owned=rows.chunk_owned & (boundary >= 0),
        token_position=local_of_global[rows.token_position[token]],
        token_id=rows.token_id[token],
        token_chunk=rows.token_chunk[token],
        token_sampling_logprob=rows.token_sampling_logprob[token],
        native_position=local_of_global[rows.native_position[native]],
        native_weight=rows.native_weight[native],
        native_ids=rows.native_ids[native],
        native_logprobs=rows.native_logprobs[native],
        native_log_tail=rows.native_log_tail[native],
        **_path_slice(rows, path, local_of_global),
    )


def _path_slice(
    rows: TeacherRows, path: np.ndarray, local_of_global: np.ndarray
) -> dict[str, np.ndarray]:
    begin, count = rows.path_offsets[path], np.diff(rows.path_offsets)[path]
    slot = ragged_arange(begin, count)
    first = np.searchsorted(rows.path_entry_slot, slot)
    entries = np.searchsorted(rows.path_entry_slot, slot, side="right") - first
    return {
        "path_position": local_of_global[rows.path_position[path]],
        "path_weight": rows.path_weight[path],
        "path_offsets": np.concatenate([[0], np.cumsum(count)]).astype(np.int64),
        "path_target": rows.path_target[slot],
        "path_entry_slot": np.repeat(np.arange(len(slot)), entries),
        "path_entry": rows.path_entry[ragged_arange(first, entries)],
    }
