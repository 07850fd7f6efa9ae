"""Servers' JSON into entries, shape by shape."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from mopd.serving.reply import (
    AMBIGUOUS,
    UNKNOWN,
    Reply,
    decode_openai,
    decode_sglang,
    decode_vllm,
    token_names,
)
from mopd.serving.scoring import ScoredSequence


def vllm(*prompts: list[Any], **extra: Any) -> bytes:
    choices = [{"index": i, "prompt_logprobs": p, "text": ""} for i, p in enumerate(prompts)]
    return json.dumps({"model": "m", "choices": choices} | extra).encode()


def entry(logprob: float | None) -> dict[str, Any]:
    return {"logprob": logprob, "rank": 1, "decoded_token": '"\\{}'}


def rows(reply: Reply, prompt: int = 0) -> list[list[tuple[int, float]]]:
    said = reply.prompts[prompt]
    pairs = list(zip(said.ids.tolist(), said.logprobs.tolist(), strict=True))
    ends = np.cumsum(said.count).tolist()
    return [pairs[b - c : b] for b, c in zip(ends, said.count.tolist(), strict=True)]


def test_vllm_positions_keep_their_order_and_their_nulls() -> None:
    body = vllm(
        [None, {"7": entry(-1.5), "3": entry(-0.25)}, None], [None, {"5": entry(-2)}], usage={}
    )
    found = decode_vllm(body, 2)
    assert found.model == "m"
    assert rows(found) == [[], [(7, -1.5), (3, -0.25)], []]
    assert rows(found, 1) == [[], [(5, -2.0)]]
    assert found.prompts[0].echoed is None


def test_a_null_is_not_a_number_and_no_zero() -> None:
    (prompt,) = decode_vllm(vllm([None, {"7": entry(None), "3": entry(-1)}]), 1).prompts
    assert np.isnan(prompt.logprobs[0]) and prompt.logprobs[1] == -1.0


def test_choices_go_by_their_index() -> None:
    body = json.loads(vllm([None, {"1": entry(-1)}], [None, {"2": entry(-2)}]))
    body["choices"].reverse()
    assert rows(decode_vllm(json.dumps(body).encode(), 2), 1) == [[], [(2, -2.0)]]


def test_the_ids_that_the_server_read() -> None:
    choice = {"index": 0, "prompt_logprobs": [None], "prompt_token_ids": [4, 5]}
    (prompt,) = decode_vllm(json.dumps({"choices": [choice]}).encode(), 1).prompts
    assert prompt.echoed is not None and prompt.echoed.tolist() == [4, 5]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"{}",
        b"<html>",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"choices":' * 50_000,
        b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b',"choices":[]}',
        vllm([None])[:-3],
        vllm([None, {"7": entry(-1)}]).replace(b"-1", b"NaN"),
        vllm([None, {"7": entry(-1)}]).replace(b"-1", b"-Infinity"),
        vllm([None, {"7": entry(-1)}]).replace(b"-1", b'"-1"'),
        vllm([None, {"7": entry(-1)}]).replace(b'"7"', b'"seven"'),
        vllm([None, {"7": entry(-1)}]).replace(b'"7"', b'"' + b"9" * 400 + b'"'),
        vllm([None], [None]),
        vllm(),
        json.dumps({"choices": [{"index": 1, "prompt_logprobs": [None]}]}).encode(),
        json.dumps({"choices": [{"index": 0, "prompt_logprobs": None}]}).encode(),
    ],
)
def test_another_shape_is_refused(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode_vllm(body, 1)


def openai(tokens: list[str], values: list[Any], top: list[Any]) -> bytes:
    said = {"tokens": tokens, "token_logprobs": values, "top_logprobs": top, "text_offset": []}
    return json.dumps({"model": "m", "choices": [{"index": 0, "logprobs": said}]}).encode()


def test_openai_strings_are_tokens_by_their_bytes() -> None:
    names = token_names([b"a", b" b", b"c", b"c", "\u00e9".encode(), b"\xc3"])
    assert names["c"] == AMBIGUOUS and names["\ufffd"] == AMBIGUOUS and names["\u00e9"] == 4
    body = openai(
        ["a", " b", "c", "\u00e9"],
        [None, -3.0, -1.0, -0.5],
        [None, {"a": -0.5}, {"c": -1.0, "a": -2.0}, {"\ufffd": -1.0, "?": -2.0}],
    )
    found = decode_openai(body, 1, names=names)
    assert rows(found) == [
        [],
        [(0, -0.5), (1, -3.0)],
        [(AMBIGUOUS, -1.0), (0, -2.0)],
        [(AMBIGUOUS, -1.0), (UNKNOWN, -2.0), (4, -0.5)],
    ]
    echoed = found.prompts[0].echoed
    assert echoed is not None and echoed.tolist() == [0, 1, AMBIGUOUS, 4]


def test_openai_tokens_that_are_ids() -> None:
    body = openai(["token_id:9", "token_id:4"], [None, -1.0], [None, {"token_id:4": -1.0}])
    assert rows(decode_openai(body, 1, names={})) == [[], [(4, -1.0)]]
    bad = openai(["token_id:9", "token_id:-4"], [None, -1.0], [None, {"token_id:x": -1.0}])
    assert rows(decode_openai(bad, 1, names={}))[1][0][0] == UNKNOWN


def test_openai_lists_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="length"):
        decode_openai(openai(["a", "b"], [None], [None, {}]), 1, names={})


def whole_of(ids: list[int], start: int = 1) -> ScoredSequence:
    return ScoredSequence(ids=np.array(ids), start=start)


def test_sglang_triples() -> None:
    meta = {
        "input_token_logprobs": [[None, 5, None], [-3.0, 6, "x"], [-0.5, 7, None]],
        "input_top_logprobs": [None, [[-0.5, 8, None], [-1.0, 9, "y"]], [[-0.5, 7, None]]],
        "prompt_tokens": 3,
    }
    body = json.dumps({"text": "", "meta_info": meta}).encode()
    for whole in (body, b"[" + body + b"]"):
        found = decode_sglang(whole, [whole_of([5, 6, 7])])
        assert rows(found) == [[], [(8, -0.5), (9, -1.0), (6, -3.0)], [(7, -0.5)]]
        echoed = found.prompts[0].echoed
        assert echoed is not None and echoed.tolist() == [5, 6, 7]
    with pytest.raises(ValueError, match="2 sequences"):
        decode_sglang(body, [whole_of([5, 6, 7])] * 2)
