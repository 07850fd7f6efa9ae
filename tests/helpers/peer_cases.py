"""More cases for `tests.helpers.peers`: NeMo-RL's and twinkle's."""

from __future__ import annotations

from typing import Any

from tests.helpers.peers import Case

OLD: dict[str, Any] = {"loss_fn.gold_loss": False, "loss_fn.dynamic_loss_scaling": False}
GOLD: dict[str, Any] = {**OLD, "loss_fn.gold_loss": True}
HKL: dict[str, Any] = {**GOLD, "loss_fn.xtoken_loss": True}
V6: dict[str, Any] = {
    "teachers.0.model_name": "t",
    "teachers.0.aligner.projection_matrix_path": "p.pt",
}
DIRECT: dict[str, Any] = {"teachers.0.model_name": "t"}
PACKED: dict[str, Any] = {"policy.sequence_packing.enabled": True}
BETAS = "policy.optimizer.kwargs.betas"
NEMO_RL_CASES: list[Case] = [
    (OLD, "teachers.teacher.loss", "ctkd"),
    (GOLD, "teachers.teacher.loss", "gold"),
    (HKL, "teachers.teacher.loss", "ctkd"),
    (HKL, "ctkd.loss_type", "hkl"),
    (DIRECT, "teachers.t.loss", "kl"),
    (V6, "teachers.t.loss", "ctkd"),
    (V6, "ctkd.lambda_chunk", 1.0),
    ({"loss_fn.temperature": 2}, "distillation.temperature", 2.0),
    ({**OLD, "loss_fn.vocab_topk": 16}, "distillation.shared_columns", 16),
    ({**OLD, "loss_fn.vocab_topk": 0}, "distillation.shared_columns", None),
    ({**GOLD, "loss_fn.uncommon_topk": 16}, "gold.top_u", 16),
    ({**HKL, "loss_fn.uncommon_topk": 16}, "ctkd.hkl.top_u", 16),
    ({**OLD, "loss_fn.reverse_kl": True}, "ctkd.divergence.kind", "reverse_kl"),
    ({**DIRECT, "loss_fn.reverse_kl": True}, "kl.divergence.kind", "reverse_kl"),
    ({**GOLD, "loss_fn.reverse_kl": True}, "gold.divergence.kind", "reverse_kl"),
    (
        {**DIRECT, "loss_fn.dynamic_loss_scaling": False, "teachers.0.weight": 0.5},
        "distillation.distillation_weight",
        0.5,
    ),
    ({**OLD, "loss_fn.kl_loss_weight": 3}, "distillation.distillation_weight", 3.0),
    ({**OLD, "loss_fn.ce_loss_scale": 3}, "distillation.crossentropy_weight", 3.0),
    ({"loss_fn.dynamic_loss_scaling": True}, "distillation.balance", "dynamic"),
    (
        {"loss_fn.dynamic_loss_scaling": True, "loss_fn.ce_loss_scale": 0.1},
        "distillation.crossentropy_weight",
        1.0,
    ),
    (OLD, "distillation.balance", "fixed"),
    ({"loss_fn.kd_loss_mode": "select_teacher"}, "distillation.teacher_selection", "best"),
    ({"loss_fn.sum_weights_metric": "max_prob"}, "distillation.teacher_weighting", "confidence"),
    (
        {"loss_fn.sum_weights_metric": "ce", "loss_fn.alpha": 2},
        "distillation.sharpness",
        2.0,
    ),
    ({**V6, "loss_fn.prefix_bidir_v3_loss_fn": "jsd"}, "ctkd.divergence.kind", "jsd"),
    ({**V6, "loss_fn.prefix_bidir_v3_jsd_beta": 0.2}, "ctkd.divergence.beta", 0.2),
    ({"loss_fn.teacher_topk_ipc_k": 32}, "distillation.top_k", 32),
    ({**OLD, "token_aligner.learnable": True}, "ctkd.learned.enabled", True),
    ({"policy.model_name": "m"}, "student.model", "m"),
    ({"policy.tokenizer.name": "m"}, "student.tokenizer", "m"),
    ({"teacher.model_name": "t"}, "teachers.t.model", "t"),
    ({"teacher.tokenizer.name": "t"}, "teachers.teacher.tokenizer", "t"),
    ({"teachers.0.model_name": "a", "teachers.1.model_name": "b"}, "teachers.b.model", "b"),
    ({**DIRECT, "teachers.0.tokenizer.name": "k"}, "teachers.t.tokenizer", "k"),
    ({**DIRECT, "teachers.0.weight": 0.5}, "teachers.t.weight", 0.5),
    (
        {"policy.dtensor_cfg.tensor_parallel_size": 2},
        "student.parallel.tensor_model_parallel_size",
        2,
    ),
    ({"policy.dtensor_cfg.context_parallel_size": 2}, "student.parallel.context_parallel_size", 2),
    ({"policy.dtensor_cfg.sequence_parallel": True}, "student.parallel.sequence_parallel", True),
    (
        {"policy.dtensor_cfg.activation_checkpointing": False},
        "student.recompute.granularity",
        None,
    ),
    ({"distillation.num_prompts_per_step": 3}, "train.num_prompts_per_step", 3),
    ({"distillation.max_num_steps": 3}, "train.steps", 3),
    ({"distillation.seed": 3}, "run.seed", 3),
    ({"policy.train_micro_batch_size": 3}, "train.micro_batch_size", 3),
    ({"policy.max_total_sequence_length": 3}, "rollout.max_new_tokens", 3),
    (PACKED, "train.packing", True),
    (
        {**PACKED, "policy.sequence_packing.train_mb_tokens": 9},
        "train.max_tokens_per_micro_batch",
        9,
    ),
    ({"policy.optimizer.kwargs.lr": 1e-3}, "student.optimizer.lr", 1e-3),
    ({"policy.optimizer.kwargs.weight_decay": 0.2}, "student.optimizer.weight_decay", 0.2),
    ({BETAS: [0.8, 0.7]}, "student.optimizer.adam_beta1", 0.8),
    ({BETAS: [0.8, 0.7]}, "student.optimizer.adam_beta2", 0.7),
    ({"policy.optimizer.kwargs.eps": 1e-4}, "student.optimizer.adam_eps", 1e-4),
    ({"policy.max_grad_norm": 0.2}, "student.optimizer.clip_grad", 0.2),
    (
        {"policy.scheduler.0.kwargs.total_iters": 5, "distillation.max_num_steps": 20},
        "student.optimizer.lr_warmup_fraction",
        0.25,
    ),
    (
        {"policy.scheduler.1.kwargs.T_max": 15, "distillation.max_num_steps": 20},
        "student.optimizer.lr_decay_fraction",
        0.75,
    ),
    ({"policy.scheduler.1.kwargs.eta_min": 1e-9}, "student.optimizer.min_lr", 1e-9),
    ({"policy.precision": "float32"}, "student.dtype", "float32"),
    ({"data.train.data_files": "d"}, "data.path", "d"),
    ({"data.arrow_files": "d"}, "data.path", "d"),
    ({"data.train.text_key": "k"}, "data.response_key", "k"),
    ({"checkpointing.checkpoint_dir": "a/b"}, "run.dir", "a"),
    ({"checkpointing.checkpoint_dir": "a/b"}, "run.name", "b"),
    ({"checkpointing.save_period": 3}, "checkpoint.save_interval", 3),
    ({"checkpointing.keep_top_k": 3}, "checkpoint.keep_last", 3),
    ({"logger.wandb_enabled": True}, "logging.wandb", True),
    ({"logger.tensorboard_enabled": False}, "logging.tensorboard", False),
    ({"logger.wandb.project": "p"}, "logging.wandb_project", "p"),
]
CROSS: dict[str, Any] = {"TEACHER_MODEL_IDS": "a/x,a/y"}
SORTED: dict[str, Any] = {**CROSS, "LOSS_TYPE": "hkl"}
PKL: dict[str, Any] = {**CROSS, "LOSS_TYPE": "pkl"}


