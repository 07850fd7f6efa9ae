"""NeMo-RL's keys of the run around the loss: batches, optimizer, parallel sizes, logs."""

from __future__ import annotations

import math
from typing import Any

from mopd.config.peers.hf_trainer import DATA_NOTE
from mopd.config.peers.rows import Row, Source, drops
from mopd.config.peers.values import (
    boolean,
    dtype,
    integer,
    is_on,
    number,
    one_path,
    positive,
    recompute,
    run_dir,
    run_name,
    some,
    text,
)

OPTIMIZER = "student.optimizer"
TEXT_NOTE = f"rows need a prompt and an answer, NeMo trains on raw text; {DATA_NOTE}"
KNOWN_SCHEDULES = ("LinearLR", "CosineAnnealingLR", "ConstantLR")


def steps(source: Source) -> int:
    return positive(source.get("distillation.max_num_steps"))


def part(value: Any, source: Source) -> float:
    """Steps as a share of the run."""
    return min(1.0, math.floor(number(value) / steps(source) * 1e6) / 1e6)


def betas(value: Any, source: Source) -> dict[str, float]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError("two numbers are expected")
    names = ("adam_beta1", "adam_beta2")
    return {f"{OPTIMIZER}.{n}": number(v) for n, v in zip(names, value, strict=True)}


def own_schedule(source: Source) -> bool:
    return bool(source.indices("policy.scheduler"))


def _parallel(theirs: str, ours: str) -> Row:
    return Row(f"policy.{theirs}", f"student.parallel.{ours}", positive)


