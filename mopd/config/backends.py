"""Sections of a recipe about who computes: engines in this process, and servers."""

from __future__ import annotations

from typing import Literal

from mopd.config.section import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)


class ServerSection(Section):
    """vLLM servers that mopd starts itself and ends with the run."""

    replicas: PositiveInt = 1
    tensor_parallel_size: PositiveInt = 1  # devices of each replica
    # an interpreter that has vLLM; None: $MOPD_VLLM_PYTHON, this one, or .venv-vllm's
    python: str | None = None
    args: tuple[str, ...] = ()  # more words for vLLM's server, as in [--dtype, bfloat16]
    devices: str | None = None  # for CUDA_VISIBLE_DEVICES or its like; None inherits
    max_restarts: NonNegativeInt = 3  # of one server that died


class RemoteSection(Section):
    """How servers are reached."""

    urls: tuple[str, ...] = ()  # base URLs, as in http://127.0.0.1:8000
    served_model: str | None = None  # None: the only model that the servers list
    api_key_env: str | None = None  # NAME of an environment variable
    deadline_s: PositiveFloat = 60.0  # of one request, from the connection to the last byte
    start_s: NonNegativeFloat = 300.0  # how long a server may take until it is healthy
    max_retries: NonNegativeInt = 5  # of one request
    max_outstanding: PositiveInt = 8  # requests at a time, per server
    restart_budget_s: NonNegativeFloat = 300.0  # how long all servers may be away
    server: ServerSection = ServerSection()  # what is started where `urls` is empty


class TeacherBackendSection(RemoteSection):
    """Who computes the scores.

    `hf`: in-process transformers. On the student's ranks and in its layout: `megatron` another
    model, `self` the student without its LoRA adapter. Servers, replicas of one model at `urls`,
    or started by mopd where that is empty (`vllm`, `mopd`): `vllm` stock vLLM, `mopd` is
    `mopd serve`, `openai` echoes prompts, `sglang` and `trl` (`trl vllm-serve`) speak their own
    shapes. `uniform`: every token equally likely, a negative control.
    """

    type: Literal[
        "hf", "megatron", "self", "uniform", "custom", "vllm", "mopd", "openai", "sglang", "trl"
    ] = "hf"
    target: str | None = None  # package.module:Name, for `custom`
    batch_size: PositiveInt = 64  # of hf
    max_tokens_per_micro_batch: PositiveInt = 1 << 14  # of megatron and self, padding included
    offload: bool = True  # of megatron: its weights are in host memory while nobody asks
    dtype: Literal["float32", "bfloat16"] | None = None  # of megatron; None: student.dtype
    entries_per_request: PositiveInt = 1 << 17  # tokens times k of one; an answer is never split
    wire: Literal["fp32", "fp16"] = "fp32"  # of type mopd: the top-k's log-probabilities
    tolerance: PositiveFloat = 0.05  # between two scores of one text by the same model
    canary_interval: NonNegativeInt = 50  # requests for scores between two looks at a fixed text


class RolloutBackendSection(RemoteSection):
    """Who samples.

    `hf`: in-process transformers. `vllm`: servers, or with `mode: colocate` vLLM in this process.
    `replay`: reads the journal of another run at `path`. `dataset`: nobody, answers come with the
    data (off-policy).
    """

    type: Literal["hf", "vllm", "replay", "dataset", "custom"] = "hf"
    mode: Literal["server", "colocate"] = "server"  # of vllm
    path: str | None = None  # the run that `replay` reads
    target: str | None = None  # package.module:Name, for `custom`
    batch_size: PositiveInt = 256  # answers decoded together, in sampling and in evaluation
    weight_sync: Literal["files", "broadcast"] = "files"  # how a server gets the student's weights
    sync_dir: str | None = None  # of files, seen by trainer and servers; None: inside the run
    probe_tolerance: PositiveFloat = 0.01  # between trainer and engine, of a fixed text's log-probs
    memory_fraction: PositiveFloat = 0.3  # of the accelerator, for vllm with mode colocate
