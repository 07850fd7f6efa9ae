"""TRL's GOLD trainer: `GOLDConfig` with what it inherits, `ModelConfig` and `ScriptArguments`."""

from __future__ import annotations

from typing import Any

from mopd.config.peers.hf_trainer import data_row, optimizer_rows, run_rows, sampling_rows
from mopd.config.peers.rows import Peer, Row, Source, drops
from mopd.config.peers.values import (
    batch,
    differs,
    fixed,
    is_on,
    mixed,
    modules,
    number,
    positive,
    share,
    some,
    teacher_names,
    text,
    truth,
)

USES_ULD = truth("use_uld_loss")
IS_HYBRID = truth("uld_use_hybrid_loss")
USES_LORA = truth("use_peft")
UNREAD = "is read by TRL with use_uld_loss alone"


def loss(value: Any, source: Source) -> str:
    """The loss that the switches together choose."""
    if not USES_ULD(source):
        return "kl"
    return "gold" if IS_HYBRID(source) else "uld"


def is_kl(source: Source) -> bool:
    return not USES_ULD(source)


def is_gold(source: Source) -> bool:
    return USES_ULD(source) and IS_HYBRID(source)


def is_sorted(source: Source) -> bool:
    return USES_ULD(source) and not IS_HYBRID(source)


def has_one_temperature(source: Source) -> bool:
    return source.get("uld_student_temperature") == source.get("uld_teacher_temperature")


def prompts(value: Any, source: Source) -> int:
    return batch(
        source,
        sequences=positive(source.get("per_device_train_batch_size"))
        * positive(source.get("gradient_accumulation_steps")),
        generations=positive(source.get("num_generations")),
    )


def temperature(value: Any, source: Source) -> float:
    if not has_one_temperature(source):
        raise ValueError("student and teacher share one temperature here")
    return number(value)


def _uld(key: str, target: str, to: Any, default: Any, *, note: str = "") -> tuple[Row, Row]:
    """A key that counts with use_uld_loss alone."""
    return (
        Row(key, target, to=to, default=default, when=USES_ULD, note=note),
        Row(key, note=UNREAD, when=is_kl),
    )


