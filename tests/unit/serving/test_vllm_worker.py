"""The worker's hook against one pass over whole sequences, on a runner that prefills in pieces."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mopd.serving import vllm_worker
from mopd.serving.rows import rows_of_logits
from mopd.serving.scoring import join_rows
from mopd.serving.vllm_worker import EXTRA_ARG, HOOKED, RowsExtension, RowStore, collect
from mopd.serving.wire import RawRows, encode_rows

HIDDEN, WIDTH, VOCABULARY = 8, 19, 17  # two columns are padding


@pytest.fixture(autouse=True)
def first_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_worker, "_is_first_rank", lambda: True)


class Runner:
    """What the hook reads of vLLM's runner. Hidden states are a function of (request, position)."""

    def __init__(self) -> None:
        self.weight = torch.randn(HIDDEN, WIDTH, generator=torch.Generator().manual_seed(1))
        self.model = SimpleNamespace(compute_logits=lambda hidden: hidden @ self.weight)
        self.model_config = SimpleNamespace(get_vocab_size=lambda: WIDTH)
        self.requests: dict[str, Any] = {}
        self.input_batch = SimpleNamespace(req_id_to_index={})
        self.query_start_loc = SimpleNamespace(np=np.zeros(1, dtype=np.int32))
        self.stock_calls = 0

    def _get_prompt_logprobs_dict(self, hidden: torch.Tensor, scheduled: dict[str, int]) -> dict:
        self.stock_calls += 1
        return {}

    def add(self, name: str, length: int, wanted: dict[str, Any] | None) -> None:
        ids = np.random.default_rng(length).integers(0, VOCABULARY, length).tolist()
        extra = None if wanted is None else {EXTRA_ARG: wanted}
        self.requests[name] = SimpleNamespace(
            prompt_token_ids=ids,
            num_computed_tokens=0,
            sampling_params=SimpleNamespace(extra_args=extra),
        )

    def states(self, name: str) -> torch.Tensor:
        length = len(self.requests[name].prompt_token_ids)
        generator = torch.Generator().manual_seed(sum(name.encode()))
        return torch.randn(length, HIDDEN, generator=generator)

    def step(self, scheduled: dict[str, int]) -> None:
        """One engine step: the hook, then the requests' progress."""
        self.input_batch.req_id_to_index = {name: i for i, name in enumerate(scheduled)}
        self.query_start_loc.np = np.cumsum([0, *scheduled.values()])
        parts = []
        for name, num in scheduled.items():
            done = self.requests[name].num_computed_tokens
            parts.append(self.states(name)[done : done + num])
        getattr(self, HOOKED)(torch.cat(parts), scheduled)
        for name, num in scheduled.items():
            self.requests[name].num_computed_tokens += num

    def exact(self, name: str, *, start: int, top_k: int | None, temperature: float) -> RawRows:
        ids = torch.tensor(self.requests[name].prompt_token_ids)
        logits = (self.states(name) @ self.weight)[start - 1 : -1, :VOCABULARY]
        return rows_of_logits(logits, ids[start:], top_k=top_k, temperature=temperature)


def wanted(key: str, start: int, top_k: int | None = 3, temperature: float = 2.0) -> dict[str, Any]:
    kind = {"top_k": top_k, "temperature": temperature, "vocab_size": VOCABULARY}
    return {"key": key, "start": start} | kind