def both(lower: str, *upper: str, value: Any, target: str, made: Any, **more: Any) -> list[Case]:
    """The argument of the loss and the variables that stand for it."""
    base = {key.replace("__", "."): one for key, one in more.items()}
    return [({**base, name: value}, target, made) for name in (lower, *upper)]


TWINKLE_CASES: list[Case] = [
    *both(
        "loss_type",
        *("CTKD_LOSS_TYPE", "LOSS_TYPE"),
        value="hkl",
        target="ctkd.loss_type",
        made="hkl",
    ),
    ({"teacher_model_ids": ["t"]}, "ctkd.loss_type", "auto"),
    *both("max_length", "CTKD_MAX_LENGTH", value="3", target="ctkd.max_length", made=3),
    ({**CROSS, "MAX_LENGTH": "3"}, "ctkd.max_length", 3),
    *both("gamma", "CTKD_GAMMA", value="0.2", target="ctkd.gamma", made=0.2),
    ({**PKL, "GAMMA": "0.2"}, "ctkd.gamma", 0.2),
    *both(
        "temperature",
        *("CTKD_TEMPERATURE", "TEMPERATURE"),
        value="2",
        target="distillation.temperature",
        made=2.0,
    ),
    (CROSS, "distillation.temperature", 1.2),
    ({**CROSS, "teacher_weights": [1, 3]}, "teachers.y.weight", 3.0),
    ({**CROSS, "TEACHER_WEIGHTS": "1,3"}, "teachers.y.weight", 3.0),
    (CROSS, "teachers.y.weight", 0.8),
    ({"topk": 9}, "distillation.top_k", 9),
    ({"CTKD_TOPK": "9"}, "distillation.top_k", 9),
    *both("vocab_topk", "VOCAB_TOPK", value=9, target="distillation.shared_columns", made=9, **PKL),
    *both("uncommon_topk", "UNCOMMON_TOPK", value=9, target="ctkd.hkl.top_u", made=9, **SORTED),
    *both(
        "reverse_kl",
        "REVERSE_KL",
        value="true",
        target="ctkd.divergence.kind",
        made="reverse_kl",
        **PKL,
    ),
    *both("gamma_kl", "GAMMA_KL", value=0.25, target="ctkd.hkl.lambda_uld", made=3.0, **SORTED),
    *both("gamma_uld", "GAMMA_ULD", value=0.75, target="ctkd.hkl.lambda_uld", made=1.5, **SORTED),
    *both(
        "kl_loss_weight",
        "KL_LOSS_WEIGHT",
        value=0.3,
        target="distillation.distillation_weight",
        made=0.3,
    ),
    *both(
        "ce_loss_weight",
        "CE_LOSS_WEIGHT",
        value=0.3,
        target="distillation.crossentropy_weight",
        made=0.3,
    ),
    *both(
        "dynamic_loss_scaling",
        "DYNAMIC_LOSS_SCALING",
        value="true",
        target="distillation.balance",
        made="dynamic",
        **CROSS,
    ),
    ({"exact_token_match_only": True}, "ctkd.map", "exact"),
    *both("student_model_id", "STUDENT_MODEL_ID", value="ms://m", target="student.model", made="m"),
    *both("teacher_model_ids", "TEACHER_MODEL_IDS", value="t", target="teachers.t.model", made="t"),
    ({"TEACHER_MODEL_ID": "ms://a/t"}, "teachers.t.model", "a/t"),
    ({"TEACHER_MODEL_ID": "a/t", "TEACHER_MODEL_ID_2": "a/u"}, "teachers.u.model", "a/u"),
    *both("dataset_id", "DATASET_ID", value="d", target="data.path", made="d"),
    *both("batch_size", "BATCH_SIZE", value=3, target="train.num_prompts_per_step", made=6),
    *both("batch_size", "BATCH_SIZE", value=3, target="train.micro_batch_size", made=3),
    *both(
        "gradient_accumulation_steps",
        "GRADIENT_ACCUMULATION_STEPS",
        value=3,
        target="train.num_prompts_per_step",
        made=24,
    ),
    *both("learning_rate", "LR", value="1e-3", target="student.optimizer.lr", made=1e-3),
    *both("max_steps", "MAX_STEPS", value=3, target="train.steps", made=3),
    *both("max_new_tokens", "MAX_NEW_TOKENS", value=3, target="rollout.max_new_tokens", made=3),
    *both(
        "n_samples",
        "N_SAMPLES",
        value=2,
        target="rollout.num_generations_per_prompt",
        made=2,
        **CROSS,
    ),
]
