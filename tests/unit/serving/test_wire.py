"""The wire format: what goes in comes out, and nothing else is let in."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mopd.errors import TeacherError
from mopd.serving.wire import (
    LOWEST_HALF,
    MAGIC,
    RawRows,
    Wire,
    WireHeader,
    decode,
    encode,
    encode_header,
)

MAX_BYTES = 1 << 24
NAMES = ("topk_logprobs", "logprobs", "log_tail", "lse")


def make_header(
    rows: tuple[int, ...] = (3, 0, 2),
    *,
    top_k: int = 4,
    wire: Wire = "fp32",
    listed: bool = True,
    request: str = "r",
) -> WireHeader:
    return WireHeader(
        request=request,
        model="f" * 64,
        wire=wire,
        listed=listed,
        top_k=top_k,
        temperature=2.0,
        rows=rows,
    )


def make_rows(header: WireHeader, *, seed: int = 0) -> RawRows:
    random = np.random.default_rng(seed)
    count, width = sum(header.rows), header.top_k

    def logs(*shape: int) -> np.ndarray:
        values = -random.exponential(8.0, shape).astype(np.float32)
        return np.where(random.random(shape) < 0.1, -np.inf, values).astype(np.float32)

    ids = random.integers(0, 2**31 - 1, (count, width), dtype=np.int64).astype(np.int32)
    return RawRows(
        topk_ids=ids if header.listed else None,
        topk_logprobs=logs(count, width),
        logprobs=logs(count),
        log_tail=logs(count),
        lse=random.normal(0, 30, (count, 2)).astype(np.float32),
    )


HEADERS = st.builds(
    make_header,
    st.lists(st.integers(0, 5), max_size=6).map(tuple),
    top_k=st.integers(0, 9),
    wire=st.sampled_from(["fp32", "fp16"]),
    listed=st.booleans(),
    request=st.text(max_size=20),
)


@given(HEADERS, st.integers(0, 9))
def test_what_is_encoded_is_decoded(header: WireHeader, seed: int) -> None:
    rows = make_rows(header, seed=seed)
    message = encode(header, rows)
    reply = decode(message, max_bytes=MAX_BYTES)
    assert reply.header == header
    if rows.topk_ids is None:
        assert reply.rows.topk_ids is None
    else:
        np.testing.assert_array_equal(reply.rows.topk_ids, rows.topk_ids)
    for name in NAMES[1:] if header.wire == "fp16" else NAMES:
        np.testing.assert_array_equal(getattr(reply.rows, name), getattr(rows, name))
    half = {"rtol": 2**-11, "atol": 2**-25}
    np.testing.assert_allclose(reply.rows.topk_logprobs, rows.topk_logprobs, **half)
    parts = list(reply.per_sequence())
    assert tuple(len(part.logprobs) for part in parts) == header.rows
    if parts:
        joined = np.concatenate([part.lse for part in parts])
        np.testing.assert_array_equal(joined, rows.lse)


@given(HEADERS, st.data())
def test_a_message_of_another_length_is_refused(header: WireHeader, data: st.DataObject) -> None:
    message = encode(header, make_rows(header))
    cut = message[: data.draw(st.integers(0, len(message) - 1))]
    for wrong in (cut, message + b"\0"):
        with pytest.raises(TeacherError):
            decode(wrong, max_bytes=MAX_BYTES)


@given(st.binary(max_size=200))
def test_bytes_of_anything_are_refused(data: bytes) -> None:
    for wrong in (data, MAGIC + data, MAGIC + len(data).to_bytes(4, "little") + data):
        with pytest.raises(TeacherError):
            decode(wrong, max_bytes=MAX_BYTES)


@settings(max_examples=300)
@given(st.integers(0, 400), st.integers(1, 255))
def test_a_changed_byte_is_never_a_crash(place: int, change: int) -> None:
    header = make_header()
    message = bytearray(encode(header, make_rows(header)))
    message[place % len(message)] ^= change
    try:
        reply = decode(bytes(message), max_bytes=MAX_BYTES)
    except TeacherError:
        return
    assert reply.rows.logprobs.shape == (sum(reply.header.rows),)


def test_a_message_over_the_limit_is_refused() -> None:
    header = make_header()
    message = encode(header, make_rows(header))
    assert decode(message, max_bytes=len(message))
    with pytest.raises(TeacherError, match="limit"):
        decode(message, max_bytes=len(message) - 1)


GOOD = {
    "request": "r",
    "model": "m",
    "wire": "fp32",
    "listed": True,
    "top_k": 0,
    "temperature": 1.0,
    "rows": [],
}


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        "[" * 50_000,
        json.dumps(GOOD | {"more": 1}),
        json.dumps(GOOD | {"top_k": -1}),
        json.dumps(GOOD | {"top_k": True}),
        json.dumps(GOOD | {"top_k": 1.0}),
        json.dumps(GOOD | {"top_k": 1 << 31}),
        json.dumps(GOOD | {"rows": [-1, 1]}),
        json.dumps(GOOD | {"rows": [1 << 40]}),
        json.dumps(GOOD | {"rows": None}),
        json.dumps(GOOD | {"rows": [[]]}),
        json.dumps(GOOD | {"wire": "fp8"}),
        json.dumps(GOOD | {"wire": ["fp32"]}),
        json.dumps(GOOD | {"listed": 1}),
        json.dumps(GOOD | {"request": None}),
        json.dumps(GOOD | {"temperature": 0.0}),
        json.dumps(GOOD | {"temperature": float("nan")}),
        json.dumps(GOOD | {"temperature": float("inf")}),
        json.dumps(GOOD | {"temperature": "1"}),
    ],
)
def test_a_wrong_header_is_refused(text: str) -> None:
    def message(header: str) -> bytes:
        data = header.encode() + b" " * (-(12 + len(header)) % 8)
        return MAGIC + len(data).to_bytes(4, "little") + data

    assert decode(message(json.dumps(GOOD)), max_bytes=MAX_BYTES).header.rows == ()
    with pytest.raises(TeacherError):
        decode(message(text), max_bytes=MAX_BYTES)


def test_rows_that_do_not_fit_their_header_are_not_sent() -> None:
    rows = make_rows(make_header((3,)))
    with pytest.raises(ValueError, match="bytes of rows"):
        encode(make_header((4,)), rows)


def test_an_endless_header_is_not_sent() -> None:
    with pytest.raises(ValueError, match="fewer sequences"):
        encode_header(make_header((0,) * 600_000))


def test_finite_values_stay_finite_in_half_precision() -> None:
    header = make_header((1,), top_k=3, wire="fp16")
    rows = make_rows(header)
    top = np.array([[-0.5, -1e6, -np.inf]], dtype=np.float32)
    rows = RawRows(
        topk_ids=rows.topk_ids,
        topk_logprobs=top,
        logprobs=rows.logprobs,
        log_tail=rows.log_tail,
        lse=rows.lse,
    )
    found = decode(encode(header, rows), max_bytes=MAX_BYTES).rows.topk_logprobs
    np.testing.assert_array_equal(found, [[-0.5, LOWEST_HALF, -np.inf]])


def test_arrays_lie_at_multiples_of_eight() -> None:
    for size in range(9):
        assert len(encode_header(make_header(request="x" * size))) % 8 == 0


def test_bytes_per_token_and_the_price_of_decoding() -> None:
    """2,048 positions at K = 64 against the JSON in which vLLM sends the same rows."""
    header = make_header((256,) * 8, top_k=64)
    rows = make_rows(header)
    message = encode(header, rows)
    assert len(message) <= 540 * 2048
    assert len(encode(make_header((256,) * 8, top_k=64, wire="fp16"), rows)) <= 410 * 2048
    assert rows.topk_ids is not None
    positions = [
        {
            str(token): {"logprob": float(logprob), "rank": rank, "decoded_token": " tok"}
            for rank, (token, logprob) in enumerate(zip(ids, logprobs, strict=True), start=1)
        }
        for ids, logprobs in zip(rows.topk_ids.tolist(), rows.topk_logprobs, strict=True)
    ]
    text = json.dumps(positions)

    def best(work: Callable[[], object], times: int) -> float:
        seconds = []
        for _ in range(times):
            started = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    json_seconds = best(lambda: json.loads(text), 3)
    seconds = best(lambda: decode(message, max_bytes=MAX_BYTES), 20)
    assert seconds <= 0.005 * json_seconds
