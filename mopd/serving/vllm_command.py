"""How vLLM's server is started: words and environment, for mopd and for its tests."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mopd.environment import visible_devices
from mopd.serving.address import LOOPBACK

MODULE = "vllm.entrypoints.openai.api_server"  # `vllm serve` wants a distribution called vllm
LEASED_MODULE = "mopd.serving.vllm_leased"  # the same, once it is its turn on shared devices
TOKEN_VARIABLE = "MOPD_SERVE_TOKEN"

# No network, no reports to anyone.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    # seconds; a connection that was closed while a step took long is checked as a new one
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600",
}
# A small model on few cores: 1 GiB of cache, threads that the scheduler may move.
SMALL_CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
# The place of a rank among others: a server that reads them would look for those others.
RANK_VARIABLE = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What one server serves, and how.

    Args:
        max_logprobs: the cap of a request's log-probabilities; None leaves vLLM's own.
        processed_logprobs: sampled tokens get their log-probability at the sampling temperature.
        dtype: as vLLM's `--dtype`; None leaves vLLM's own choice.
        tensor_parallel_size: devices of one server.
        is_small: no compilation, for a model on a few cores.
        takes_turns: others are on its devices as well, see `serving.lease`.
        more: words of the user; the last one wins.
    """

    model: Path
    tokenizer: str | None
    name: str
    max_logprobs: int | None
    processed_logprobs: bool
    dtype: str | None
    is_small: bool
    takes_turns: bool = False
    more: tuple[str, ...]
    tensor_parallel_size: int = 1


def server_words(
    model: Path,
    *,
    host: str,
    port: int,
    more: Sequence[str] = (),
    scoring: bool,
    sampling: bool = False,
    module: str = MODULE,
) -> list[str]:
    """Words behind the interpreter. ``scoring`` adds mopd's endpoint (`serving.vllm_app`),
    ``sampling`` that and what a sampler needs (`serving.vllm_sampling`)."""
    words = ["-m", module, "--model", str(model), "--host", host, "--port", str(port)]
    words += ["--enable-scale-out"]  # serves /inference/v1/generate
    if sampling:
        words += ["--worker-extension-cls", "mopd.serving.vllm_weights.WeightsExtension"]
        words += ["--middleware", "mopd.serving.vllm_sampling.SampleMiddleware"]
        words += ["--logprobs-mode", "processed_logprobs"]
    elif scoring:
        words += ["--worker-extension-cls", "mopd.serving.vllm_worker.RowsExtension"]
        words += ["--middleware", "mopd.serving.vllm_app.ScoreMiddleware"]
    return [*words, *more]


def server_environment(base: Mapping[str, str], *, token: str | None) -> dict[str, str]:
    """``base``, offline, with the token for mopd's endpoint and for vLLM's own."""
    environment = {**base, **OFFLINE}
    if token is not None:
        environment |= {TOKEN_VARIABLE: token, "VLLM_API_KEY": token}
    return environment


def started_words(served: ServedModel, *, port: int, host: str = LOOPBACK) -> list[str]:
    """Words behind the interpreter for a server that mopd starts itself."""
    words = ["--served-model-name", served.name]
    if served.tokenizer is not None:
        words += ["--tokenizer", served.tokenizer]
    if served.max_logprobs is not None:
        words += ["--max-logprobs", str(served.max_logprobs)]
    if served.dtype is not None:
        words += ["--dtype", served.dtype]
    if served.tensor_parallel_size > 1:
        words += ["--tensor-parallel-size", str(served.tensor_parallel_size)]
    if served.is_small:
        words += ["--enforce-eager"]
    elif served.takes_turns:
        words += ["--enable-sleep-mode"]  # refused on CPUs, which have no memory to give back
    return server_words(
        served.model,
        host=host,
        port=port,
        more=[*words, *served.more],
        scoring=True,
        sampling=served.processed_logprobs,
        module=LEASED_MODULE if served.takes_turns else MODULE,
    )


def started_environment(
    base: Mapping[str, str], *, token: str, imports: Path, device: str, devices: str | None
) -> dict[str, str]:
    """``base`` without the trainer's rank; values that the user set himself win over `SMALL_CPU`.

    Args:
        imports: a folder that holds mopd and nothing else, ahead on the interpreter's path.
        device: cpu, cuda or npu; ``devices`` of it that the server may use, None for all.
    """
    kept = {name: value for name, value in base.items() if not RANK_VARIABLE.fullmatch(name)}
    path = [str(imports), *filter(None, [kept.get("PYTHONPATH")])]
    environment = {**(SMALL_CPU if device == "cpu" else {}), **kept}
    environment["PYTHONPATH"] = os.pathsep.join(path)
    if devices is not None:
        environment[visible_devices(device)] = devices
    return server_environment(environment, token=token)
