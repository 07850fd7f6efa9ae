"""What a scoring request may say, and to whom a server opens."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mopd.errors import ConfigError
from mopd.serving.scoring import (
    RequestError,
    ScoreLimits,
    ScoreRequest,
    check_exposure,
    is_authorised,
    read_request,
)

LIMITS = ScoreLimits(vocab_size=100, max_length=8, max_rows_bytes=5_000)
GOOD: dict[str, Any] = {
    "request": "r",
    "sequences": [{"ids": [1, 2, 99], "start": 1}, {"ids": [3], "start": 1}],
    "top_k": 4,
    "temperature": 2,
    "vocab_size": 100,
    "wire": "fp32",
}


def read(**changes: Any) -> ScoreRequest:
    return read_request(json.dumps(GOOD | changes).encode(), limits=LIMITS)


def test_a_good_request() -> None:
    request = read()
    assert request.row_counts() == (2, 0)
    assert request.sequences[0].ids.tolist() == [1, 2, 99]
    header = request.header(model="m")
    assert (header.rows, header.top_k, header.listed) == ((2, 0), 4, True)
    assert header.temperature == 2.0


def test_top_k_is_cut_to_the_vocabulary() -> None:
    assert read(top_k=1000, vocab_size=100).width == 100
    assert read(top_k=None).width == 100
    assert not read(top_k=None).header(model="m").listed


@pytest.mark.parametrize(
    "changes",
    [
        {"request": 1},
        {"request": "x" * 129},
        {"request": "\u00fc"},
        {"top_k": 0},
        {"top_k": True},
        {"top_k": 2.0},
        {"temperature": 0},
        {"temperature": True},
        {"temperature": "1"},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"vocab_size": 0},
        {"vocab_size": 101},
        {"wire": "fp8"},
        {"wire": ["fp32"]},
        {"more": 1},
        {"sequences": []},
        {"sequences": {}},
        {"sequences": [{"ids": [1], "start": 1}] * 513},
        {"sequences": [[1, 2]]},
        {"sequences": [{"ids": [1, 2]}]},
        {"sequences": [{"ids": [], "start": 1}]},
        {"sequences": [{"ids": [1] * 9, "start": 1}]},
        {"sequences": [{"ids": [1, -1], "start": 1}]},
        {"sequences": [{"ids": [1, 100], "start": 1}]},
        {"sequences": [{"ids": [1, True], "start": 1}]},
        {"sequences": [{"ids": [1, 2.0], "start": 1}]},
        {"sequences": [{"ids": [1, [2]], "start": 1}]},
        {"sequences": [{"ids": [1, 10**400], "start": 1}]},
        {"sequences": [{"ids": [1, 2], "start": 0}]},
        {"sequences": [{"ids": [1, 2], "start": 3}]},
        {"sequences": [{"ids": [1, 2], "start": True}]},
        {"vocab_size": 50},  # an id behind it
    ],
)
def test_a_wrong_request_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        read(**changes)
    assert caught.value.status == 400


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b"1" * 5000])
def test_a_body_that_is_no_request_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError):
        read_request(body, limits=LIMITS)


def test_an_answer_over_the_limit_is_refused() -> None:
    with pytest.raises(RequestError) as caught:
        read(top_k=None, sequences=[{"ids": [1] * 8, "start": 1}] * 2)
    assert caught.value.status == 413


@pytest.mark.parametrize(
    ("header", "token", "wanted"),
    [
        (None, None, True),
        ("Bearer x", None, True),
        (None, "secret", False),
        ("", "secret", False),
        ("secret", "secret", False),
        ("Bearer secret", "secret", True),
        ("Bearer secret ", "secret", False),
        ("Bearer secre", "secret", False),
        ("Bearer \u00fc", "secret", False),
        ("Bearer \udcff", "secret", False),
    ],
)
def test_authorisation(header: str | None, token: str | None, wanted: bool) -> None:
    assert is_authorised(header, token=token) is wanted


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9", "::1", "localhost"])
def test_loopback_needs_no_token(host: str) -> None:
    check_exposure(host, token=None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.1", "example.org", "localhost.me"])
def test_any_other_address_needs_one(host: str) -> None:
    with pytest.raises(ConfigError, match="not loopback"):
        check_exposure(host, token=None)
    with pytest.raises(ConfigError, match="16 characters"):
        check_exposure(host, token="short")
    check_exposure(host, token="x" * 16)
