"""What samplers ask an engine and what it answers, as JSON between trainer and server. No torch.

`POST /mopd/v1/sample` takes token ids and gives token ids: every sequence has its own seed, and the
whole answer one version. `POST /mopd/v1/logprobs` scores a text. `/mopd/v1/weights` tells (GET) and
changes (POST) the version.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mopd.serving.scoring import RequestError
from mopd.serving.versions import is_version

WEIGHTS_PATH = "/mopd/v1/weights"
SAMPLE_PATH = "/mopd/v1/sample"
LOGPROBS_PATH = "/mopd/v1/logprobs"
METHODS = {WEIGHTS_PATH: ("GET", "POST"), SAMPLE_PATH: ("POST",), LOGPROBS_PATH: ("POST",)}
PROCESSED = "processed_logprobs"  # vLLM's name for log-probabilities at the sampling temperature
MAX_SEQUENCES = 4096
MAX_STOPS = 64
MAX_DEADLINE_S = 3600.0
LOWEST = float(np.finfo(np.float32).min)

End = Literal["eos", "stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What an engine is, told before anything is asked of it."""

    version: str | None
    served_model: str
    vocab_size: int  # columns of its logits
    max_length: int  # tokens of prompt and answer together
    logprobs_mode: str
    workers: int  # processes that take part in a broadcast
    device: str  # type of the workers' device, as in "cuda"


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOptions:
    """How one batch is sampled. ``temperature`` 0 is greedy."""

    max_tokens: int
    temperature: float
    vocab_size: int  # of the tokenizer; columns behind it are never sampled
    eos_id: int
    stop_ids: tuple[int, ...] = ()  # end an answer as well


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleTask:
    """One answer to write."""

    ids: Sequence[int]  # of the prompt
    seed: int  # 0 <= seed < 2**63


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """Refused, with an answer of no sequences, by an engine that does not hold ``version``."""

    version: str
    options: SampleOptions
    tasks: tuple[SampleTask, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """One answer. ``ids`` hold the token that ended it unless ``end`` is length."""

    ids: np.ndarray  # [S] int32
    logprobs: np.ndarray  # [S] float32, at the sampling temperature
    end: End


def encode_request(request: SampleRequest) -> bytes:
    """The body of `SAMPLE_PATH`."""
    options = request.options
    return json.dumps(
        {
            "version": request.version,
            "max_tokens": options.max_tokens,
            "temperature": options.temperature,
            "vocab_size": options.vocab_size,
            "eos_id": options.eos_id,
            "stop_ids": list(options.stop_ids),
            "sequences": [{"ids": list(map(int, t.ids)), "seed": t.seed} for t in request.tasks],
        },
        separators=(",", ":"),
    ).encode()


def read_sample_request(body: bytes, *, columns: int, max_length: int) -> SampleRequest:
    """The request in ``body``.

    Raises:
        RequestError: malformed, or beyond an engine with so many ``columns`` and ``max_length``.
    """
    fields = read_object(
        body,
        {"version", "max_tokens", "temperature", "vocab_size", "eos_id", "stop_ids", "sequences"},
    )
    size = _integer(fields["vocab_size"], "vocab_size", 1, columns)
    max_tokens = _integer(fields["max_tokens"], "max_tokens", 1, max_length)
    temperature = fields["temperature"]
    usual = type(temperature) in (int, float) and 0.01 <= temperature <= 100
    if type(temperature) not in (int, float) or not (usual or temperature == 0):
        raise RequestError("temperature: 0, or between 0.01 and 100")
    stops, sequences = fields["stop_ids"], fields["sequences"]
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise RequestError(f"stop_ids: a list of up to {MAX_STOPS}")
    if not isinstance(sequences, list) or not 1 <= len(sequences) <= MAX_SEQUENCES:
        raise RequestError(f"sequences: a list of 1 to {MAX_SEQUENCES}")
    longest = max_length - max_tokens
    return SampleRequest(
        version=_version(fields["version"]),
        options=SampleOptions(
            max_tokens=max_tokens,
            temperature=float(temperature),
            vocab_size=size,
            eos_id=_integer(fields["eos_id"], "eos_id", 0, size - 1),
            stop_ids=tuple(_integer(stop, "stop_ids", 0, size - 1) for stop in stops),
        ),
        tasks=tuple(_task(entry, n, longest, size) for n, entry in enumerate(sequences)),
    )


def _task(entry: Any, number: int, longest: int, vocab_size: int) -> SampleTask:
    name = f"sequences[{number}]"
    if not isinstance(entry, dict) or entry.keys() != {"ids", "seed"}:
        raise RequestError(f"{name}: an object of ids and seed")
    ids = read_ids(entry["ids"], f"{name}.ids", longest=longest, vocab_size=vocab_size)
    return SampleTask(ids=ids, seed=_integer(entry["seed"], f"{name}.seed", 0, (1 << 63) - 1))


def read_ids(value: Any, name: str, *, longest: int, vocab_size: int) -> list[int]:
    """A list of 1 to ``longest`` ids below ``vocab_size``."""
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        raise RequestError(f"{name}: a list of integers")
    if not 1 <= len(value) <= longest:
        raise RequestError(f"{name}: {len(value)} tokens; there is room for 1 to {longest}")
    if min(value) < 0 or max(value) >= vocab_size:
        raise RequestError(f"{name}: ids are 0 to {vocab_size - 1}")
    return value


def read_object(body: bytes, names: set[str]) -> dict[str, Any]:
    """A JSON object with exactly the fields ``names``."""
    try:
        fields: Any = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError("the body is no JSON") from error
    if not isinstance(fields, dict) or fields.keys() != names:
        raise RequestError(f"the fields are {', '.join(sorted(names))}, all of them")
    return fields


def encode_answer(version: str | None, answers: Sequence[Sampled]) -> bytes:
    """Without a version no answers are given away."""
    found = [
        {
            "ids": answer.ids.tolist(),
            "logprobs": [float(x) for x in answer.logprobs],
            "end": answer.end,
        }
        for answer in answers
    ]
    body = {"version": version, "answers": found if version is not None else []}
    return json.dumps(body, separators=(",", ":"), allow_nan=False).encode()


def decode_answer(body: bytes, request: SampleRequest) -> tuple[str | None, list[Sampled]]:
    """Version and answers, one a task; no answers where the version is not the one asked for.

    Raises:
        ValueError: anything else than what an engine may answer to ``request``.
    """
    try:
        fields = read_object(body, {"version", "answers"})
    except RequestError as error:
        raise ValueError(error.message) from error
    version, entries = fields["version"], fields["answers"]
    if version != request.version:
        return (version if is_version(version) else None), []
    if not isinstance(entries, list) or len(entries) != len(request.tasks):
        raise ValueError(f"{len(request.tasks)} answers were asked for")
    return version, [_sampled(entry, request.options) for entry in entries]


def _sampled(entry: Any, options: SampleOptions) -> Sampled:
    if not isinstance(entry, dict) or entry.keys() != {"ids", "logprobs", "end"}:
        raise ValueError("an answer is an object of ids, logprobs and end")
    ids, logprobs, end = entry["ids"], entry["logprobs"], entry["end"]
    if not isinstance(ids, list) or not set(map(type, ids)) <= {int}:
        raise ValueError("ids of an answer are integers")
    if not isinstance(logprobs, list) or not set(map(type, logprobs)) <= {int, float}:
        raise ValueError("log-probabilities of an answer are numbers")
    if not 1 <= len(ids) == len(logprobs) <= options.max_tokens:
        raise ValueError(f"{len(ids)} ids and {len(logprobs)} log-probabilities in one answer")
    if min(ids) < 0 or max(ids) >= options.vocab_size:
        raise ValueError(f"an id outside 0 to {options.vocab_size - 1}")
    if not all(LOWEST <= x <= 1e-3 for x in logprobs):
        raise ValueError("a log-probability that is not finite, or above 0")
    found = [index for index, token in enumerate(ids) if token in _ends(options)]
    whole = len(ids) == options.max_tokens
    if found[:1] == [len(ids) - 1]:
        wanted = _ends(options)[ids[-1]]
    elif not found and whole:
        wanted = "length"
    else:
        raise ValueError(f"an answer of {len(ids)} tokens that ends nowhere, or goes on")
    if end != wanted:
        raise ValueError(f"an answer that ends with {wanted} and says {end!r}")
    return Sampled(
        ids=np.asarray(ids, dtype=np.int32),
        logprobs=np.asarray(logprobs, dtype=np.float32),
        end=wanted,
    )


def _ends(options: SampleOptions) -> dict[int, End]:
    return {**dict.fromkeys(options.stop_ids, "stop"), options.eos_id: "eos"}


def end_of(token: int | None, options: SampleOptions) -> End:
    """Why an answer ended whose last token is ``token``."""
    return "length" if token is None else _ends(options).get(token, "length")


@dataclass(frozen=True, slots=True, kw_only=True)
class Broadcast:
    """Where the workers of one server meet the trainer, which is rank 0."""

    host: str
    port: int
    first_rank: int  # of this server's workers
    world_size: int
    backend: Literal["gloo", "nccl"]
    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]  # name, dtype, shape, in order


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """A change of weights: from ``path`` or over ``broadcast``, the other is None."""

    version: str
    vocab_size: int
    deadline_s: float
    path: str | None = None
    broadcast: Broadcast | None = None


