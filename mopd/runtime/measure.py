"""A student on held-out prompts, outside a run: with the functions and the numbers of one.

Greedy answers come from a transformers copy in this process, whatever the recipe samples with.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from mopd.config.backends import RolloutBackendSection
from mopd.config.cluster import ClusterSection
from mopd.config.schema import (
    CheckpointSection,
    LoraSection,
    ParallelSection,
    RolloutSection,
    RunConfig,
)
from mopd.device import get_device
from mopd.errors import ConfigError
from mopd.runtime.build import build_run, threads_per_rank
from mopd.runtime.data import Router, read_prompts
from mopd.runtime.evaluate import by_domain, student_scores
from mopd.runtime.evaluation import Evaluation, evaluate
from mopd.runtime.parts import load_tokenizer
from mopd.runtime.sampler import sampler_here
from mopd.runtime.servers import Servers
from mopd.student.parallel import shutdown


def measured_recipe(config: RunConfig, model: Path, *, directory: Path) -> RunConfig:
    """The recipe with ``model`` as its student, for one process; what it writes is temporary."""
    rollout = RolloutSection(
        max_new_tokens=config.rollout.max_new_tokens,
        stop_token_ids=config.rollout.stop_token_ids,
        mask_truncated_completions=config.rollout.mask_truncated_completions,
        backend=RolloutBackendSection(type="hf", batch_size=config.rollout.backend.batch_size),
    )
    # what an adapter learned is in an exported model
    student = {"model": str(model), "parallel": ParallelSection(), "lora": LoraSection()}
    return config.model_copy(
        update={
            "student": config.student.model_copy(update=student),
            "rollout": rollout,
            "run": config.run.model_copy(update={"dir": str(directory), "name": "eval"}),
            "checkpoint": CheckpointSection(),
            "evaluate": config.evaluate.model_copy(update={"patience": None}),
            "launcher": "torchrun",
            "cluster": ClusterSection(),
            "pools": {},
            "teachers": {
                name: teacher.model_copy(update={"pool": None})
                for name, teacher in config.teachers.items()
            },
        }
    )


def accuracies(config: RunConfig) -> Evaluation:
    """Greedy accuracy and canonical share of each domain; no teacher is loaded.

    Raises:
        ConfigError: there is no held-out row with an answer.
    """
    if config.data.heldout_path is None:
        raise ConfigError("data.heldout_path: is not set; name rows with prompts and answers")
    rows = read_prompts(
        config.data.heldout_path,
        router=Router(config.teachers, config.distillation),
        teacher_key=config.distillation.teacher_key,
        data=config.data,
        cache=Path(config.cache_dir) / "datasets",
    )
    domains = by_domain(rows, config.evaluate.max_prompts_per_domain)
    if not domains:
        raise ConfigError(
            f"data.heldout_path: no row has {config.data.answer_key!r} (data.answer_key), so there "
            "is nothing to measure; add it"
        )
    torch.set_num_threads(config.run.threads or threads_per_rank(config))
    tokenizer = load_tokenizer("student", config.student)
    sampler = sampler_here(config, tokenizer, get_device(config.run.device).device(0))
    try:
        scores = student_scores(
            sampler, domains, tokenizer=tokenizer, share=(0, 1), sum_over_replicas=_alone
        )
    finally:
        sampler.close()
    return Evaluation(step=0, scores=scores)


def with_losses(config: RunConfig) -> Evaluation:
    """The same and what the teachers say: a validation loss, and their divergence on held-out
    answers where the recipe has ``evaluate.interval``."""
    with ExitStack() as opened:
        opened.callback(shutdown)
        run = build_run(config, Servers(config))
        for part in (run.servers, run.turns, run.sampler, run.pool, run.feed):
            if part is not None:
                opened.callback(part.close)
        return evaluate(run, 0)


def _alone(values: np.ndarray) -> np.ndarray:
    return values
