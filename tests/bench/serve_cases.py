"""`mopd serve`: what its bytes cost the client, and how long a real vLLM server needs for them."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from mopd.demo import WorldSpec, ensure_world
from mopd.serving import wire
from mopd.serving.scoring import SCORE_PATH
from tests.bench import measure, transport_cases
from tests.helpers.vllm_server import (
    MAX_LOGPROBS,
    MAX_MODEL_LEN,
    MODEL_NAME,
    VENV,
    VllmServer,
    run_vllm_server,
)

MAX_BYTES = 1 << 30
SEQUENCES = 32


def message(body: bytes, ids: np.ndarray, k: int) -> bytes:
    """What `mopd serve` would send instead of vLLM's ``body``."""
    found = transport_cases.decoded(body, ids, k)
    count = len(found.logprobs)
    lse = np.zeros((count, 2), dtype=np.float32)
    rows = wire.RawRows(
        topk_ids=found.topk_ids,
        topk_logprobs=found.topk_logprobs,
        logprobs=found.logprobs,
        log_tail=found.log_tail,
        lse=lse,
    )
    header = wire.WireHeader(
        request="r",
        model="m",
        wire="fp32",
        listed=True,
        top_k=k,
        temperature=1.0,
        rows=(count,),
    )
    return wire.encode(header, rows)


def transport_rows(quick: bool, repeats: int) -> dict[str, Any]:
    positions, k = transport_cases.SIZES[quick]
    body, ids = transport_cases.reply(positions, k)
    raw = message(body, ids, k)

    def arrays() -> wire.RawRows:
        (rows,) = wire.decode(raw, max_bytes=MAX_BYTES).per_sequence()
        return rows

    seconds = measure.cpu_seconds({"ours": arrays, "baseline": lambda: json.loads(body)}, repeats)
    wanted, found = transport_cases.decoded(body, ids, k), arrays()
    return {
        "ratio": seconds["ours"] / seconds["baseline"],
        "peak_tensors": None,
        "cpu_seconds": seconds["ours"],
        "repeats": repeats,
        "work": f"a reply of `mopd serve`, {positions} positions with top-{k}, into arrays",
        "baseline": "json.loads of vLLM's reply about the same positions",
        "error": {"value": float(np.abs(found.topk_logprobs - wanted.topk_logprobs).max())},
        "bytes_per_token": len(raw) / positions,
        "baseline_bytes_per_token": len(body) / positions,
    }


def serve_vllm(quick: bool, repeats: int) -> dict[str, Any] | None:
    """Wall time of one server for 32 x 255 tokens at K = 64; None where there is no vLLM."""
    if quick or not (VENV / ".mopd-setup").is_file():
        return None
    with tempfile.TemporaryDirectory(prefix="mopd-bench-") as folder:
        world = ensure_world(Path(folder), spec=WorldSpec.tiny(), progress=False)
        teacher = world.teachers["sort"]
        with run_vllm_server(teacher, log=Path(folder) / "vllm.log") as server:
            return _compared(server, _vocab_size(teacher), max(1, repeats // 2))


def _vocab_size(model: Path) -> int:
    return json.loads((model / "config.json").read_text())["vocab_size"]


def _compared(server: VllmServer, vocab_size: int, repeats: int) -> dict[str, Any]:
    random = np.random.default_rng(0)
    prompts = random.integers(0, vocab_size, (SEQUENCES, MAX_MODEL_LEN - 1)).tolist()
    stock = {"model": MODEL_NAME, "prompt": prompts, "max_tokens": 1}
    ours = {
        "request": "r",
        "sequences": [{"ids": ids, "start": 1} for ids in prompts],
        "top_k": MAX_LOGPROBS,
        "temperature": 1.0,
        "vocab_size": vocab_size,
        "wire": "fp32",
    }
    seconds: dict[str, list[float]] = {"ours": [], "baseline": []}
    sizes: dict[str, int] = {}
    for _ in range(repeats):
        for side, path, body in (
            ("baseline", "/v1/completions", stock | {"prompt_logprobs": MAX_LOGPROBS}),
            ("ours", SCORE_PATH, ours),
        ):
            started = time.perf_counter()
            status, reply = server.request(path, body)
            seconds[side].append(time.perf_counter() - started)
            if status != 200:
                raise RuntimeError(f"{path} answered {status}: {reply[:200]!r}")
            sizes[side] = len(reply)
    tokens = SEQUENCES * (MAX_MODEL_LEN - 2)
    return {
        "ratio": median(seconds["ours"]) / median(seconds["baseline"]),
        "peak_tensors": None,
        "cpu_seconds": median(seconds["ours"]),
        "repeats": repeats,
        "work": f"{SEQUENCES} x {MAX_MODEL_LEN - 1} tokens at K = {MAX_LOGPROBS}, wall time",
        "baseline": "/v1/completions of the same server",
        "error": None,
        "bytes_per_token": sizes["ours"] / tokens,
        "baseline_bytes_per_token": sizes["baseline"] / tokens,
    }
