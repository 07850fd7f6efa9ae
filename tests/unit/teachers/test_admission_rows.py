"""The contract of rows that come as arrays: each thing that can be wrong, and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from mopd.serving.reply import ArrayRows
from mopd.serving.rows import rows_of_logits
from mopd.serving.wire import RawRows, WireHeader, decode, encode
from mopd.teachers.admission import Admitted, admit, nothing

T, V, K = 12, 50, 6
ACTUAL = np.random.default_rng(1).integers(0, V, T)
VICTIM = 4


def good(*, top_k: int | None = K, temperature: float = 1.0, size: float = 3.0) -> ArrayRows:
    logits = torch.as_tensor(np.random.default_rng(0).normal(size=(T, V)) * size)
    rows = rows_of_logits(logits, torch.as_tensor(ACTUAL), top_k=top_k, temperature=temperature)
    return ArrayRows(rows=rows, temperature=temperature)


def admitted(said: ArrayRows, *, k: int | None = K) -> Admitted:
    ids = np.concatenate([[7, 7], ACTUAL])
    return admit(said, ids=ids, num_prompt=2, k=k, vocab_size=V)


def through(said: ArrayRows, wire: str) -> ArrayRows:
    """As it arrives."""
    rows = said.rows
    header = WireHeader(
        request="r",
        model="m",
        wire=wire,  # pyright: ignore[reportArgumentType]
        listed=rows.topk_ids is not None,
        top_k=rows.topk_logprobs.shape[1],
        temperature=said.temperature,
        rows=(T,),
    )
    reply = decode(encode(header, rows), max_bytes=1 << 20)
    return replace(said, rows=reply.rows, error=2.0**-11 if wire == "fp16" else 0.0)


@pytest.mark.parametrize("top_k", [1, K, V, None])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 8.0])
@pytest.mark.parametrize("size", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("wire", ["fp32", "fp16"])
def test_what_an_engine_computes_is_believed(
    top_k: int | None, temperature: float, size: float, wire: str
) -> None:
    said = through(good(top_k=top_k, temperature=temperature, size=size), wire)
    found = admitted(said, k=top_k)
    assert found.valid.all() and not found.missing
    assert found.lse is not None and found.lse.tobytes() == said.rows.lse.tobytes()
    assert found.topk_logprobs == pytest.approx(np.minimum(said.rows.topk_logprobs, 0.0))
    assert (found.topk_ids is None) == (top_k is None)


def test_half_precision_needs_and_has_its_own_room() -> None:
    """A thousand equal tokens: each log-probability is rounded the same way."""
    size = 1000
    rows = rows_of_logits(
        torch.zeros(T, size), torch.as_tensor(ACTUAL), top_k=None, temperature=1.0
    )
    said = through(ArrayRows(rows=rows, temperature=1.0), "fp16")
    assert np.abs(np.exp(said.rows.topk_logprobs.astype(np.float64)).sum(1) - 1).min() > 1e-3
    found = admit(said, ids=np.append(7, ACTUAL), num_prompt=1, k=None, vocab_size=size)
    assert found.valid.all()
    strict = replace(said, error=0.0)
    found = admit(strict, ids=np.append(7, ACTUAL), num_prompt=1, k=None, vocab_size=size)
    assert found.missing == Counter({"mass": T})


def edit(**fields: Callable[[np.ndarray], object]) -> Callable[[RawRows], RawRows]:
    """Row `VICTIM` of the named arrays changed in place by a function."""

    def change(rows: RawRows) -> RawRows:
        copies = {name: np.array(getattr(rows, name)) for name in fields}
        for name, function in fields.items():
            value = copies[name][VICTIM : VICTIM + 1].reshape(-1)
            function(value)
            copies[name][VICTIM] = value.reshape(copies[name][VICTIM].shape)
        return replace(rows, **copies)

    return change


def put(place: int, value: float) -> Callable[[np.ndarray], object]:
    return lambda row: row.__setitem__(place, value)


def listed_actual(value: float) -> Callable[[RawRows], RawRows]:
    """The actual token is the likeliest, and its own log-probability another."""

    def change(rows: RawRows) -> RawRows:
        assert rows.topk_ids is not None
        ids, logprobs = rows.topk_ids.copy(), rows.logprobs.copy()
        ids[VICTIM] = np.setdiff1d(np.arange(K + 1), ACTUAL[VICTIM])[:K]
        ids[VICTIM, 0] = ACTUAL[VICTIM]
        logprobs[VICTIM] = rows.topk_logprobs[VICTIM, 0] + value
        return replace(rows, topk_ids=ids, logprobs=logprobs)

    return change


def unlisted_actual(value: float) -> Callable[[RawRows], RawRows]:
    """The actual token is not listed, and as likely as ``value`` says."""

    def change(rows: RawRows) -> RawRows:
        assert rows.topk_ids is not None
        ids, logprobs = rows.topk_ids.copy(), rows.logprobs.copy()
        ids[VICTIM] = np.setdiff1d(np.arange(K + 1), ACTUAL[VICTIM])[:K]
        logprobs[VICTIM] = value
        return replace(rows, topk_ids=ids, logprobs=logprobs)

    return change


WRONG: dict[str, tuple[str, Callable[[RawRows], RawRows]]] = {
    "an id beyond the vocabulary": ("vocabulary", edit(topk_ids=put(3, V))),
    "a negative id": ("vocabulary", edit(topk_ids=put(0, -1))),
    "an id twice": ("repeated", edit(topk_ids=lambda row: row.__setitem__(1, row[2]))),
    "no number listed": ("missing", edit(topk_logprobs=put(2, np.nan))),
    "minus infinity listed": ("missing", edit(topk_logprobs=put(5, -np.inf))),
    "infinity listed": ("missing", edit(topk_logprobs=put(0, np.inf))),
    "a clamped value": ("missing", edit(topk_logprobs=put(5, -9999.0))),
    "no number of the actual token": ("missing", edit(logprobs=put(0, np.nan))),
    "a clamped actual token": ("missing", edit(logprobs=put(0, -9999.0))),
    "no number in the tail": ("missing", edit(log_tail=put(0, np.nan))),
    "a probability over one": ("positive", edit(topk_logprobs=put(0, 0.01))),
    "a tail over one": ("positive", edit(log_tail=put(0, 0.5))),
    "an actual token over one": ("positive", edit(logprobs=put(0, 3.0))),
    "too much mass": ("mass", edit(topk_logprobs=lambda row: row.__iadd__((0.1 - row) * 0.5))),
    "too little mass": ("mass", edit(topk_logprobs=lambda row: row.__isub__(0.1))),
    "a tail that is too large": ("mass", edit(log_tail=lambda row: row.__iadd__(0.1))),
    "no tail": ("mass", edit(log_tail=put(0, -np.inf))),
    "two values of one token": ("actual", listed_actual(0.01)),
    "an unlisted token above the list": ("order", unlisted_actual(-0.01)),
    "no log-sum-exp": ("lse", edit(lse=put(0, np.nan))),
    "an infinite log-sum-exp": ("lse", edit(lse=put(1, np.inf))),
    "log-sum-exps that do not fit": ("lse", edit(lse=put(1, 9.0))),
}


@pytest.mark.parametrize("case", WRONG)
def test_one_wrong_row_is_missing_and_no_other(case: str) -> None:
    reason, change = WRONG[case]
    said = good(temperature=2.0, size=1.0)
    clean = admitted(said)
    found = admitted(replace(said, rows=change(said.rows)))
    assert found.missing == Counter({reason: 1})
    rest = np.arange(T) != VICTIM
    assert (found.valid == rest).all()
    assert found.topk_ids is not None and found.lse is not None
    assert (found.topk_ids[VICTIM] == -1).all()
    for name in ("logprobs", "topk_logprobs", "log_tail", "lse"):
        mine, true = getattr(found, name), getattr(clean, name)
        assert np.isnan(mine[VICTIM]).all(), name
        assert mine[rest].tobytes() == true[rest].tobytes(), name


def test_the_same_log_sum_exp_twice_at_temperature_one() -> None:
    said = good()
    found = admitted(replace(said, rows=edit(lse=put(1, 9.0))(said.rows)))
    assert found.missing == Counter({"lse": 1})


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("mass", edit(topk_logprobs=lambda row: row.__isub__(0.1))),
        ("missing", edit(topk_logprobs=put(9, np.nan))),
        ("actual", edit(logprobs=lambda row: row.__isub__(0.1))),
        ("lse", edit(lse=put(0, 4.0))),
    ],
)
def test_wrong_whole_rows(reason: str, change: Callable[[RawRows], RawRows]) -> None:
    said = good(top_k=None, temperature=2.0)
    found = admitted(replace(said, rows=change(said.rows)), k=None)
    assert found.missing == Counter({reason: 1}) and found.topk_ids is None
    assert np.isnan(found.topk_logprobs[VICTIM]).all() and found.valid.sum() == T - 1


def test_a_list_out_of_order_is_put_in_order() -> None:
    said = good()
    rows = said.rows
    assert rows.topk_ids is not None
    turned = replace(
        rows, topk_ids=rows.topk_ids[:, ::-1], topk_logprobs=rows.topk_logprobs[:, ::-1]
    )
    found = admitted(replace(said, rows=turned))
    assert found.valid.all() and found.topk_ids is not None
    assert found.topk_ids.tolist() == rows.topk_ids.tolist()


def test_another_width_or_number_of_rows_is_all_missing() -> None:
    said = good()
    assert admitted(said, k=K + 1).missing == Counter({"length": T})
    assert admitted(said, k=None).missing == Counter({"length": T})
    found = admit(said, ids=ACTUAL, num_prompt=2, k=K, vocab_size=V)
    assert found.missing == Counter({"length": T - 2})


def test_nothing_is_shaped_like_something() -> None:
    lists, whole = nothing(3, K, "x", vocab_size=V), nothing(3, None, "x", vocab_size=V)
    assert lists.topk_logprobs.shape == (3, K) and lists.topk_ids is not None
    assert whole.topk_logprobs.shape == (3, V) and whole.topk_ids is None
    assert not lists.valid.any() and np.isnan(lists.topk_logprobs).all()
