"""What samplers ask and engines answer: whatever is not exactly that is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from mopd.serving.sampling import (
    Broadcast,
    Sampled,
    SampleOptions,
    SampleRequest,
    SampleTask,
    Update,
    decode_answer,
    encode_answer,
    encode_request,
    encode_update,
    read_sample_request,
    read_update,
)
from mopd.serving.scoring import RequestError

VERSION = "0123456789/4"
OPTIONS = SampleOptions(max_tokens=4, temperature=0.7, vocab_size=50, eos_id=2, stop_ids=(7, 8))
REQUEST = SampleRequest(
    version=VERSION,
    options=OPTIONS,
    tasks=(SampleTask(ids=[5, 6], seed=9), SampleTask(ids=[5], seed=0)),
)
CHANNEL = Broadcast(
    host="127.0.0.1",
    port=4000,
    first_rank=1,
    world_size=2,
    backend="gloo",
    tensors=(("a", "bfloat16", (2, 3)),),
)


def read(**changes: Any) -> SampleRequest:
    fields = json.loads(encode_request(REQUEST)) | changes
    return read_sample_request(json.dumps(fields).encode(), columns=60, max_length=20)


def test_a_request_survives_the_way() -> None:
    assert read() == REQUEST
    assert read(temperature=0).options.temperature == 0.0


@pytest.mark.parametrize(
    "changes",
    [
        {"version": "../x/1"},
        {"version": None},
        {"max_tokens": 0},
        {"max_tokens": 20},
        {"temperature": 0.001},
        {"temperature": "1"},
        {"temperature": float("nan")},
        {"vocab_size": 61},
        {"eos_id": 50},
        {"eos_id": True},
        {"stop_ids": [50]},
        {"stop_ids": [1] * 65},
        {"sequences": []},
        {"sequences": [{"ids": [5], "seed": -1}]},
        {"sequences": [{"ids": [5], "seed": 1 << 63}]},
        {"sequences": [{"ids": [50], "seed": 1}]},
        {"sequences": [{"ids": [-1], "seed": 1}]},
        {"sequences": [{"ids": [], "seed": 1}]},
        {"sequences": [{"ids": [5] * 17, "seed": 1}]},
        {"sequences": [{"ids": [5]}]},
        {"more": 1},
    ],
)
def test_a_request_that_is_none_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        read(**changes)


def test_a_body_that_is_no_json_is_refused() -> None:
    for body in (b"", b"[", b"[]", b"[" * 100_000):
        with pytest.raises(RequestError):
            read_sample_request(body, columns=60, max_length=20)


def sampled(ids: list[int], end: Any) -> Sampled:
    logprobs = np.full(len(ids), -1.5, dtype=np.float32)
    return Sampled(ids=np.array(ids, dtype=np.int32), logprobs=logprobs, end=end)


GOOD = [sampled([5, 2], "eos"), sampled([5, 6, 9, 8], "stop")]


def test_answers_survive_the_way() -> None:
    version, answers = decode_answer(encode_answer(VERSION, GOOD), REQUEST)
    assert version == VERSION
    for answer, good in zip(answers, GOOD, strict=True):
        assert answer.end == good.end
        assert answer.ids.tolist() == good.ids.tolist() and answer.ids.dtype == np.int32
        assert np.array_equal(answer.logprobs, good.logprobs)
    assert decode_answer(encode_answer(VERSION, [sampled([5] * 4, "length")] * 2), REQUEST)[1]


def test_answers_of_another_version_are_not_even_read() -> None:
    assert encode_answer(None, GOOD) == b'{"version":null,"answers":[]}'
    assert decode_answer(encode_answer(None, GOOD), REQUEST) == (None, [])
    other = "0123456789/5"
    assert decode_answer(encode_answer(other, GOOD), REQUEST) == (other, [])
    assert decode_answer(b'{"version":"evil words","answers":[]}', REQUEST) == (None, [])


@pytest.mark.parametrize(
    "change",
    [
        {"ids": [5, 50]},
        {"ids": [-1, 2]},
        {"ids": [5.0, 2]},
        {"ids": [], "logprobs": []},
        {"ids": [5] * 5, "logprobs": [-1.0] * 5, "end": "length"},
        {"logprobs": [-1.0]},
        {"logprobs": [-1.0, None]},
        {"logprobs": [-1.0, float("nan")]},
        {"logprobs": [-1.0, float("-inf")]},
        {"logprobs": [-1.0, 0.5]},
        {"logprobs": [-1.0, -(10**400)]},
        {"logprobs": [-1.0, -1e300]},  # infinite in float32
        {"ids": [2, 5]},  # goes on behind its end
        {"ids": [5, 6]},  # ends nowhere
        {"end": "stop"},
        {"end": "length"},
        {"more": 1},
    ],
)
def test_an_answer_that_is_none_is_refused(change: dict[str, Any]) -> None:
    fields = json.loads(encode_answer(VERSION, GOOD))
    fields["answers"][0] |= change
    with pytest.raises(ValueError):
        decode_answer(json.dumps(fields).encode(), REQUEST)


def test_an_answer_too_few_is_refused() -> None:
    with pytest.raises(ValueError, match="2 answers were asked for"):
        decode_answer(encode_answer(VERSION, GOOD[:1]), REQUEST)


@pytest.mark.parametrize("way", [{"path": "/weights/1"}, {"broadcast": CHANNEL}])
def test_an_update_survives_the_way(way: dict[str, Any]) -> None:
    update = Update(version=VERSION, vocab_size=50, deadline_s=30.0, **way)
    assert read_update(encode_update(update), columns=60) == update


@pytest.mark.parametrize(
    "change",
    [
        {"path": "/weights/1"},  # both ways
        {"broadcast": None},  # none
        {"version": "x"},
        {"vocab_size": 61},
        {"deadline_s": 0},
        {"deadline_s": 1e9},
        {"broadcast": {"host": "127.0.0.1"}},
    ],
)
def test_an_update_that_is_none_is_refused(change: dict[str, Any]) -> None:
    update = Update(version=VERSION, vocab_size=50, deadline_s=30.0, broadcast=CHANNEL)
    fields = json.loads(encode_update(update)) | change
    with pytest.raises(RequestError):
        read_update(json.dumps(fields).encode(), columns=60)


@pytest.mark.parametrize(
    "change",
    [
        {"port": 0},
        {"first_rank": 0},
        {"world_size": 1},
        {"backend": "mpi"},
        {"tensors": [["a", "int64", [2]]]},
        {"tensors": [["a", "float32", [0]]]},
        {"tensors": [["a", "float32"]]},
        {"host": 1},
    ],
)
def test_a_meeting_that_is_none_is_refused(change: dict[str, Any]) -> None:
    update = Update(version=VERSION, vocab_size=50, deadline_s=30.0, broadcast=CHANNEL)
    fields = json.loads(encode_update(update))
    fields["broadcast"] |= change
    with pytest.raises(RequestError):
        read_update(json.dumps(fields).encode(), columns=60)
