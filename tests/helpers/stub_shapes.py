"""The reply shapes of servers, from rows of log-probabilities. Those of SGLang and TRL are those of
their sources, not of servers that ran."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mopd.serving.wire import RawRows, WireHeader, encode_header, encode_rows

COMPLETIONS, GENERATE = "/v1/completions", "/inference/v1/generate"
SGLANG, TRL = "/generate", "/get_sequence_logprobs/"


@dataclass(frozen=True, kw_only=True)
class Said:
    """What a server thinks of one sequence."""

    ids: list[int]  # [T]
    rows: np.ndarray  # [T - 1, V] log-probabilities

    @property
    def order(self) -> np.ndarray:
        """[T - 1, V] columns by falling probability."""
        return np.argsort(-self.rows, axis=1, kind="stable")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request of any shape."""

    model: str | None
    sequences: list[list[int]]
    starts: list[int]
    k: int
    temperature: float

    @classmethod
    def of(cls, path: str, body: Mapping[str, Any]) -> Asked:
        params = body.get("sampling_params", body)
        match path:
            case "/v1/completions":
                sequences, k = body["prompt"], body.get("prompt_logprobs") or body.get("logprobs")
            case "/inference/v1/generate":
                assert params["detokenize"] is False
                sequences, k = [body["token_ids"]], params["prompt_logprobs"]
            case "/generate":
                assert body["return_logprob"] is True
                sequences, k = body["input_ids"], body["top_logprobs_num"]
            case _:
                assert body["response_format"] == "binary"
                sequences, k = body["sequences"], body["top_logprobs"]
        starts = body.get("prompt_lengths") or body.get("logprob_start_len")
        return cls(
            model=body.get("model"),
            sequences=sequences,
            starts=starts or [0] * len(sequences),
            k=k or 0,
            temperature=params["temperature"],
        )


@dataclass(kw_only=True)
class Message:
    """A reply of `mopd serve`, for faults to edit."""

    header: WireHeader
    rows: RawRows

    def encoded(self) -> bytes:
        """Whatever is in it, also what the real encoder refuses."""
        return encode_header(self.header) + encode_rows(self.rows, wire=self.header.wire)


def vllm(said: Said, *, k: int, width: int | None, token_ids: bool) -> dict[str, Any]:
    """``prompt_logprobs``; with ``width`` the listed ids end there."""
    ids, rows, order = said.ids, said.rows, said.order
    shift = 0 if width is None else width - rows.shape[1]
    listed: list[Any] = [None]
    for row, ranked, actual in zip(rows, order, ids[1:], strict=True):
        rank = int((row > row[actual]).sum()) + 1
        entries = {str(actual): _entry(row[actual], rank)}
        for place_, index in enumerate(ranked[:k]):
            entries.setdefault(str(int(index) + shift), _entry(row[index], place_ + 1))
        listed.append(entries)
    found: dict[str, Any] = {"prompt_logprobs": listed}
    if token_ids:
        found["prompt_token_ids"] = list(ids)
    return found


def openai(said: Said, *, k: int, names: Sequence[str] | None) -> dict[str, Any]:
    """The echo of `/v1/completions`."""
    ids, rows, order = said.ids, said.rows, said.order

    def name(index: int) -> str:
        return f"token_id:{index}" if names is None else names[index]

    top: list[Any] = [None]
    for row, ranked, actual in zip(rows, order[:, :k], ids[1:], strict=True):
        listed = {name(int(i)): float(row[i]) for i in ranked}
        listed[name(actual)] = float(row[actual])
        top.append(listed)
    actual = [None, *(float(row[i]) for row, i in zip(rows, ids[1:], strict=True))]
    tokens = [name(i) for i in ids]
    return {"logprobs": {"tokens": tokens, "token_logprobs": actual, "top_logprobs": top}}


def sglang(said: Said, *, k: int, start: int) -> dict[str, Any]:
    """One reply of `/generate`, from ``start`` on."""
    ids, rows, order = said.ids, said.rows, said.order
    last = rows.shape[1] - 1
    # the last id of the vocabulary is written as 0
    shown = [i if i < last else 0 for i in ids[start:]]
    values = [
        None,
        *(float(row[i]) for row, i in zip(rows[start:], ids[start + 1 :], strict=True)),
    ]
    top: list[Any] = [None]
    for row, ranked in zip(rows[start:], order[start:, :k], strict=True):
        top.append([[float(row[i]), int(i), None] for i in ranked])
    meta = {
        "prompt_tokens": len(ids),
        "input_token_logprobs": [[v, i, None] for v, i in zip(values, shown, strict=True)],
        "input_top_logprobs": top,
    }
    return {"text": "", "meta_info": meta}


def trl(every: Sequence[Said], asked: Asked) -> dict[str, Any]:
    """The binary shape of `/get_sequence_logprobs/`."""
    lengths = [len(s) - n for s, n in zip(asked.sequences, asked.starts, strict=True)]
    shape = (len(lengths), max(lengths))
    top = np.full((*shape, asked.k), -np.inf, dtype=np.float32)
    actual = np.full((*shape, 1), -np.inf, dtype=np.float32)
    top_ids, actual_ids = np.zeros(top.shape, np.int32), np.zeros(actual.shape, np.int32)
    for place, (said, length, start) in enumerate(zip(every, lengths, asked.starts, strict=True)):
        kept, behind = said.rows[start - 1 :], said.ids[start:]
        best = said.order[start - 1 :, : asked.k]
        top_ids[place, :length] = best
        top[place, :length] = np.take_along_axis(kept, best, axis=1)
        actual_ids[place, :length, 0] = behind
        actual[place, :length, 0] = kept[np.arange(length), behind]
    arrays = {"logprobs": top, "token_ids": top_ids}
    arrays |= {"actual_logprobs": actual, "actual_token_ids": actual_ids}
    packed = {f"{k}_b64": base64.b64encode(v.tobytes()).decode() for k, v in arrays.items()}
    return packed | {"shape": list(top.shape), "completion_lengths": lengths}


def raw_rows(
    logits: np.ndarray, actual: list[int], *, top_k: int | None, temperature: float
) -> RawRows:
    """Rows of `mopd serve`, from ``logits`` [T, V] that predict ``actual`` [T]."""
    import torch

    from mopd.serving.rows import rows_of_logits

    return rows_of_logits(
        torch.as_tensor(logits), torch.tensor(actual), top_k=top_k, temperature=temperature
    )


def _entry(logprob: float, rank: int) -> dict[str, Any]:
    return {"logprob": float(logprob), "rank": rank, "decoded_token": "\u00e9x"}
