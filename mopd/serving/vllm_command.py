"""How vLLM's server is started: words and environment, for mopd and for its tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

MODULE = "vllm.entrypoints.openai.api_server"  # `vllm serve` wants a distribution called vllm
TOKEN_VARIABLE = "MOPD_SERVE_TOKEN"

# No network, no reports to anyone.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
}
# A small model on few cores: 1 GiB of cache, threads that the scheduler may move.
SMALL_CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}


def server_words(
    model: Path, *, host: str, port: int, more: Sequence[str] = (), scoring: bool
) -> list[str]:
    """Words behind the interpreter. ``scoring`` adds mopd's endpoint (`serving.vllm_app`)."""
    words = ["-m", MODULE, "--model", str(model), "--host", host, "--port", str(port)]
    words += ["--enable-scale-out"]  # serves /inference/v1/generate
    if scoring:
        words += ["--worker-extension-cls", "mopd.serving.vllm_worker.RowsExtension"]
        words += ["--middleware", "mopd.serving.vllm_app.ScoreMiddleware"]
    return [*words, *more]


def server_environment(base: Mapping[str, str], *, token: str | None) -> dict[str, str]:
    """``base``, offline, with the token for mopd's endpoint and for vLLM's own."""
    environment = {**base, **OFFLINE}
    if token is not None:
        environment |= {TOKEN_VARIABLE: token, "VLLM_API_KEY": token}
    return environment