def encode_update(update: Update) -> bytes:
    """The body of a POST to `WEIGHTS_PATH`."""
    meeting = update.broadcast
    channel = None
    if meeting is not None:
        channel = {
            "host": meeting.host,
            "port": meeting.port,
            "first_rank": meeting.first_rank,
            "world_size": meeting.world_size,
            "backend": meeting.backend,
            "tensors": [[name, dtype, list(shape)] for name, dtype, shape in meeting.tensors],
        }
    fields = {
        "version": update.version,
        "vocab_size": update.vocab_size,
        "deadline_s": update.deadline_s,
        "path": update.path,
        "broadcast": channel,
    }
    return json.dumps(fields, separators=(",", ":")).encode()


def read_update(body: bytes, *, columns: int) -> Update:
    """The update in ``body``.

    Raises:
        RequestError: malformed.
    """
    fields = read_object(body, {"version", "vocab_size", "deadline_s", "path", "broadcast"})
    path, channel, deadline_s = fields["path"], fields["broadcast"], fields["deadline_s"]
    if type(deadline_s) not in (int, float) or not 0 < deadline_s <= MAX_DEADLINE_S:
        raise RequestError(f"deadline_s: more than 0, up to {MAX_DEADLINE_S:g}")
    if (path is None) == (channel is None):
        raise RequestError("one of path and broadcast")
    if path is not None and (not isinstance(path, str) or "\0" in path):
        raise RequestError("path: a directory")
    return Update(
        version=_version(fields["version"]),
        vocab_size=_integer(fields["vocab_size"], "vocab_size", 1, columns),
        deadline_s=float(deadline_s),
        path=path,
        broadcast=None if channel is None else read_broadcast(channel),
    )


