"""What each kind of server is asked, what its replies may be, and which path is taken."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mopd.serving.protocols import (
    MopdRows,
    OpenAiEcho,
    Query,
    ServerProtocol,
    Sglang,
    Trl,
    VllmCompletions,
    VllmGenerate,
)
from mopd.serving.reply import UNKNOWN, ArrayRows, Entries
from mopd.serving.scoring import ScoredSequence, ScoreLimits, read_request
from mopd.serving.wire import RawRows, encode
from tests.helpers.stub_scorers import PrefixScorer
from tests.helpers.stub_server import StubOptions, StubServer
from tests.helpers.stub_shapes import Asked, Said, trl

V, K = 40, 5
SEQUENCES = tuple(
    ScoredSequence(ids=np.array(ids), start=start)
    for ids, start in (([3, 39, 5, 1, 7], 3), ([9, 9], 1), ([1, 2, 3, 4, 5, 39], 2))
)
LISTS: tuple[ServerProtocol, ...] = (
    VllmCompletions(),
    VllmGenerate(),
    OpenAiEcho({}),
    Sglang(),
    Trl(),
)


def query(protocol: ServerProtocol, *, top_k: int | None = K, temperature: float = 1.0) -> Query:
    sequences = SEQUENCES[:1] if protocol.single else SEQUENCES
    return Query(
        request="r-1", model="stub", sequences=sequences, top_k=top_k, temperature=temperature
    )


@pytest.fixture(scope="module")
def stub() -> Iterator[StubServer]:
    with StubServer(PrefixScorer(V), StubOptions()) as server:
        yield server


@pytest.mark.parametrize("protocol", LISTS, ids=lambda p: type(p).__name__)
def test_lists_cover_what_was_asked_for(protocol: ServerProtocol, stub: StubServer) -> None:
    """Every shape tells the same numbers, from the start of each sequence on."""
    asked = query(protocol)
    reply = json.dumps(stub._reply(protocol.path, json.loads(protocol.body(asked)))).encode()
    assert len(reply) <= protocol.max_bytes(asked)
    found = protocol.read(reply, asked)
    assert len(found.prompts) == len(asked.sequences)
    for sequence, entries in zip(asked.sequences, found.prompts, strict=True):
        assert isinstance(entries, Entries)
        assert len(entries.count) == len(sequence.ids)
        rows = PrefixScorer(V)(sequence.ids.tolist())
        ends = np.cumsum(entries.count)
        for t in range(sequence.start, len(sequence.ids)):
            part = slice(ends[t] - entries.count[t], ends[t])
            listed = dict(zip(entries.ids[part].tolist(), entries.logprobs[part], strict=True))
            row = rows[t - 1]
            wanted = {*np.argsort(-row, kind="stable")[:K].tolist(), int(sequence.ids[t])}
            assert set(listed) == wanted
            for index, value in listed.items():
                assert value == pytest.approx(row[index], abs=1e-5)
        assert entries.echoed is not None
        known = entries.echoed >= 0
        assert (entries.echoed[known] == sequence.ids[known]).all()


@pytest.mark.parametrize("protocol", LISTS, ids=lambda p: type(p).__name__)
def test_lists_have_no_whole_rows(protocol: ServerProtocol) -> None:
    with pytest.raises(ValueError, match="type=mopd"):
        protocol.body(query(protocol, top_k=None))


def test_sglang_hides_the_last_id_of_the_vocabulary(stub: StubServer) -> None:
    protocol = Sglang()
    asked = query(protocol)
    reply = json.dumps(stub._reply(protocol.path, json.loads(protocol.body(asked)))).encode()
    last = protocol.read(reply, asked).prompts[2]
    assert isinstance(last, Entries) and last.echoed is not None
    assert last.echoed.tolist()[-2:] == [5, UNKNOWN]
    assert 39 in last.ids[-(K + 1) :]


def test_sglang_replies_of_another_length_are_refused(stub: StubServer) -> None:
    protocol = Sglang()
    asked = query(protocol)
    reply = stub._reply(protocol.path, json.loads(protocol.body(asked)))
    reply[0]["meta_info"]["input_top_logprobs"].pop()
    with pytest.raises(ValueError, match="3 tokens and 2 lists for 3"):
        protocol.read(json.dumps(reply).encode(), asked)
    with pytest.raises(ValueError, match="2 replies for 3"):
        protocol.read(json.dumps(reply[:2]).encode(), asked)


def trl_reply(asked: Query) -> dict[str, Any]:
    said = [Said(ids=ids, rows=PrefixScorer(V)(ids)) for ids in asked.ids()]
    return trl(said, Asked.of(Trl.path, json.loads(Trl().body(asked))))


def test_trl_gaps_are_no_values() -> None:
    """What it does not know is -inf with id 0, and neither is believed."""
    asked = query(Trl())
    reply = trl_reply(asked)
    actual = np.frombuffer(base64.b64decode(reply["actual_logprobs_b64"]), "<f4").copy()
    ids = np.frombuffer(base64.b64decode(reply["actual_token_ids_b64"]), "<i4").copy()
    actual[0], ids[0] = -np.inf, 0
    reply["actual_logprobs_b64"] = base64.b64encode(actual.tobytes()).decode()
    reply["actual_token_ids_b64"] = base64.b64encode(ids.tobytes()).decode()
    first = Trl().read(json.dumps(reply).encode(), asked).prompts[0]
    assert isinstance(first, Entries) and first.echoed is not None
    assert first.echoed.tolist() == [UNKNOWN] * 4 + [7]
    assert np.isneginf(first.logprobs[: first.count[3]]).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [3, 4, 6]}, "shape"),
        ({"shape": [2, 4, 5]}, "shape"),
        ({"completion_lengths": [2, 1, 3]}, "lengths"),
        ({"logprobs_b64": "AAAA"}, "bytes"),
        ({"token_ids_b64": "no base64!"}, "base64"),
        ({"actual_logprobs_b64": ""}, "bytes"),
        ({"logprobs_b64": None}, "bytes"),
        ({"shape": [3, 4]}, "shape|length"),
    ],
)
def test_trl_arrays_of_other_sizes_are_refused(changes: dict[str, Any], message: str) -> None:
    asked = query(Trl())
    with pytest.raises(ValueError, match=message):
        Trl().read(json.dumps(trl_reply(asked) | changes).encode(), asked)


def test_generate_without_prompt_logprobs_is_refused() -> None:
    asked = query(VllmGenerate())
    for body in ({"choices": []}, {"prompt_logprobs": None}, {"prompt_logprobs": 3}):
        with pytest.raises(ValueError):
            VllmGenerate().read(json.dumps(body).encode(), asked)


def mopd_reply(protocol: MopdRows, asked: Query, **header: Any) -> bytes:
    """The answer of a server to ``asked``, with a header that says something else."""
    limits = ScoreLimits(vocab_size=V, max_length=100)
    request = read_request(protocol.body(asked), limits=limits)
    said = request.header(model="f")
    fields = {name: getattr(said, name) for name in said.__dataclass_fields__} | header
    claimed = type(said)(**fields)
    count, width = sum(claimed.rows), claimed.top_k
    rows = RawRows(
        topk_ids=np.tile(np.arange(width, dtype=np.int32), (count, 1)) if claimed.listed else None,
        topk_logprobs=np.full((count, width), -9.0, dtype=np.float32),
        logprobs=np.full(count, -9.0, dtype=np.float32),
        log_tail=np.zeros(count, dtype=np.float32),
        lse=np.zeros((count, 2), dtype=np.float32),
    )
    return encode(claimed, rows)


@pytest.mark.parametrize("top_k", [K, V, 10**6, None])
@pytest.mark.parametrize("wire", ["fp32", "fp16"])
def test_mopd_asks_and_reads(top_k: int | None, wire: Any) -> None:
    protocol = MopdRows(vocab_size=V, wire=wire)
    asked = query(protocol, top_k=top_k, temperature=2.0)
    body = mopd_reply(protocol, asked)
    assert len(body) <= protocol.max_bytes(asked)
    reply = protocol.read(body, asked)
    assert reply.model == "f"
    for sequence, found in zip(SEQUENCES, reply.prompts, strict=True):
        assert isinstance(found, ArrayRows) and found.temperature == 2.0
        assert len(found.rows.logprobs) == len(sequence.ids) - sequence.start
        assert found.error == (2.0**-11 if wire == "fp16" else 0.0)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"request": "r-0"}, "request"),
        ({"wire": "fp16"}, "wire"),
        ({"listed": False}, "listed"),
        ({"top_k": K + 1}, "top_k"),
        ({"temperature": 2.0}, "temperature"),
        ({"rows": (2, 1, 3)}, "rows"),
        ({"rows": (2, 1)}, "rows"),
        ({"rows": (1, 2, 4)}, "rows"),
    ],
)
def test_mopd_replies_to_another_question_are_refused(header: dict[str, Any], message: str) -> None:
    protocol = MopdRows(vocab_size=V)
    asked = query(protocol)
    with pytest.raises(ValueError, match=f"whose {message} is not"):
        protocol.read(mopd_reply(protocol, asked, **header), asked)


def test_mopd_replies_have_a_limit() -> None:
    protocol = MopdRows(vocab_size=V)
    asked = query(protocol)
    huge = mopd_reply(protocol, asked, rows=(1 << 15, 1, 4), top_k=K)
    with pytest.raises(ValueError, match="over the limit"):
        protocol.read(huge, asked)
    with pytest.raises(ValueError, match="wire format"):
        protocol.read(b"{}", asked)


def test_entries_are_counted_as_they_are_sent() -> None:
    (sequence, *_) = SEQUENCES  # 5 tokens, 2 of them behind the start
    assert VllmCompletions().entries(sequence, K) == 5 * (K + 1)
    assert Sglang().entries(sequence, K) == 3 * (K + 1)
    assert Trl().entries(sequence, K) == 2 * (K + 1)
    assert MopdRows(vocab_size=V).entries(sequence, K) == 2 * K
    assert MopdRows(vocab_size=V).entries(sequence, None) == 2 * V
