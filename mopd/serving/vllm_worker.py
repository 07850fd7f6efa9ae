"""Rows from inside a vLLM worker: a worker extension that reads the logits of prompts.

`--worker-extension-cls mopd.serving.vllm_worker.RowsExtension`. A request that carries
``extra_args={"mopd_rows": {...}}`` leaves its rows here under its own key, and `mopd_take` brings
them. Requests without it are served as ever. The hook sits beside vLLM's own computation of prompt
log-probabilities (`_get_prompt_logprobs_dict`), which every step of its runner calls with all
hidden states; it needs that method, so the runner "V2" is refused at the first request.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mopd.serving.rows import BLOCK_ELEMENTS, rows_of_logits
from mopd.serving.scoring import join_rows
from mopd.serving.wire import RawRows, Wire, encode_rows

EXTRA_ARG = "mopd_rows"
HOOKED = "_get_prompt_logprobs_dict"
# Rows that nobody fetched (a request failed after its prefill) go when this many sequences wait;
# eight requests of `ScoreLimits.max_sequences` fit.
MAX_WAITING = 4096


@dataclass(frozen=True, slots=True)
class _Span:
    """Positions ``first:last`` of one request in this step, and where their hidden states are."""

    key: str
    kind: tuple[int | None, float, int]  # top-k, temperature, vocabulary
    first: int
    last: int
    offset: int
    actual: list[int]


class RowStore:
    """Rows by key: blocks of ascending positions, as prefill was cut into chunks."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[str, dict[int, RawRows]] = OrderedDict()

    def put(self, key: str, first: int, rows: RawRows) -> None:
        """A preempted request starts again at its first position and overwrites."""
        self._blocks.setdefault(key, {})[first] = rows
        while len(self._blocks) > MAX_WAITING:
            self._blocks.popitem(last=False)

    def take(self, key: str, *, first: int, last: int) -> list[RawRows]:
        """All rows of ``key``; KeyError when a position is missing."""
        blocks = self._blocks.pop(key, {})
        parts, position = [], first
        while position < last:
            parts.append(blocks[position])
            position += len(parts[-1].logprobs)
        return parts

    def drop(self, key: str) -> None:
        """Nobody will fetch them."""
        self._blocks.pop(key, None)


class RowsExtension:
    """Mixed into vLLM's worker; its methods are called with `collective_rpc`."""

    def mopd_install(self) -> int:
        """Hooks the runner, once; returns the columns of the logits."""
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        if not hasattr(runner, HOOKED):
            raise RuntimeError("mopd's rows need vLLM's runner V1: set VLLM_USE_V2_MODEL_RUNNER=0")
        if not hasattr(self, "_mopd_store"):
            self._mopd_store = store = RowStore()
            original = getattr(runner, HOOKED)

            def hooked(hidden: Tensor, scheduled: dict[str, int]) -> Any:
                collect(runner, store, hidden, scheduled)
                return original(hidden, scheduled)

            setattr(runner, HOOKED, hooked)
        return int(runner.model_config.get_vocab_size())

    def mopd_take(self, spans: list[tuple[str, int, int]], wire: Wire) -> bytes:
        """The arrays of (key, first, last) in order; empty on a worker that has no rows."""
        parts: list[RawRows] = []
        for key, first, last in spans:
            try:
                parts += self._mopd_store.take(key, first=first, last=last)
            except KeyError:
                return b""
        return encode_rows(join_rows(parts), wire=wire)

    def mopd_drop(self, keys: list[str]) -> None:
        """Forgets the rows of requests that failed."""
        for key in keys:
            self._mopd_store.drop(key)


@torch.no_grad()
def collect(runner: Any, store: RowStore, hidden: Tensor, scheduled: dict[str, int]) -> None:
    """Puts this step's rows into ``store``. ``hidden`` [tokens of the step, H].

    Requests of one kind share the products with the output weight, which is why this is fast: a
    step holds many sequences. Every rank computes (it is a collective), the first one keeps.
    """
    spans = [span for name, num in scheduled.items() if (span := _span(runner, name, num))]
    for kind in dict.fromkeys(span.kind for span in spans):
        _collect_kind(runner, store, hidden, [span for span in spans if span.kind == kind])


def _collect_kind(runner: Any, store: RowStore, hidden: Tensor, spans: list[_Span]) -> None:
    top_k, temperature, vocab_size = spans[0].kind
    index = np.concatenate([s.offset + np.arange(s.last - s.first) for s in spans])
    actual = torch.as_tensor(np.concatenate([s.actual for s in spans]), device=hidden.device)
    states = hidden[torch.as_tensor(index, device=hidden.device)]
    block = max(1, BLOCK_ELEMENTS // vocab_size)
    parts: list[RawRows] = []
    for begin in range(0, len(index), block):
        logits = runner.model.compute_logits(states[begin : begin + block])
        if logits is not None:
            parts.append(
                rows_of_logits(
                    logits[:, :vocab_size],
                    actual[begin : begin + block],
                    top_k=top_k,
                    temperature=temperature,
                )
            )
    if not parts or not _is_first_rank():
        return
    rows, end = join_rows(parts), 0
    for span in spans:
        begin, end = end, end + span.last - span.first
        store.put(span.key, span.first, _cut(rows, begin, end))


def _cut(rows: RawRows, begin: int, end: int) -> RawRows:
    return RawRows(
        topk_ids=None if rows.topk_ids is None else rows.topk_ids[begin:end],
        topk_logprobs=rows.topk_logprobs[begin:end],
        logprobs=rows.logprobs[begin:end],
        log_tail=rows.log_tail[begin:end],
        lse=rows.lse[begin:end],
    )


def _span(runner: Any, name: str, num_tokens: int) -> _Span | None:
    request = runner.requests[name]
    wanted = (getattr(request.sampling_params, "extra_args", None) or {}).get(EXTRA_ARG)
    if wanted is None or request.prompt_token_ids is None:
        return None
    # position p predicts token p + 1
    done, ids = request.num_computed_tokens, request.prompt_token_ids
    first = max(wanted["start"] - 1, done)
    last = min(len(ids) - 1, done + num_tokens)
    if first >= last:
        return None
    begin = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[name]])
    return _Span(
        key=wanted["key"],
        kind=(wanted["top_k"], wanted["temperature"], wanted["vocab_size"]),
        first=first,
        last=last,
        offset=begin + first - done,
        actual=ids[first + 1 : last + 1],
    )


def _is_first_rank() -> bool:
    from vllm.distributed import (  # pyright: ignore[reportMissingImports]: not in every venv
        get_tensor_model_parallel_rank,
    )

    return get_tensor_model_parallel_rank() == 0