def read_broadcast(channel: Any) -> Broadcast:
    """A `Broadcast` from its JSON object."""
    names = {"host", "port", "first_rank", "world_size", "backend", "tensors"}
    if not isinstance(channel, Mapping) or channel.keys() != names:
        raise RequestError(f"broadcast: the fields are {', '.join(sorted(names))}")
    if not isinstance(channel["host"], str) or channel["backend"] not in ("gloo", "nccl"):
        raise RequestError("broadcast: a host, and gloo or nccl")
    tensors = channel["tensors"]
    if not isinstance(tensors, list):
        raise RequestError("broadcast.tensors: a list")
    return Broadcast(
        host=channel["host"],
        port=_integer(channel["port"], "broadcast.port", 1, 65535),
        first_rank=_integer(channel["first_rank"], "broadcast.first_rank", 1, 1 << 16),
        world_size=_integer(channel["world_size"], "broadcast.world_size", 2, 1 << 16),
        backend=channel["backend"],
        tensors=tuple(_tensor(entry) for entry in tensors),
    )


def _tensor(entry: Any) -> tuple[str, str, tuple[int, ...]]:
    if not isinstance(entry, list) or len(entry) != 3 or not isinstance(entry[0], str):
        raise RequestError("broadcast.tensors: lists of name, dtype, shape")
    name, dtype, shape = entry
    if dtype not in ("float32", "bfloat16", "float16") or not isinstance(shape, list):
        raise RequestError(f"broadcast.tensors: {name[:80]}: float32, bfloat16 or float16")
    return name, dtype, tuple(_integer(size, "shape", 1, 1 << 40) for size in shape)


def _version(value: Any) -> str:
    if not is_version(value):
        raise RequestError("version: <session>/<step>")
    return value


def _integer(value: Any, name: str, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise RequestError(f"{name}: an integer from {low} to {high}")
    return value
