"""Rows that trainers on Hugging Face's `TrainingArguments` share: TRL and ms-swift."""

from __future__ import annotations

from typing import Any

from mopd.config.peers.rows import Row, Source, drops
from mopd.config.peers.values import (
    CONSTANT,
    boolean,
    decay,
    integer,
    is_on,
    number,
    one_path,
    positive,
    recompute,
    run_dir,
    run_name,
    text,
    truth,
    warmup,
)

STEPS_NOTE = "epochs are not counted here: set train.steps"


def rising(source: Source) -> float:
    """The warm-up's share of the run."""
    return warmup(source, ratio="warmup_ratio", steps="warmup_steps", total="max_steps")


def falling(value: Any, source: Source) -> float:
    return decay(value, rising(source))


def is_curved(source: Source) -> bool:
    """Whether the learning rate falls in another way than on a line."""
    kind = source.get("lr_scheduler_type")
    return kind is not None and kind not in (*CONSTANT, "linear")


def is_straight(source: Source) -> bool:
    return not is_curved(source)


def reports_to(name: str) -> Any:
    """Whether `report_to` names a tracker."""

    def named(value: Any, source: Source) -> bool:
        names = value if isinstance(value, list) else text(value).replace(",", " ").split()
        return name in names or "all" in names

    return named


def not_adam(value: Any) -> bool:
    return not str(value).startswith(("adamw_torch", "adamw_apex", "adamw_hf"))


def wandb_named(source: Source) -> bool:
    try:
        return bool(reports_to("wandb")(source.get("report_to") or "none", source))
    except ValueError:
        return False


def optimizer_rows(*, weight_decay: float, adam_beta2: float, schedule: str) -> tuple[Row, ...]:
    """Adam, its schedule, and how long it runs. Arguments are the trainer's defaults."""
    place = "student.optimizer"
    return (
        Row("adam_beta1", f"{place}.adam_beta1", number, default=0.9),
        Row("adam_beta2", f"{place}.adam_beta2", number, default=adam_beta2),
        Row("adam_epsilon", f"{place}.adam_eps", number, default=1e-8),
        Row("weight_decay", f"{place}.weight_decay", number, default=weight_decay),
        Row("max_grad_norm", f"{place}.clip_grad", number, default=1.0),
        Row(
            "warmup_ratio",
            f"{place}.lr_warmup_fraction",
            lambda value, source: rising(source),
            default=0.0,
        ),
        Row("warmup_steps", f"{place}.lr_warmup_fraction", lambda value, source: rising(source)),
        Row(
            "lr_scheduler_type",
            f"{place}.lr_decay_fraction",
            falling,
            when=is_straight,
            default=schedule,
        ),
        Row(
            "lr_scheduler_type",
            f"{place}.lr_decay_fraction",
            falling,
            when=is_curved,
            note="the learning rate falls on a line here, to min_lr",
        ),
        Row("optim", note="the optimizer is Adam with decoupled weight decay", lost=not_adam),
        Row(
            "max_steps",
            "train.steps",
            positive,
            when=lambda source: source.get("max_steps") not in (-1, "-1"),
        ),
        Row("num_train_epochs", note=STEPS_NOTE),
    )


def run_rows(*, save_steps: int) -> tuple[Row, ...]:
    """Seeds, directories, checkpoints and logs."""
    return (
        Row("seed", "run.seed", integer, default=42),
        Row("output_dir", "run.dir", run_dir),
        Row("output_dir", "run.name", run_name),
        Row("save_steps", "checkpoint.save_interval", positive, default=save_steps),
        Row("save_total_limit", "checkpoint.keep_last", positive),
        Row("gradient_checkpointing", "student.recompute.granularity", recompute, default=True),
        Row("report_to", "logging.wandb", reports_to("wandb")),
        Row("report_to", "logging.tensorboard", reports_to("tensorboard")),
        *drops(
            "evaluations need data.heldout_path: set evaluate.interval with it",
            *(
                "eval_strategy",
                "eval_steps",
                "eval_on_start",
                "do_eval",
                "per_device_eval_batch_size",
            ),
            *("metric_for_best_model", "greater_is_better", "load_best_model_at_end"),
        ),
        *drops(
            "has no counterpart, and does not change what is learned",
            *("logging_dir", "logging_first_step", "logging_strategy", "save_strategy", "run_name"),
            *("save_only_model", "save_safetensors", "overwrite_output_dir", "disable_tqdm"),
            *("dataloader_num_workers", "dataloader_pin_memory", "dataset_num_proc", "data_seed"),
            *("dataloader_prefetch_factor", "dataloader_persistent_workers", "ddp_timeout"),
            *("dataloader_drop_last", "remove_unused_columns", "trust_remote_code", "do_train"),
            *("gradient_checkpointing_kwargs", "attn_implementation", "attn_impl", "tf32"),
            *("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_token"),
            *(
                "hub_model_revision",
                "log_level",
                "local_rank",
                "bf16_full_eval",
                "log_on_each_node",
            ),
            *("ddp_find_unused_parameters", "torch_compile", "group_by_length", "padding_free"),
            *(
                "deepspeed",
                "fsdp",
                "fsdp_config",
                "config",
                "ddp_backend",
                "include_tokens_per_second",
            ),
        ),
        Row(
            "resume_from_checkpoint",
            note="checkpoints of other trainers are not read; export the model and start from it",
            lost=lambda value: str(value).lower() != "false",
        ),
        Row("fp16", note="mopd trains in bfloat16 or float32", lost=is_on),
    )


def sampling_rows(*, on: str = "use_vllm") -> tuple[Row, ...]:
    """vLLM as the sampler. Both trainers name its keys alike."""
    uses = truth(on)

    def serves(source: Source) -> bool:
        return uses(source) and source.get("vllm_mode") == "server"

    def shares(source: Source) -> bool:
        return uses(source) and source.get("vllm_mode") == "colocate"

    backend = "rollout.backend"
    return (
        Row(on, f"{backend}.type", lambda value, source: "vllm" if boolean(value) else "hf"),
        Row("vllm_mode", f"{backend}.mode", text, when=uses),
        Row("vllm_gpu_memory_utilization", f"{backend}.memory_fraction", number, when=shares),
        Row(
            "vllm_tensor_parallel_size",
            f"{backend}.server.tensor_parallel_size",
            positive,
            when=serves,
        ),
        *drops(
            "mopd starts stock vLLM itself; servers of your own stand in rollout.backend.urls",
            *("vllm_server_host", "vllm_server_port", "vllm_server_base_url", "vllm_group_port"),
            *("vllm_server_timeout", "vllm_server_group_port"),
        ),
        *drops(
            "engine options stand in rollout.backend.server.args",
            *("vllm_max_model_len", "vllm_max_model_length", "vllm_model_impl", "sleep_level"),
            *("vllm_enable_sleep_mode", "vllm_limit_mm_per_prompt", "vllm_enforce_eager"),
            *("vllm_enable_prefix_caching", "vllm_max_num_seqs", "vllm_disable_cascade_attention"),
            *("offload_optimizer", "offload_model", "use_transformers_paged"),
        ),
        Row(
            "vllm_sync_frequency",
            note="the sampler has the weights of every step (rollout.max_staleness lets it lag)",
            lost=lambda value: str(value) != "1",
        ),
    )


DATA_NOTE = (
    "nothing is downloaded: export the rows to a local file; docs/recipes.md has their fields"
)


def data_row(key: str) -> Row:
    return Row(key, "data.path", one_path, note=DATA_NOTE)
