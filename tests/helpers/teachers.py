"""Rollouts to score, and remote teachers in front of stub servers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mopd.config.backends import TeacherBackendSection
from mopd.config.schema import PrivilegedSection
from mopd.rollout.base import make_rollout
from mopd.runtime.teachers import protocols
from mopd.serving.endpoint import Endpoint, EndpointOptions
from mopd.serving.generation import Generated
from mopd.serving.replicas import Replicas
from mopd.serving.retry import RetryOptions
from mopd.teachers.remote import RemoteOptions, RemoteTeacher
from mopd.teachers.writing import WritingTeacher
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Prompt, Rollout


def make_rollout_of(
    student: ChatTokenizer, response: bytes, *, content: str = "bo 12 ka", stopped: bool = True
) -> Rollout:
    """What the student would have written."""
    ids = student.vocabulary.encode(response)
    token_ids = np.array([*ids, *([student.eos_id] if stopped else [])], dtype=np.int32)
    message = {"role": "user", "content": content}
    prompt = Prompt(id="p", messages=(message,), domain="sort", teachers=("sort",))
    return make_rollout(
        prompt,
        Generated(
            token_ids=token_ids,
            logprobs=np.zeros(len(token_ids), dtype=np.float32),
            stopped=stopped,
        ),
        tokenizer=student,
        prompt_ids=student.prompt_ids(prompt.messages),
        sample_index=0,
        version=0,
    )


def remote_teacher(
    urls: Sequence[str],
    *,
    tokenizer: ChatTokenizer,
    student: ChatTokenizer,
    top_k: int | None = 8,
    shape: str = "vllm",
    tolerance: float = 1e-3,
    endpoint: dict | None = None,
    retry: dict | None = None,
    canary_interval: int = 0,
    wire: str = "fp32",
    privileged: PrivilegedSection | None = None,
) -> RemoteTeacher:
    """A teacher called sort; short deadlines. ``shape`` is a backend type."""
    backend = TeacherBackendSection.model_validate({"type": shape, "wire": wire})
    settings = {"deadline_s": 20.0, "max_outstanding": 4, "start_s": 5.0} | (endpoint or {})
    options = EndpointOptions(**({"protocols": protocols(backend, tokenizer)} | settings))
    again = {"max_retries": 2, "restart_budget_s": 0.0, "pause_s": 0.01} | (retry or {})
    replicas = Replicas(
        "sort",
        [Endpoint(url, options) for url in urls],
        options=RetryOptions(max_outstanding=options.max_outstanding, **again),
        seed=0,
    )
    return (WritingTeacher if shape in ("vllm", "mopd") else RemoteTeacher)(
        "sort",
        replicas,
        tokenizer=tokenizer,
        student=student,
        options=RemoteOptions(
            top_k=top_k,
            tolerance=tolerance,
            canary_interval=canary_interval,
            privileged=privileged,
        ),
    )
