"""How each kind of server is asked for scores, and how its replies are read.

One object per shape on the wire; connections, retries and probes are `serving.endpoint`'s.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import msgspec

from mopd.errors import TeacherError
from mopd.serving.http import RefusedError
from mopd.serving.reply import (
    ArrayRows,
    Reply,
    decode_generate,
    decode_openai,
    decode_sglang,
    decode_trl,
    decode_vllm,
)
from mopd.serving.scoring import MODEL_PATH, SCORE_PATH, ScoredSequence, ScoreRequest
from mopd.serving.wire import Wire, WireHeader, decode

ENTRY_BYTES = 512  # of one listed token in JSON, at most: vLLM writes about 80
SMALL_REPLY = 1 << 20

Get = Callable[[str], Awaitable[bytes]]  # path -> body of a 200 reply


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """Rows that are wanted: of each sequence those that predict ``ids[start:]``.

    Args:
        request: any name, for servers that echo it.
        top_k: None asks for the whole vocabulary.
        temperature: `mopd`'s second log-sum-exp; the others must ignore it.
    """

    request: str
    model: str
    sequences: tuple[ScoredSequence, ...]
    top_k: int | None
    temperature: float

    def ids(self) -> list[list[int]]:
        return [sequence.ids.tolist() for sequence in self.sequences]

    def starts(self) -> list[int]:
        return [sequence.start for sequence in self.sequences]

    @property
    def listed(self) -> int:
        """Top-k, for servers that send lists alone."""
        if self.top_k is None:
            raise ValueError("only type=mopd sends whole rows")
        return self.top_k


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A model that a server names. ``max_length``: tokens of a sequence, where it tells that."""

    name: str
    max_length: int | None = None


class ServerProtocol(Protocol):
    """What `Endpoint` needs of a shape on the wire."""

    path: ClassVar[str]  # of the POST that scores
    single: ClassVar[bool]  # a request holds one sequence
    chats: ClassVar[bool]  # has vLLM's /tokenize
    sends_lse: ClassVar[bool]  # whole rows and temperatures, too
    is_identity: ClassVar[bool]  # the model's name is a fingerprint of its weights

    async def models(self, get: Get) -> list[Served]:
        """What is served, once the server is healthy; ValueError: not this kind of server."""
        ...

    def entries(self, sequence: ScoredSequence, k: int | None) -> int:
        """Listed tokens in the reply about ``sequence``."""
        ...

    def body(self, query: Query) -> bytes: ...

    def max_bytes(self, query: Query) -> int:
        """No reply to ``query`` is larger."""
        ...

    def read(self, body: bytes, query: Query) -> Reply:
        """Raises ValueError where the reply is not one to this query."""
        ...


