"""Memory of engines, and of models inside the student's processes. No torch."""

from __future__ import annotations

import math

from mopd.config.backends import (
    RemoteSection,
    RolloutBackendSection,
    TeacherBackendSection,
)
from mopd.config.cluster import DeviceKind
from mopd.config.model_size import ModelSize
from mopd.config.pools import ROLLOUT, backends_of
from mopd.config.schema import RunConfig
from mopd.runtime.memory_student import DTYPE_BYTES, longest_text

# Guesses: vLLM's defaults.
MAX_SEQUENCES = 256  # max_num_seqs
MAX_BATCHED_TOKENS = 8192  # max_num_batched_tokens
LAYER_STATES = 8  # hidden states that one layer of a forward pass holds at once


def engine_parts(
    config: RunConfig, owner: str, size: ModelSize, *, device: DeviceKind
) -> dict[str, int]:
    """Bytes by kind, of one device of an engine, or of a model inside a process.

    Weights are split over the engine's devices. The cache is what the texts need that are asked for
    at once, in keys and values of every layer (2309.06180, 3); its heads are split, and repeated
    where there are fewer than devices. Logits are whole on each device.
    """
    backend = backends_of(config)[owner]
    tp = backend.server.tensor_parallel_size
    width = _width(config, owner, size, device)
    element = max(2, math.ceil(width))  # a quantized model computes in 16 bits
    text = longest_text(config, size.max_length)
    texts = _texts(config, owner, backend)
    together = MAX_BATCHED_TOKENS if backend.type == "vllm" else texts * text
    return {
        "weights": math.ceil(size.num_parameters * width / tp),
        "KV cache": texts * text * kv_bytes(size, element) // min(tp, size.num_kv_heads),
        "activations": min(together, texts * text) * size.hidden_size * LAYER_STATES * element,
        "logits block": size.vocab_size * _logits(config, owner, backend, texts, text, element),
    }


def kv_bytes(size: ModelSize, element: int) -> int:
    """Of one token, in all layers and heads."""
    return size.num_layers * size.kv_size * element


def _texts(
    config: RunConfig, owner: str, backend: TeacherBackendSection | RolloutBackendSection
) -> int:
    """In an engine at a time."""
    if backend.type != "vllm" and owner == ROLLOUT:
        return min(_answers(config, backend), backend.batch_size)
    if owner == ROLLOUT:
        return min(_answers(config, backend), MAX_SEQUENCES)
    if isinstance(backend, TeacherBackendSection) and backend.type == "hf":
        return min(_answers(config, backend), backend.batch_size)
    return backend.max_outstanding


def _answers(config: RunConfig, backend: RemoteSection) -> int:
    """Of a step, for one engine."""
    answers = config.train.num_prompts_per_step * config.rollout.num_generations_per_prompt
    return -(-answers // backend.server.replicas)


def _logits(
    config: RunConfig, owner: str, backend: RemoteSection, texts: int, text: int, element: int
) -> int:
    """Bytes of logits and what is made of them, per token of the vocabulary."""
    if owner == ROLLOUT:  # the next token's, and its float32 log-probabilities
        return texts * (element + 4)
    if backends_of(config)[owner].type == "hf":
        # whole texts (`mopd.teachers.hf`), then answers in float32 with three temporaries
        answer = min(text, config.rollout.max_new_tokens)
        return texts * (text * element + answer * 4 * 4)
    return min(text, MAX_BATCHED_TOKENS) * (element + 4)


def _width(config: RunConfig, owner: str, size: ModelSize, device: DeviceKind) -> float:
    """Bytes of a weight: of a sampler in vLLM the student's, in transformers those of the file
    (float32 on processors), else vLLM's choice, which has 16 bits on accelerators."""
    backend = backends_of(config)[owner]
    if owner == ROLLOUT and backend.type == "vllm":
        return DTYPE_BYTES[config.student.dtype]
    if device == "cpu":
        return 4
    if size.bits is not None:
        return size.bits / 8
    return 4 if size.is_float32 and backend.type != "vllm" else 2
