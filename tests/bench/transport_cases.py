"""The row of the transport: a server's JSON into the arrays of `TeacherScores`."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from mopd.serving.reply import decode_vllm
from mopd.teachers.admission import Admitted, admit
from tests.bench import measure

SIZES = {False: (2048, 64), True: (64, 8)}
VOCAB = 151_936


def reply(positions: int, k: int) -> tuple[bytes, np.ndarray]:
    """vLLM's body about one prompt, compact as it sends it, and the ids [T] of the prompt."""
    rng = np.random.default_rng(0)
    listed: list[Any] = [None]
    ids = [1]
    for t in range(1, positions):
        logits = np.sort(rng.normal(size=4 * k) * 3.0)[::-1]
        logprobs = (logits - np.log(np.exp(logits).sum())).astype(np.float32)
        tokens = rng.choice(VOCAB, size=k + 1, replace=False)
        # the actual token comes first; every fourth one is outside the top-k
        place = k if t % 4 == 0 else int(rng.integers(k))
        order = [place, *(i for i in range(k) if i != place)]
        listed.append(
            {
                str(tokens[i]): {
                    "logprob": float(logprobs[i]),
                    "rank": i + 1,
                    "decoded_token": f" word{tokens[i] % 977}",
                }
                for i in order
            }
        )
        ids.append(int(tokens[place]))
    choice = {"index": 0, "text": " a", "prompt_logprobs": listed, "prompt_token_ids": ids}
    body = json.dumps(
        {"id": "cmpl-0", "model": "teacher", "choices": [choice]}, separators=(",", ":")
    )
    return body.encode(), np.array(ids)


def decoded(body: bytes, ids: np.ndarray, k: int) -> Admitted:
    """All that happens between the socket and the aligner."""
    (entries,) = decode_vllm(body, 1).prompts
    return admit(entries, ids=ids, num_prompt=1, k=k, vocab_size=VOCAB)


def transport_json(quick: bool, repeats: int) -> dict[str, Any]:
    positions, k = SIZES[quick]
    body, ids = reply(positions, k)
    seconds = measure.cpu_seconds(
        {"ours": lambda: decoded(body, ids, k), "baseline": lambda: json.loads(body)}, repeats
    )
    return {
        "ratio": seconds["ours"] / seconds["baseline"],
        "peak_tensors": None,
        "cpu_seconds": seconds["ours"],
        "repeats": repeats,
        "work": (
            f"a vLLM reply of {positions} positions with top-{k} ({len(body) / 1e6:.1f} MB) into "
            "ids, log-probabilities and tail, every position checked"
        ),
        "baseline": "json.loads alone",
        "error": {"value": _error(body, ids, k)},
        "bytes_per_token": len(body) / positions,
    }


def _error(body: bytes, ids: np.ndarray, k: int) -> float:
    """The largest difference to the numbers in the JSON, taken one by one; inf: a missing row."""
    found = decoded(body, ids, k)
    worst = 0.0 if found.valid.all() else np.inf
    said = json.loads(body)["choices"][0]["prompt_logprobs"]
    for t, position in enumerate(said[1:]):
        ranked = sorted(position.items(), key=lambda item: item[1]["rank"])
        if [int(key) for key, _ in ranked[:k]] != found.topk_ids[t].tolist():
            return np.inf
        values = np.array([entry["logprob"] for _, entry in ranked[:k]])
        worst = max(worst, float(np.abs(values - found.topk_logprobs[t]).max()))
        actual = position[str(ids[t + 1])]["logprob"]
        worst = max(worst, abs(actual - float(found.logprobs[t])))
        worst = max(worst, abs(1.0 - np.exp(values).sum() - np.exp(found.log_tail[t])) / 10.0)
    return worst
