"""Files of other trainers for tests: the examples of the documents, and what fits each key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"
EXAMPLE = {
    "trl": EXAMPLES / "trl_gold.yaml",
    "nemo-rl": EXAMPLES / "nemo_rl_xtoken.yaml",
    "ms-swift": EXAMPLES / "ms_swift_gkd.sh",
    "twinkle": EXAMPLES / "twinkle_mopd.sh",
}

# One row each: a file, and a key of the recipe with the value that must arrive there.
Case = tuple[dict[str, Any], str, Any]
ULD: dict[str, Any] = {"use_uld_loss": True}
HYBRID: dict[str, Any] = {**ULD, "uld_use_hybrid_loss": True}
LORA: dict[str, Any] = {"use_peft": True}
TRL_CASES: list[Case] = [
    ({"use_uld_loss": False}, "distillation.loss", "kl"),
    (ULD, "distillation.loss", "uld"),
    ({**ULD, "uld_use_hybrid_loss": True}, "distillation.loss", "gold"),
    ({"beta": 0.1}, "kl.divergence.beta", 0.1),
    ({**HYBRID, "beta": 0.1}, "gold.divergence.beta", 0.1),
    ({**ULD, "use_extended_uld": False}, "distillation.alignment", "position"),
    (
        {**HYBRID, "uld_hybrid_matched_weight": 0.3, "uld_hybrid_unmatched_weight": 0.7},
        "gold.matched_weight",
        0.3,
    ),
    (
        {**HYBRID, "uld_hybrid_matched_weight": 0.3, "uld_hybrid_unmatched_weight": 0.7},
        "gold.unmatched_weight",
        0.7,
    ),
    ({**ULD, "uld_crossentropy_weight": 0.2}, "distillation.crossentropy_weight", 0.2),
    ({**ULD, "uld_distillation_weight": 0.4}, "distillation.distillation_weight", 0.4),
    (
        {**ULD, "uld_student_temperature": 2, "uld_teacher_temperature": 2},
        "distillation.temperature",
        2.0,
    ),
    ({"model_name_or_path": "m"}, "student.model", "m"),
    ({"teacher_model_name_or_path": "t"}, "teachers.t.model", "t"),
    ({"model_name_or_path": "m"}, "teachers.teacher.model", "m"),
    ({"teacher_tokenizer_name_or_path": "t"}, "teachers.teacher.tokenizer", "t"),
    ({"dataset_name": "d"}, "data.path", "d"),
    ({"bf16": False}, "student.dtype", "float32"),
    ({**LORA, "lora_r": 4}, "student.lora.rank", 4),
    (LORA, "student.lora.rank", 16),
    ({**LORA, "lora_alpha": 4}, "student.lora.alpha", 4.0),
    ({**LORA, "lora_target_modules": ["q_proj"]}, "student.lora.target_modules", ["q_proj"]),
    ({"eos_token": "<e>"}, "student.eos_token", "<e>"),
    ({"lmbda": 0.2}, "rollout.lmbda", 0.2),
    ({"seq_kd": True}, "rollout.off_policy", "teacher"),
    ({"temperature": 0.7}, "rollout.temperature", 0.7),
    ({"max_completion_length": 9}, "rollout.max_new_tokens", 9),
    ({"num_generations": 2}, "rollout.num_generations_per_prompt", 2),
    ({"use_vllm": True}, "rollout.backend.type", "vllm"),
    ({"use_vllm": True, "vllm_mode": "colocate"}, "rollout.backend.mode", "colocate"),
    (
        {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.5},
        "rollout.backend.memory_fraction",
        0.5,
    ),
    (
        {"use_vllm": True, "vllm_tensor_parallel_size": 2},
        "rollout.backend.server.tensor_parallel_size",
        2,
    ),
    ({"per_device_train_batch_size": 3}, "train.micro_batch_size", 3),
    ({"per_device_train_batch_size": 3}, "train.num_prompts_per_step", 3),
    ({"gradient_accumulation_steps": 4}, "train.num_prompts_per_step", 32),
    ({"learning_rate": "3e-6"}, "student.optimizer.lr", 3e-6),
    ({"logging_steps": 3}, "logging.log_interval", 3),
    ({"wandb_project": "p"}, "logging.wandb_project", "p"),
]
TRAINER_CASES: list[Case] = [
    ({"adam_beta1": 0.8}, "student.optimizer.adam_beta1", 0.8),
    ({"adam_beta2": 0.8}, "student.optimizer.adam_beta2", 0.8),
    ({"adam_epsilon": 1e-5}, "student.optimizer.adam_eps", 1e-5),
    ({"weight_decay": 0.3}, "student.optimizer.weight_decay", 0.3),
    ({"max_grad_norm": 0.3}, "student.optimizer.clip_grad", 0.3),
    ({"warmup_ratio": 0.3}, "student.optimizer.lr_warmup_fraction", 0.3),
    ({"warmup_steps": 5, "max_steps": 20}, "student.optimizer.lr_warmup_fraction", 0.25),
    ({"lr_scheduler_type": "constant"}, "student.optimizer.lr_decay_fraction", 0.0),
    (
        {"lr_scheduler_type": "linear", "warmup_ratio": 0.25},
        "student.optimizer.lr_decay_fraction",
        0.75,
    ),
    ({"max_steps": 7}, "train.steps", 7),
    ({"seed": 3}, "run.seed", 3),
    ({"output_dir": "a/b"}, "run.dir", "a"),
    ({"output_dir": "a/b"}, "run.name", "b"),
    ({"save_steps": 3}, "checkpoint.save_interval", 3),
    ({"save_total_limit": 3}, "checkpoint.keep_last", 3),
    ({"gradient_checkpointing": False}, "student.recompute.granularity", None),
    ({"report_to": ["wandb"]}, "logging.wandb", True),
    ({"report_to": ["wandb"]}, "logging.tensorboard", False),
]
GRPO: dict[str, Any] = {"rlhf_type": "grpo", "teacher_model": "t"}
MEGATRON: dict[str, Any] = {"micro_batch_size": 2}
TAGGED = '[{"url":"http://a:1","tags":["math"]},{"url":"http://b:1","tags":["code"]}]'
MS_SWIFT_CASES: list[Case] = [
    ({"rlhf_type": "gkd"}, "distillation.loss", "kl"),
    (GRPO, "distillation.loss", "opd"),
    ({"use_mopd": "true", "teacher_model_group": "a/x,a/y"}, "distillation.loss", "gold"),
    ({"teacher_model_group": "a/x,a/y"}, "teachers.y.model", "a/y"),
    ({"beta": 1}, "kl.divergence.beta", 1.0),
    ({"use_mopd": True, "beta": 1}, "gold.divergence.beta", 1.0),
    ({"lmbda": 1}, "rollout.lmbda", 1.0),
    ({"seq_kd": "true"}, "rollout.off_policy", "teacher"),
    ({"temperature": 0.7}, "rollout.temperature", 0.7),
    ({"temperature": 0.7}, "distillation.temperature", 0.7),
    (
        {"temperature": 0.7, "teacher_model_server": "http://a:1", "gkd_logits_topk": 8},
        "distillation.temperature",
        1.0,
    ),
    ({"sft_alpha": 0.3}, "distillation.crossentropy_weight", 0.3),
    ({"sft_alpha": 0.3, "lmbda": 1}, "distillation.crossentropy_weight", 0.0),
    ({"gkd_logits_topk": 9}, "distillation.top_k", 9),
    ({"gkd_logits_topk": 9}, "kl.divergence.top_k_mode", "renorm"),
    ({**GRPO, "teacher_kl_coef": 0.5}, "distillation.distillation_weight", 0.5),
    ({"model": "m"}, "student.model", "m"),
    ({"teacher_model": "t"}, "teachers.t.model", "t"),
    ({"teacher_model_server": "http://a:1"}, "teachers.teacher.backend.urls", ["http://a:1"]),
    ({"teacher_model_server": TAGGED}, "teachers.code.domains", ["code"]),
    ({"teacher_model_server": TAGGED}, "distillation.teacher_key", "dataset"),
    (
        {"teacher_model_server": TAGGED, "teacher_tag_key": "who"},
        "distillation.teacher_key",
        "who",
    ),
    ({"adapters": ["a"]}, "student.lora.path", "a"),
    ({"dataset": ["d"]}, "data.path", "d"),
    ({"torch_dtype": "float32"}, "student.dtype", "float32"),
    ({"tuner_type": "lora"}, "student.lora.rank", 8),
    ({"train_type": "lora", "lora_rank": 2}, "student.lora.rank", 2),
    ({"tuner_type": "lora", "lora_rank": 2}, "student.lora.rank", 2),
    ({"lora_alpha": 2}, "student.lora.alpha", 2.0),
    ({"target_modules": "q_proj v_proj"}, "student.lora.target_modules", ["q_proj", "v_proj"]),
    ({"max_completion_length": 5}, "rollout.max_new_tokens", 5),
    ({"max_new_tokens": 5}, "rollout.max_new_tokens", 5),
    ({**GRPO, "num_generations": 4}, "rollout.num_generations_per_prompt", 4),
    ({"use_vllm": True}, "rollout.backend.type", "vllm"),
    ({"use_vllm": True, "vllm_mode": "colocate"}, "rollout.backend.mode", "colocate"),
    (
        {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.5},
        "rollout.backend.memory_fraction",
        0.5,
    ),
    (
        {"use_vllm": True, "vllm_mode": "server", "vllm_tensor_parallel_size": 2},
        "rollout.backend.server.tensor_parallel_size",
        2,
    ),
    ({"async_generate": True}, "rollout.max_staleness", 1),
    ({"per_device_train_batch_size": 2}, "train.num_prompts_per_step", 16),
    ({"per_device_train_batch_size": 2}, "train.micro_batch_size", 2),
    ({"gradient_accumulation_steps": 3}, "train.num_prompts_per_step", 3),
    ({"global_batch_size": 24}, "train.num_prompts_per_step", 24),
    (MEGATRON, "train.micro_batch_size", 2),
    ({"learning_rate": 1e-3}, "student.optimizer.lr", 1e-3),
    ({"tuner_type": "full"}, "student.optimizer.lr", 1e-5),
    ({"tuner_type": "lora"}, "student.optimizer.lr", 1e-4),
    ({"lr": 1e-3}, "student.optimizer.lr", 1e-3),
    ({"min_lr": 1e-9}, "student.optimizer.min_lr", 1e-9),
    ({"train_iters": 4}, "train.steps", 4),
    ({**MEGATRON, "lr_warmup_fraction": 0.1}, "student.optimizer.lr_warmup_fraction", 0.1),
    (
        {"lr_decay_style": "cosine", "lr_warmup_fraction": 0.25},
        "student.optimizer.lr_decay_fraction",
        0.75,
    ),
    ({"clip_grad": 0.5}, "student.optimizer.clip_grad", 0.5),
    *(
        ({key: 2}, f"student.parallel.{key}", 2)
        for key in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "virtual_pipeline_model_parallel_size",
            "context_parallel_size",
            "expert_model_parallel_size",
        )
    ),
    ({"sequence_parallel": "true"}, "student.parallel.sequence_parallel", True),
    ({"packing": "true"}, "train.packing", True),
    ({"recompute_granularity": "selective"}, "student.recompute.granularity", "selective"),
    ({"recompute_method": "block"}, "student.recompute.method", "block"),
    ({"recompute_num_layers": 2}, "student.recompute.num_layers", 2),
    ({"logging_steps": 2}, "logging.log_interval", 2),
    ({"log_interval": 2}, "logging.log_interval", 2),
    ({"save_interval": 2}, "checkpoint.save_interval", 2),
    ({"save": "s"}, "run.dir", "s"),
    ({"wandb_project": "p"}, "logging.wandb_project", "p"),
    ({"router_aux_loss_coef": 0.1}, "student.moe_aux_loss_coeff", 0.1),
]
