"""Families of broken replies. A fault writes to the socket what a sick server would send.

`CONTENT` edits the reply about one prompt, so that it can be broken every time it is asked for;
`WIRE` breaks the whole exchange. `ROWS_CONTENT` and `ROWS_WIRE` do so to messages of `mopd serve`.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from mopd.serving.wire import encode_header, encode_rows
from tests.helpers.stub_server import Fault, send, send_json
from tests.helpers.stub_shapes import Message

Choice = dict[str, Any]
Edit = Callable[[random.Random, Choice], None]


def lists(choice: Choice) -> list[dict[str, Any]]:
    """The positions behind the first."""
    return [position for position in choice["prompt_logprobs"] if position]


def some(rng: random.Random, choice: Choice) -> list[dict[str, Any]]:
    """A few positions, the last among them: it predicts the end of the answer."""
    found = lists(choice)
    return [*rng.sample(found, min(3, len(found))), found[-1]]


def put(rng: random.Random, choice: Choice, *values: Any) -> None:
    for position in some(rng, choice):
        position[rng.choice(list(position))]["logprob"] = rng.choice(values)


def not_a_number(rng: random.Random, choice: Choice) -> None:
    put(rng, choice, float("nan"), float("inf"), float("-inf"))


def null(rng: random.Random, choice: Choice) -> None:
    put(rng, choice, None)
    if rng.random() < 0.5:
        choice["prompt_logprobs"][-1] = None


def positive(rng: random.Random, choice: Choice) -> None:
    put(rng, choice, 0.5, 3.0, 700.0)


def clamped(rng: random.Random, choice: Choice) -> None:
    put(rng, choice, -9999.0, -9999, -1e30)


def huge(rng: random.Random, choice: Choice) -> None:
    put(rng, choice, 1e308, -1e308, 10**400, -(10**400))


def wrong_type(rng: random.Random, choice: Choice) -> None:
    put(rng, choice, "-1.0", [], {}, True)


def missing_position(rng: random.Random, choice: Choice) -> None:
    del choice["prompt_logprobs"][rng.randrange(1, len(choice["prompt_logprobs"]))]


def extra_position(rng: random.Random, choice: Choice) -> None:
    at = rng.randrange(len(choice["prompt_logprobs"]))
    choice["prompt_logprobs"].insert(at, choice["prompt_logprobs"][-1])


def shifted(rng: random.Random, choice: Choice) -> None:
    positions = lists(choice)
    choice["prompt_logprobs"] = [None, *positions[1:], positions[0]]
    if rng.random() < 0.5:
        choice["prompt_logprobs"] = [*positions, None]


def permuted(rng: random.Random, choice: Choice) -> None:
    positions = lists(choice)
    by = rng.randrange(1, len(positions))
    choice["prompt_logprobs"] = [None, *positions[by:], *positions[:by]]


def outside(rng: random.Random, choice: Choice) -> None:
    for position in some(rng, choice):
        key = rng.choice(list(position))
        new = rng.choice(("99999", "-7", "123456789012", str(10**30), "x", ""))
        position[new] = position.pop(key)


def fewer_or_more(rng: random.Random, choice: Choice) -> None:
    for position in some(rng, choice):
        if rng.random() < 0.5 and len(position) > 2:
            while len(position) > 7:
                position.pop(list(position)[-1])
        else:
            for extra in range(3):
                position[str(extra + 500)] = {"logprob": -20.0, "rank": 9, "decoded_token": "y"}


def over_one(rng: random.Random, choice: Choice) -> None:
    for position in some(rng, choice):
        for entry in position.values():
            entry["logprob"] = -rng.random()


def other_ids(rng: random.Random, choice: Choice) -> None:
    """Finite and well-formed, but of another request."""
    choice["prompt_token_ids"][rng.randrange(len(choice["prompt_token_ids"]))] += 1


CONTENT: dict[str, Edit] = {
    "not_a_number": not_a_number,
    "null": null,
    "positive": positive,
    "clamped": clamped,
    "huge": huge,
    "wrong_type": wrong_type,
    "missing_position": missing_position,
    "extra_position": extra_position,
    "shifted": shifted,
    "permuted": permuted,
    "outside": outside,
    "fewer_or_more": fewer_or_more,
    "over_one": over_one,
    "other_ids": other_ids,
}


def edited(rng: random.Random, edit: Edit, prompt: list[int]) -> Fault:
    """The reply, with the choice about ``prompt`` broken."""

    async def write(writer: asyncio.StreamWriter, reply: dict[str, Any]) -> bool:
        for choice in reply["choices"]:
            if choice["prompt_token_ids"] == prompt:
                edit(rng, choice)
        await send_json(writer, reply)
        return True

    return write


def batch(rng: random.Random) -> Fault:
    async def write(writer: asyncio.StreamWriter, reply: dict[str, Any]) -> bool:
        choices = reply["choices"]
        kind = rng.randrange(4)
        if kind == 0:
            choices.pop()
        elif kind == 1:
            choices.append(choices[-1])
        elif kind == 2:
            choices[0]["index"] = choices[-1]["index"] + 1
        else:
            choices.clear()
        await send_json(writer, reply)
        return True

    return write


def broken_body(rng: random.Random) -> Fault:
    async def write(writer: asyncio.StreamWriter, reply: dict[str, Any]) -> bool:
        whole = json.dumps(reply).encode()
        body = rng.choice(
            [
                whole[: rng.randrange(len(whole))],
                b"",
                b"\xff\xfe" + whole,
                whole.replace(b'"rank"', b'"r\xff"', 1)[:-40],
                b"<html><body>502 Bad Gateway</body></html>",
                b"[" * 100_000,
                b'{"choices":' * 100_000,
                b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
                b"null",
                b"{}",
            ]
        )
        await send(writer, body)
        return True

    return write


def wrong_length(rng: random.Random) -> Fault:
    async def write(writer: asyncio.StreamWriter, reply: dict[str, Any]) -> bool:
        body = json.dumps(reply).encode()
        by = rng.choice((-len(body) // 2, -1, 1, 1000))
        await send(writer, body, headers={"Content-Length": str(len(body) + by)})
        return False

    return write


def reset(rng: random.Random) -> Fault:
    async def write(writer: asyncio.StreamWriter, reply: dict[str, Any]) -> bool:
        if rng.random() < 0.5:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"[: rng.randrange(40)])
            await writer.drain()
        writer.transport.abort()
        return False

    return write


def bomb(rng: random.Random) -> Fault:
    async def write(writer: asyncio.StreamWriter, reply: dict[str, Any]) -> bool:
        if rng.random() < 0.5:
            packed = gzip.compress(bytes(50_000_000))
            await send(writer, packed, headers={"Content-Encoding": "gzip"})
            return True
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(400):
            writer.write(b"10000\r\n" + b" " * 65536 + b"\r\n")
            await writer.drain()
        return False

    return write


def status(rng: random.Random) -> Fault:
    code = rng.choice((201, 202, 429, 500, 502, 503, 504))

    async def write(writer: asyncio.StreamWriter, reply: dict[str, Any]) -> bool:
        await send(writer, b"{}\x1b[31m", status=code)
        return True

    return write


def other_model(rng: random.Random) -> Fault:
    async def write(writer: asyncio.StreamWriter, reply: dict[str, Any]) -> bool:
        await send_json(writer, reply | {"model": rng.choice(("other", "", "stub2"))})
        return True

    return write


WIRE: dict[str, Callable[[random.Random], Fault]] = {
    "batch": batch,
    "broken_body": broken_body,
    "wrong_length": wrong_length,
    "reset": reset,
    "bomb": bomb,
    "status": status,
    "other_model": other_model,
}


Bend = Callable[[random.Random, Message], bytes]  # the body that is sent instead


def array(rng: random.Random, message: Message, name: str, value: Any) -> bytes:
    """One number of an array is another."""
    changed = getattr(message.rows, name).copy()
    changed.reshape(-1)[rng.randrange(changed.size)] = value
    return replace(message, rows=replace(message.rows, **{name: changed})).encoded()


def rows_truncated(rng: random.Random, message: Message) -> bytes:
    whole = message.encoded()
    return whole[: rng.randrange(len(whole))]


def rows_too_long(rng: random.Random, message: Message) -> bytes:
    return message.encoded() + bytes(rng.choice((1, 4, 8, 528, 1 << 22)))


def rows_wrong_header(rng: random.Random, message: Message) -> bytes:
    whole = bytearray(message.encoded())
    kind = rng.randrange(4)
    if kind == 0:
        whole[rng.randrange(8)] ^= 1 << rng.randrange(8)
    elif kind == 1:
        whole[8:12] = rng.choice((0, 1 << 10, (1 << 32) - 1)).to_bytes(4, "little")
    elif kind == 2:
        whole[12 + rng.randrange(40)] = rng.choice(b'"{}[],:9x\x00\xff')
    else:
        fields = {"top_k": message.header.top_k + 1, "wire": "fp16", "temperature": 3.0}
        name = rng.choice(list(fields))
        header = replace(message.header, **{name: fields[name]})
        return encode_header(header) + encode_rows(message.rows, wire="fp32")
    return bytes(whole)


def rows_of_another_request(rng: random.Random, message: Message) -> bytes:
    """Finite and well-formed, and late."""
    header = replace(message.header, request=f"{rng.getrandbits(128):032x}")
    return replace(message, header=header).encoded()


def rows_of_another_model(rng: random.Random, message: Message) -> bytes:
    header = replace(message.header, model=rng.choice(("", "other", "0" * 64)))
    return replace(message, header=header).encoded()


def rows_of_other_counts(rng: random.Random, message: Message) -> bytes:
    """As many rows, cut elsewhere."""
    counts = list(message.header.rows)
    counts[0], counts[-1] = counts[0] - 1, counts[-1] + 1
    if len(counts) == 1 or counts[0] < 0:
        counts = [*message.header.rows, 0]
    return replace(message, header=replace(message.header, rows=tuple(counts))).encoded()


ROWS_WIRE: dict[str, Bend] = {
    "truncated": rows_truncated,
    "too_long": rows_too_long,
    "wrong_header": rows_wrong_header,
    "another_request": rows_of_another_request,
    "another_model": rows_of_another_model,
    "other_counts": rows_of_other_counts,
}


def rows_not_a_number(rng: random.Random, message: Message) -> bytes:
    name = rng.choice(("topk_logprobs", "logprobs", "log_tail", "lse"))
    return array(rng, message, name, rng.choice((float("nan"), float("inf"))))


def rows_clamped(rng: random.Random, message: Message) -> bytes:
    name = rng.choice(("topk_logprobs", "logprobs"))
    return array(rng, message, name, rng.choice((-9999.0, -1e30, float("-inf"))))


def rows_outside(rng: random.Random, message: Message) -> bytes:
    return array(rng, message, "topk_ids", rng.choice((-1, 99999, 2**31 - 1, -(2**31))))


def rows_duplicated(rng: random.Random, message: Message) -> bytes:
    assert message.rows.topk_ids is not None
    changed = message.rows.topk_ids.copy()
    row = rng.randrange(len(changed))
    one, two = rng.sample(range(changed.shape[1]), 2)
    changed[row, one] = changed[row, two]
    return replace(message, rows=replace(message.rows, topk_ids=changed)).encoded()


def rows_mass(rng: random.Random, message: Message) -> bytes:
    rows, by = message.rows, rng.choice((0.05, 0.5, 3.0, -0.05, -0.5))
    name = rng.choice(("topk_logprobs", "log_tail"))
    row = rng.randrange(len(rows.logprobs))
    changed = getattr(rows, name).copy()
    changed[row] += by if name == "topk_logprobs" else 4 * abs(by)
    return replace(message, rows=replace(rows, **{name: changed})).encoded()


def rows_shifted(rng: random.Random, message: Message) -> bytes:
    """Each row says what its neighbour should, but for the actual tokens' log-probabilities."""
    rows, by = message.rows, rng.choice((-1, 1))
    assert rows.topk_ids is not None
    ids, logprobs = np.roll(rows.topk_ids, by, axis=0), np.roll(rows.topk_logprobs, by, axis=0)
    return replace(message, rows=replace(rows, topk_ids=ids, topk_logprobs=logprobs)).encoded()


def rows_lse(rng: random.Random, message: Message) -> bytes:
    row = rng.randrange(len(message.rows.logprobs))
    changed = message.rows.lse.copy()
    changed[row, rng.randrange(2)] += rng.choice((-5.0, 20.0, 1e30))
    return replace(message, rows=replace(message.rows, lse=changed)).encoded()


ROWS_CONTENT: dict[str, Bend] = {
    "not_a_number": rows_not_a_number,
    "clamped": rows_clamped,
    "outside": rows_outside,
    "duplicated": rows_duplicated,
    "mass": rows_mass,
    "shifted": rows_shifted,
    "lse": rows_lse,
}


def bent(rng: random.Random, bend: Bend) -> Fault:
    """The message, bent on its way."""

    async def write(writer: asyncio.StreamWriter, message: Any) -> bool:
        await send(writer, bend(rng, message))
        return True

    return write