def check(found: RawRows, exact: RawRows) -> None:
    for name in ("topk_logprobs", "logprobs", "log_tail", "lse"):
        np.testing.assert_allclose(getattr(found, name), getattr(exact, name), atol=1e-5)


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(2, 12), min_size=1, max_size=4),
    pieces=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    block=st.sampled_from([1, 3 * VOCABULARY, 1 << 20]),
    data=st.data(),
)
def test_pieces_give_the_rows_of_the_whole(
    lengths: list[int], pieces: list[int], block: int, data: st.DataObject
) -> None:
    runner, store = Runner(), RowStore()
    starts = [data.draw(st.integers(1, length - 1)) for length in lengths]
    top_ks = [data.draw(st.sampled_from([1, 3, None])) for _ in lengths]
    for number, (length, start, top_k) in enumerate(zip(lengths, starts, top_ks, strict=True)):
        runner.add(f"r{number}", length, wanted(f"k{number}", start, top_k))
    runner.add("stock", 5, None)
    setattr(runner, HOOKED, lambda hidden, scheduled: collect(runner, store, hidden, scheduled))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_worker, "BLOCK_ELEMENTS", block)
        for turn in range(100):
            left = {
                name: len(r.prompt_token_ids) - r.num_computed_tokens
                for name, r in runner.requests.items()
            }
            scheduled = {
                name: min(num, pieces[(turn + i) % len(pieces)])
                for i, (name, num) in enumerate(left.items())
                if num
            }
            if not scheduled:
                break
            runner.step(scheduled)
    for number, (length, start, top_k) in enumerate(zip(lengths, starts, top_ks, strict=True)):
        found = store.take(f"k{number}", first=start - 1, last=length - 1)
        exact = runner.exact(f"r{number}", start=start, top_k=top_k, temperature=2.0)
        check(join_rows(found), exact)


@pytest.fixture
def worker() -> Any:
    worker = RowsExtension()
    worker.model_runner = Runner()  # type: ignore[attr-defined]
    assert worker.mopd_install() == WIDTH
    return worker


def test_a_worker_hands_rows_out_once(worker: Any) -> None:
    runner = worker.model_runner
    assert worker.mopd_install() == WIDTH  # a second time changes nothing
    runner.add("a", 9, wanted("k", 4))
    runner.step({"a": 9})
    assert runner.stock_calls == 1
    exact = runner.exact("a", start=4, top_k=3, temperature=2.0)
    found = worker.mopd_take([("k", 3, 8)], "fp32")
    wanted_bytes = encode_rows(exact, wire="fp32")
    assert len(found) == len(wanted_bytes)
    assert exact.topk_ids is not None
    ids = 4 * exact.topk_ids.size
    assert found[:ids] == wanted_bytes[:ids]
    numbers = [np.frombuffer(data[ids:], dtype="<f4") for data in (found, wanted_bytes)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-5, abs=1e-6)  # sums in another order
    assert worker.mopd_take([("k", 3, 8)], "fp32") == b""


def test_a_preempted_request_starts_again(worker: Any) -> None:
    runner = worker.model_runner
    runner.add("a", 9, wanted("k", 1))
    runner.step({"a": 4})
    runner.requests["a"].num_computed_tokens = 0
    runner.step({"a": 5})
    runner.step({"a": 4})
    found = join_rows(worker._mopd_store.take("k", first=0, last=8))
    check(found, runner.exact("a", start=1, top_k=3, temperature=2.0))


def test_rows_that_are_not_complete_are_not_handed_out(worker: Any) -> None:
    runner = worker.model_runner
    runner.add("a", 9, wanted("k", 1))
    runner.step({"a": 4})
    assert worker.mopd_take([("k", 0, 8)], "fp32") == b""


def test_rows_are_dropped_when_asked_and_when_too_many_wait(
    worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_worker, "MAX_WAITING", 2)
    runner = worker.model_runner
    for name in ("a", "b", "c"):
        runner.add(name, 4, wanted(name, 1))
        runner.step({name: 4})
    assert worker.mopd_take([("a", 0, 3)], "fp32") == b""
    worker.mopd_drop(["b", "never there"])
    assert worker.mopd_take([("b", 0, 3)], "fp32") == b""
    assert worker.mopd_take([("c", 0, 3)], "fp32") != b""


def test_another_rank_computes_and_keeps_nothing(
    worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_worker, "_is_first_rank", lambda: False)
    runner = worker.model_runner
    runner.add("a", 4, wanted("a", 1))
    runner.step({"a": 4})
    assert worker.mopd_take([("a", 0, 3)], "fp32") == b""


def test_a_runner_without_the_hook_is_refused() -> None:
    worker = RowsExtension()
    worker.model_runner = SimpleNamespace()  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="V1"):
        worker.mopd_install()