class _Model(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


class _ModelInfo(msgspec.Struct):
    model_path: str


class _MopdModel(msgspec.Struct):
    model: str
    vocab_size: int
    max_length: int


async def _listed_models(get: Get) -> list[Served]:
    models = _read(await get("/v1/models"), _Models).data
    # one token more is always written behind the prompt
    return [
        Served(name=m.id, max_length=None if m.max_model_len is None else m.max_model_len - 1)
        for m in models
    ]


class _Lists:
    """Servers that list all positions of a prompt in JSON."""

    single: ClassVar[bool] = False
    chats: ClassVar[bool] = False
    sends_lse: ClassVar[bool] = False
    is_identity: ClassVar[bool] = False

    def entries(self, sequence: ScoredSequence, k: int | None) -> int:
        return len(sequence.ids) * ((k or 0) + 1)

    def max_bytes(self, query: Query) -> int:
        total = sum(self.entries(sequence, query.top_k) for sequence in query.sequences)
        return SMALL_REPLY + ENTRY_BYTES * total


class VllmCompletions(_Lists):
    """vLLM's ``/v1/completions`` with ``prompt_logprobs``; decoding every token costs it time."""

    path: ClassVar[str] = "/v1/completions"
    chats: ClassVar[bool] = True

    async def models(self, get: Get) -> list[Served]:
        await get("/health")
        return await _listed_models(get)

    def body(self, query: Query) -> bytes:
        return msgspec.json.encode(
            {
                "model": query.model,
                "prompt": query.ids(),
                "temperature": query.temperature,
                "max_tokens": 1,
                "prompt_logprobs": query.listed,
                "add_special_tokens": False,
                "return_token_ids": True,
            }
        )

    def read(self, body: bytes, query: Query) -> Reply:
        return decode_vllm(body, len(query.sequences))


class VllmGenerate(VllmCompletions):
    """vLLM's ``/inference/v1/generate``: ids in, ids out, started with ``--enable-scale-out``."""

    path: ClassVar[str] = "/inference/v1/generate"
    single: ClassVar[bool] = True

    def body(self, query: Query) -> bytes:
        (ids,) = query.ids()
        params = {
            "max_tokens": 1,
            "prompt_logprobs": query.listed,
            "temperature": query.temperature,
            "detokenize": False,
        }
        asked = {"token_ids": ids, "sampling_params": params, "model": query.model}
        return msgspec.json.encode(asked | {"return_token_ids": True})

    def read(self, body: bytes, query: Query) -> Reply:
        return decode_generate(body)


@dataclass(frozen=True)
class OpenAiEcho(_Lists):
    """``/v1/completions`` with ``echo``. ``names``: string -> id (`reply.token_names`)."""

    names: Mapping[str, int]
    path: ClassVar[str] = "/v1/completions"

    async def models(self, get: Get) -> list[Served]:
        return await _listed_models(get)

    def body(self, query: Query) -> bytes:
        return msgspec.json.encode(
            {
                "model": query.model,
                "prompt": query.ids(),
                "temperature": query.temperature,
                "max_tokens": 0,
                "echo": True,
                "logprobs": query.listed,
                "return_tokens_as_token_ids": True,  # vLLM's: names that are never ambiguous
            }
        )

    def read(self, body: bytes, query: Query) -> Reply:
        return decode_openai(body, len(query.sequences), names=self.names)


class Sglang(_Lists):
    """SGLang's ``/generate``; its replies name no model."""

    path: ClassVar[str] = "/generate"

    async def models(self, get: Get) -> list[Served]:
        await get("/health")
        try:
            return await _listed_models(get)
        except RefusedError:  # an older one
            return [Served(name=_read(await get("/get_model_info"), _ModelInfo).model_path)]

    def entries(self, sequence: ScoredSequence, k: int | None) -> int:
        return (len(sequence.ids) - sequence.start + 1) * ((k or 0) + 1)

    def body(self, query: Query) -> bytes:
        params = {"max_new_tokens": 0, "temperature": query.temperature}
        return msgspec.json.encode(
            {
                "input_ids": query.ids(),
                "sampling_params": params,
                "return_logprob": True,
                # the first position of the reply is always null
                "logprob_start_len": [start - 1 for start in query.starts()],
                "top_logprobs_num": query.listed,
                "return_text_in_logprobs": False,
            }
        )

    def read(self, body: bytes, query: Query) -> Reply:
        return decode_sglang(body, query.sequences)


class Trl(_Lists):
    """``trl vllm-serve``: arrays in base64. It names neither a model nor its limit."""

    path: ClassVar[str] = "/get_sequence_logprobs/"

    async def models(self, get: Get) -> list[Served]:
        await get("/health/")
        return [Served(name="trl")]

    def entries(self, sequence: ScoredSequence, k: int | None) -> int:
        return (len(sequence.ids) - sequence.start) * ((k or 0) + 1)

    def body(self, query: Query) -> bytes:
        return msgspec.json.encode(
            {
                "sequences": query.ids(),
                "prompt_lengths": query.starts(),
                "top_logprobs": query.listed,
                "temperature": query.temperature,
                "response_format": "binary",
            }
        )

    def max_bytes(self, query: Query) -> int:
        longest = max(self.entries(sequence, query.top_k) for sequence in query.sequences)
        # a value and an id, 4 bytes each, in base64; short sequences are padded
        return SMALL_REPLY + 11 * longest * len(query.sequences)

    def read(self, body: bytes, query: Query) -> Reply:
        return decode_trl(body, query.sequences, k=query.listed)


@dataclass(frozen=True)
class MopdRows:
    """`mopd serve`: arrays, log-sum-exps, whole rows; the model's name is its fingerprint."""

    vocab_size: int  # of the tokenizer
    wire: Wire = "fp32"
    path: ClassVar[str] = SCORE_PATH
    single: ClassVar[bool] = False
    chats: ClassVar[bool] = True
    sends_lse: ClassVar[bool] = True
    is_identity: ClassVar[bool] = True

    async def models(self, get: Get) -> list[Served]:
        found = _read(await get(MODEL_PATH), _MopdModel)
        if found.vocab_size < self.vocab_size:
            raise ValueError(
                f"its model has {found.vocab_size} columns and the tokenizer {self.vocab_size} "
                "tokens; name the tokenizer of its model"
            )
        return [Served(name=found.model, max_length=found.max_length)]

    def entries(self, sequence: ScoredSequence, k: int | None) -> int:
        return (len(sequence.ids) - sequence.start) * (self.vocab_size if k is None else k)

    def body(self, query: Query) -> bytes:
        sequences = [{"ids": s.ids.tolist(), "start": s.start} for s in query.sequences]
        asked: dict[str, Any] = {"request": query.request, "sequences": sequences}
        asked |= {"top_k": query.top_k, "temperature": query.temperature}
        return msgspec.json.encode(asked | {"vocab_size": self.vocab_size, "wire": self.wire})

    def max_bytes(self, query: Query) -> int:
        return SMALL_REPLY + self._header(query).body_bytes()

    def read(self, body: bytes, query: Query) -> Reply:
        try:
            reply = decode(body, max_bytes=self.max_bytes(query))
        except TeacherError as error:
            raise ValueError(str(error)) from error
        wanted = self._header(query)
        for name in ("request", "wire", "listed", "top_k", "temperature", "rows"):
            if getattr(reply.header, name) != getattr(wanted, name):
                raise ValueError(f"a header whose {name} is not what was asked for")
        error = 2.0**-11 if self.wire == "fp16" else 0.0
        prompts = [
            ArrayRows(rows=rows, temperature=query.temperature, error=error)
            for rows in reply.per_sequence()
        ]
        return Reply(model=reply.header.model, prompts=prompts)

    def _header(self, query: Query) -> WireHeader:
        """Of the reply that is expected, but for the model."""
        k = query.top_k
        return ScoreRequest(
            request=query.request,
            sequences=query.sequences,
            top_k=None if k is None else min(k, self.vocab_size),
            temperature=query.temperature,
            vocab_size=self.vocab_size,
            wire=self.wire,
        ).header(model="")


def _read(body: bytes, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise ValueError(f"no list of models ({error})") from error