PARALLEL = (
    _parallel("dtensor_cfg.tensor_parallel_size", "tensor_model_parallel_size"),
    _parallel("dtensor_cfg.context_parallel_size", "context_parallel_size"),
    Row("policy.dtensor_cfg.sequence_parallel", "student.parallel.sequence_parallel", boolean),
    Row(
        "policy.dtensor_cfg.activation_checkpointing",
        to=recompute,
        default=True,
        target="student.recompute.granularity",
    ),
    *drops("the student is Megatron's here", "policy.dtensor_cfg.**", "policy.megatron_cfg.**"),
)
BATCHES = (
    Row("distillation.num_prompts_per_step", "train.num_prompts_per_step", positive, default=64),
    Row("distillation.max_num_steps", "train.steps", positive, default=5000),
    Row(
        "distillation.num_generations_per_prompt",
        note="answers come with the data, one a row",
        lost=lambda value: str(value) != "1",
    ),
    Row("distillation.seed", "run.seed", integer, default=42),
    Row(
        "policy.train_global_batch_size",
        note="a step of mopd is one optimizer step over all num_prompts_per_step",
    ),
    Row("policy.train_micro_batch_size", "train.micro_batch_size", positive, default=1),
    Row(
        "policy.max_total_sequence_length",
        "rollout.max_new_tokens",
        positive,
        default=2048,
        note="cuts answers; prompts are not counted",
    ),
    Row("policy.sequence_packing.enabled", "train.packing", boolean),
    Row(
        "policy.sequence_packing.train_mb_tokens",
        "train.max_tokens_per_micro_batch",
        positive,
        when=lambda source: source.get("policy.sequence_packing.enabled") is True,
    ),
    *drops(
        "evaluations need data.heldout_path: set evaluate.interval with it",
        "distillation.val_**",
        "distillation.max_val_samples",
        "eval.**",
        "data.validation.**",
        "data.validation",
    ),
    *drops(
        "has no counterpart, and does not change what is learned",
        "distillation.max_num_epochs",
        "distillation.use_ipc",
        "distillation.topk_logits_k",
        "defaults",
        "policy.sequence_packing.**",
        "policy.dynamic_batching.**",
        "policy.logprob_**",
        "policy.offload_optimizer_for_logprob",
        "policy.make_sequence_length_divisible_by",
        "policy.tokenizer.**",
        "policy.refit_buffer_size_gb",
        "policy.hf_config_overrides.**",
    ),
    Row("distillation.loss_on_all_tokens", note="answers are trained, prompts are not", lost=is_on),
    *drops(
        "nothing is sampled, answers come with the data",
        "policy.generation.**",
        "policy.generation",
    ),
)
OPTIMIZER_ROWS = (
    Row("policy.optimizer.kwargs.lr", f"{OPTIMIZER}.lr", number, default=5e-5),
    Row("policy.optimizer.kwargs.weight_decay", f"{OPTIMIZER}.weight_decay", number, default=0.001),
    Row(
        "policy.optimizer.kwargs.betas",
        "*",
        betas,
        default=[0.9, 0.95],
        shown=f"{OPTIMIZER}.adam_beta1, adam_beta2",
    ),
    Row("policy.optimizer.kwargs.eps", f"{OPTIMIZER}.adam_eps", number, default=1e-8),
    Row("policy.max_grad_norm", f"{OPTIMIZER}.clip_grad", number, default=1.0),
    Row(
        "policy.optimizer.name",
        note="the optimizer is Adam with decoupled weight decay",
        lost=lambda value: value != "torch.optim.AdamW",
    ),
    *drops(
        "is about kernels of the optimizer",
        "policy.optimizer.kwargs.foreach",
        "policy.optimizer.kwargs.fused",
    ),
    Row("policy.scheduler.*.kwargs.total_iters", f"{OPTIMIZER}.lr_warmup_fraction", part),
    Row(
        "policy.scheduler.*.kwargs.T_max",
        f"{OPTIMIZER}.lr_decay_fraction",
        part,
        note="the learning rate falls on a line here, to min_lr",
    ),
    Row("policy.scheduler.*.kwargs.eta_min", f"{OPTIMIZER}.min_lr", number),
    Row(
        "policy.scheduler.*.name",
        note="warm-up, constant, linear decay",
        lost=lambda value: str(value).rpartition(".")[2] not in KNOWN_SCHEDULES,
    ),
    *drops(
        "follows from the shares of the run",
        "policy.scheduler.*.kwargs.start_factor",
        "policy.scheduler.*.kwargs.end_factor",
        "policy.scheduler.*.kwargs.factor",
        "policy.scheduler.*.milestones",
    ),
    Row("policy.precision", "student.dtype", dtype, default="bfloat16"),
)
DATA = (
    Row("data.train.data_files", "data.path", one_path, note=TEXT_NOTE),
    Row("data.arrow_files", "data.path", one_path, note=TEXT_NOTE),
    Row("data.train.text_key", "data.response_key", text, note=TEXT_NOTE),
    Row(
        "data.collator_mode",
        note="rows need a prompt and an answer; NeMo's text mode trains on raw text",
        lost=lambda value: value == "text",
    ),
    Row("data.kd_alignment_regions", note="all of an answer is trained", lost=some),
    *drops("rows are read as they are (docs/off_policy.md)", "data.**"),
)
LOGS = (
    Row("checkpointing.checkpoint_dir", "run.dir", run_dir),
    Row("checkpointing.checkpoint_dir", "run.name", run_name),
    Row("checkpointing.save_period", "checkpoint.save_interval", positive, default=600),
    Row(
        "checkpointing.keep_top_k",
        "checkpoint.keep_last",
        positive,
        note="the newest ones; checkpoint.keep_best keeps the best of evaluations",
    ),
    *drops("checkpoints are always written, and go by evaluate.metric", "checkpointing.**"),
    Row("logger.wandb_enabled", "logging.wandb", boolean),
    Row("logger.tensorboard_enabled", "logging.tensorboard", boolean),
    Row("logger.wandb.project", "logging.wandb_project", text),
    *drops("has no counterpart, and does not change what is learned", "logger.**"),
    *drops(
        "ranks are torchrun's here; the recipe's cluster section declares servers' devices",
        "cluster.**",
    ),
)
RUN = (*PARALLEL, *BATCHES, *OPTIMIZER_ROWS, *DATA, *LOGS)
