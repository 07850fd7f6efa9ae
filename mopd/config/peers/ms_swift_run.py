"""ms-swift's keys of the run around the loss, Megatron-SWIFT's among them."""

from __future__ import annotations

from typing import Any

from mopd.config.peers.hf_trainer import optimizer_rows, run_rows
from mopd.config.peers.rows import Row, Source, drops
from mopd.config.peers.values import batch, decay, number, positive, share, text, truth

MEGATRON_KEYS = (
    "micro_batch_size",
    "global_batch_size",
    "train_iters",
    "lr",
    "lr_decay_style",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
)


def is_opd(source: Source) -> bool:
    return source.get("rlhf_type") == "grpo"


def is_megatron(source: Source) -> bool:
    return source.has(*MEGATRON_KEYS)


def uses_lora(source: Source) -> bool:
    kind = source.get("tuner_type") or source.get("train_type")
    return kind == "lora" if kind is not None else not is_megatron(source)


def accumulation(source: Source) -> int:
    """Theirs reaches 16 answers a step where it is not set; OPD-RL takes 1."""
    if source.has("gradient_accumulation_steps"):
        return positive(source.get("gradient_accumulation_steps"))
    if is_opd(source):
        return 1
    answers = positive(source.get("per_device_train_batch_size")) * source.processes
    return -(-16 // answers)


def generations(source: Source) -> int:
    return positive(source.get("num_generations")) if is_opd(source) else 1


def prompts(value: Any, source: Source) -> int:
    answers = positive(source.get("per_device_train_batch_size")) * accumulation(source)
    return batch(source, sequences=answers, generations=generations(source))


def global_prompts(value: Any, source: Source) -> int:
    total = positive(value)
    if total % generations(source):
        raise ValueError(f"{total} answers are no multiple of {generations(source)} a prompt")
    return total // generations(source)


BATCH_NOTE = "prompts of a whole step: answers of a process x accumulation x processes"
BATCHES = (
    Row(
        "per_device_train_batch_size",
        "train.num_prompts_per_step",
        prompts,
        default=1,
        note=BATCH_NOTE,
        when=lambda source: not is_megatron(source),
    ),
    Row(
        "per_device_train_batch_size",
        "train.micro_batch_size",
        positive,
        when=lambda source: not is_megatron(source),
    ),
    Row(
        "gradient_accumulation_steps",
        "train.num_prompts_per_step",
        prompts,
        note=BATCH_NOTE,
        when=lambda source: not is_megatron(source),
    ),
    Row(
        "global_batch_size",
        "train.num_prompts_per_step",
        global_prompts,
        default=16,
        when=is_megatron,
    ),
    Row("micro_batch_size", "train.micro_batch_size", positive, default=1, when=is_megatron),
    Row(
        "learning_rate",
        "student.optimizer.lr",
        number,
        default=lambda source: source.get("lr") or (1e-4 if uses_lora(source) else 1e-5),
    ),
    Row("lr", "student.optimizer.lr", number),
    Row("min_lr", "student.optimizer.min_lr", number),
    Row("train_iters", "train.steps", positive),
    Row("lr_warmup_fraction", "student.optimizer.lr_warmup_fraction", share),
    Row(
        "lr_decay_style",
        "student.optimizer.lr_decay_fraction",
        lambda value, source: decay(value, share(source.get("lr_warmup_fraction") or 0)),
        note="the learning rate falls on a line here, to min_lr",
    ),
    Row("clip_grad", "student.optimizer.clip_grad", number),
    *(
        Row(key, f"student.parallel.{key}", positive)
        for key in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "virtual_pipeline_model_parallel_size",
            "context_parallel_size",
            "expert_model_parallel_size",
        )
    ),
    Row(
        "sequence_parallel",
        "student.parallel.sequence_parallel",
        lambda value, source: truth("sequence_parallel")(source),
    ),
    Row("packing", "train.packing", lambda value, source: truth("packing")(source)),
    Row("recompute_granularity", "student.recompute.granularity", text),
    Row("recompute_method", "student.recompute.method", text),
    Row("recompute_num_layers", "student.recompute.num_layers", positive),
    *optimizer_rows(weight_decay=0.1, adam_beta2=0.95, schedule="cosine"),
)
LOGS = (
    Row("logging_steps", "logging.log_interval", positive, default=5),
    Row("log_interval", "logging.log_interval", positive),
    Row("save_interval", "checkpoint.save_interval", positive),
    Row("save", "run.dir", text),
    Row("wandb_project", "logging.wandb_project", text),
    *run_rows(save_steps=500),
    Row("router_aux_loss_coef", "student.moe_aux_loss_coeff", number),
    *drops(
        "has no counterpart, and does not change what is learned",
        "teacher_deepspeed",
        "offload_teacher_model",
        "log_completions",
        "model_type",
        "template",
        "use_hf",
        "split_dataset_ratio",
        "num_train_epochs",
        "max_epochs",
        "load_from_cache_file",
        "external_plugins",
        "model_author",
        "model_name",
        "teacher_model_type",
        "teacher_model_revision",
        "model_revision",
        "finetune",
        "no_save_optim",
        "no_save_rng",
        "attention_backend",
        "cross_entropy_loss_fusion",
        "num_workers",
        "eval_interval",
        "eval_iters",
        "add_version",
        "freeze_vit",
        "freeze_aligner",
        "load_safetensors",
        "save_safetensors",
        "swanlab_project",
        "use_liger_kernel",
        "vllm_mm_processor_cache_gb",
        "use_distributed_optimizer",
        "overlap_grad_reduce",
        "overlap_param_gather",
    ),
    Row("val_dataset", note="set data.validation_path, or data.heldout_path with answers"),
    *drops(
        "prompts are not cut here, and answers by rollout.max_new_tokens",
        "max_length",
        "truncation_strategy",
    ),
)
RUN = (*BATCHES, *LOGS)