BETA_NOTE = ""
LOSS = (
    Row("use_uld_loss", "distillation.loss", loss, default=False),
    Row("uld_use_hybrid_loss", "distillation.loss", loss, when=USES_ULD, default=False),
    Row("uld_use_hybrid_loss", note=UNREAD, when=is_kl),
    Row("beta", "kl.divergence.beta", share, default=0.5, when=is_kl),
    Row("beta", "gold.divergence.beta", share, when=is_gold),
    Row("beta", note="the sorted loss has no divergence, in TRL as here", when=is_sorted),
    Row(
        "use_extended_uld",
        "distillation.alignment",
        lambda value, source: "bytes" if truth("use_extended_uld")(source) else "position",
        default=True,
        when=USES_ULD,
        note="chunks lie between common byte boundaries, with or without ByteLevel tokenizers; "
        "off pairs tokens by index, which here is a negative control",
    ),
    Row("use_extended_uld", note=UNREAD, when=is_kl),
    Row("uld_hybrid_matched_weight", "gold.matched_weight", number, when=is_gold),
    Row("uld_hybrid_unmatched_weight", "gold.unmatched_weight", number, when=is_gold),
    *_uld(
        "uld_crossentropy_weight",
        "distillation.crossentropy_weight",
        number,
        0.0,
        note="a mean over the tokens of the whole step, not of each micro-batch",
    ),
    *_uld("uld_distillation_weight", "distillation.distillation_weight", number, 1.0),
    *_uld("uld_teacher_temperature", "distillation.temperature", temperature, 1.0),
    *_uld("uld_student_temperature", "distillation.temperature", temperature, 1.0),
    *drops(
        "the end of the turn is paired with the teacher's and trained, so that stopping is learned",
        "uld_skip_student_eos",
        "uld_skip_teacher_eos",
    ),
)
MODELS = (
    Row("model_name_or_path", "student.model", text),
    Row("teacher_model_name_or_path", "teachers.{teacher}.model", text),
    Row("teacher_tokenizer_name_or_path", "teachers.{teacher}.tokenizer", text),
    data_row("dataset_name"),
    Row("bf16", "student.dtype", mixed, default=True),
    Row(
        "use_peft",
        "student.lora.rank",
        when=USES_LORA,
        to=lambda value, source: positive(source.get("lora_r")),
    ),
    Row("lora_r", "student.lora.rank", positive, default=16, when=USES_LORA),
    Row("lora_alpha", "student.lora.alpha", number, default=32, when=USES_LORA),
    Row("lora_target_modules", "student.lora.target_modules", modules, when=USES_LORA),
    Row(
        "lora_dropout",
        note="adapters have no dropout here",
        default=0.05,
        when=USES_LORA,
        lost=differs(0.0),
    ),
    Row("eos_token", "student.eos_token", text),
    Row("load_in_4bit", note="mopd trains no quantised model", lost=is_on),
    Row("load_in_8bit", note="mopd trains no quantised model", lost=is_on),
    *drops(
        "files are local directories of one revision",
        "student_model_revision",
        "teacher_model_revision",
        "model_revision",
        "dataset_config",
        "dataset_train_split",
        "dataset_test_split",
        "dataset_streaming",
    ),
    *drops(
        "dtype and attention of the teacher are its backend's",
        "teacher_model_init_kwargs.**",
        "teacher_model_init_kwargs",
        "model_init_kwargs.**",
        "model_init_kwargs",
        "dtype",
        "torch_dtype",
    ),
    Row("chat_template_path", note="each tokenizer's own template is used", lost=some),
)
SAMPLING = (
    Row(
        "lmbda",
        "rollout.lmbda",
        share,
        default=0.5,
        note="the share of prompts of every step that the student answers; TRL draws for each "
        "micro-batch as a whole",
    ),
    Row(
        "seq_kd",
        "rollout.off_policy",
        lambda value, source: "teacher" if truth("seq_kd")(source) else "dataset",
        default=False,
    ),
    Row(
        "temperature",
        "rollout.temperature",
        number,
        default=0.9,
        note="of sampling alone; the loss has its own (TRL's is 1 without use_liger_kernel)",
    ),
    Row(
        "top_p",
        note="mopd samples from the whole distribution (top_p=1), which is what the losses judge",
        default=0.95,
        lost=differs(1.0),
    ),
    Row(
        "top_k",
        note="mopd samples from the whole distribution; top_k of a recipe is the teacher's list",
        default=0,
        lost=differs(0),
    ),
    Row("max_completion_length", "rollout.max_new_tokens", positive, default=128),
    Row("num_generations", "rollout.num_generations_per_prompt", positive, default=1),
    Row("max_length", note="prompts are not cut here, and answers by rollout.max_new_tokens"),
    Row("vllm_mode", "rollout.backend.mode", text, default="server", when=truth("use_vllm")),
    *sampling_rows(),
    Row("vllm_structured_outputs_regex", note="answers are sampled freely", lost=some),
    Row("vllm_guided_decoding_regex", note="answers are sampled freely", lost=some),
)
BATCH_NOTE = (
    "prompts of a whole step: answers of a process x accumulation x processes / num_generations"
)
BATCHES = (
    Row(
        "per_device_train_batch_size",
        "train.num_prompts_per_step",
        prompts,
        default=8,
        note=BATCH_NOTE,
    ),
    Row("per_device_train_batch_size", "train.micro_batch_size", positive),
    Row(
        "gradient_accumulation_steps",
        "train.num_prompts_per_step",
        prompts,
        default=1,
        note=BATCH_NOTE,
    ),
    Row("generation_batch_size", note="follows from the batch and num_generations, as in TRL"),
    Row("learning_rate", "student.optimizer.lr", number, default=1e-7),
    Row("packing", note="train.packing packs answers without cutting them; set it yourself"),
    *optimizer_rows(weight_decay=0.0, adam_beta2=0.999, schedule="linear"),
)
LOGS = (
    Row("logging_steps", "logging.log_interval", positive, default=10),
    Row("wandb_project", "logging.wandb_project", text),
    *run_rows(save_steps=500),
    *drops(
        "has no counterpart, and does not change what is learned",
        "disable_dropout",
        "log_completions",
        "log_completions_steps",
        "num_completions_to_print",
        "wandb_entity",
        "wandb_run_group",
        "wandb_log_unique_prompts",
        "callbacks",
        "overwrite_hub_revision",
        "push_to_hub_revision",
        "dataset_kwargs",
        "packing_strategy",
        "pad_to_multiple_of",
        "eval_packing",
        "activation_offloading",
        "shuffle_dataset",
        "truncation_mode",
        "pad_token",
        "dataset_text_field",
        "completion_only_loss",
        "assistant_only_loss",
    ),
    Row(
        "use_liger_kernel",
        note="the output layer is fused with the loss anyway; TRL's fused "
        "loss divides logits by `temperature`, set distillation.temperature for that",
        lost=is_on,
    ),
    Row("loss_type", note="the divergence is what is trained", lost=some),
)
WAYS = (
    Row(
        "a divergence of whole rows, jsd with 0 and 1 as its ends",
        "kl.divergence.kind",
        fixed("jsd"),
        when=is_kl,
    ),
    Row(
        "a divergence of whole rows, jsd with 0 and 1 as its ends",
        "gold.divergence.kind",
        fixed("jsd"),
        when=is_gold,
    ),
    Row("compares the whole vocabulary", "distillation.top_k", fixed(None)),
    Row("sorts the whole vocabulary", "gold.top_u", fixed(None), when=is_gold),
    Row("sorts the whole vocabulary", "uld.top_u", fixed(None), when=is_sorted),
    Row(
        "sub-distributions without a bin for the rest", "gold.rest_bin", fixed(False), when=is_gold
    ),
    Row(
        "a chunk's first row times the later tokens' probabilities",
        "gold.merge",
        fixed("observed"),
        when=is_gold,
    ),
    Row("no factor of temperature squared", "distillation.scale_by_t2", fixed(False)),
    Row(
        "a mean over tokens",
        "distillation.normalization",
        fixed("token"),
        when=is_kl,
        note="over the tokens of the whole step, where TRL averages means of micro-batches",
    ),
    Row(
        "a mean over each answer, then over answers",
        "distillation.normalization",
        fixed("sequence"),
        when=USES_ULD,
        note="a row weighs 1 / the answer's tokens, where TRL divides by its chunks",
    ),
    Row("no domains", "distillation.domain_normalization", fixed("none")),
    Row("no domains", "train.balance_domains", fixed(False)),
    Row(
        "the student's own model as teacher where none is named",
        "teachers.{teacher}.model",
        lambda value, source: text(source.get("model_name_or_path")),
        when=lambda source: not source.has("teacher_model_name_or_path"),
    ),
)

TRL = Peer(
    name="trl",
    title="TRL",
    rows=(*LOSS, *MODELS, *SAMPLING, *BATCHES, *LOGS),
    ways=WAYS,
    marks=(
        "use_uld_loss",
        "uld_**",
        "use_extended_uld",
        "teacher_model_name_or_path",
        "teacher_tokenizer_name_or_path",
        "teacher_model_init_kwargs.**",
    ),
    teachers=lambda source: teacher_names([source.get("teacher_model_name_or_path")]),
)
