"""ms-swift's GKD (`rlhf_type gkd`) and OPD-RL (`grpo` with a teacher), Megatron-SWIFT's too."""

from __future__ import annotations

import json
from typing import Any

from mopd.config.peers.hf_trainer import data_row, sampling_rows
from mopd.config.peers.ms_swift_run import RUN, is_opd, uses_lora
from mopd.config.peers.rows import Peer, Row, Source
from mopd.config.peers.values import (
    differs,
    dtype,
    fixed,
    items,
    modules,
    number,
    positive,
    share,
    some,
    teacher_names,
    text,
    truth,
)

IS_MOPD = truth("use_mopd")


def is_gkd(source: Source) -> bool:
    return not is_opd(source)


def is_kl(source: Source) -> bool:
    return is_gkd(source) and not IS_MOPD(source)


def is_gold(source: Source) -> bool:
    return is_gkd(source) and IS_MOPD(source)


def is_served(source: Source) -> bool:
    return source.has("teacher_model_server")


def is_listed(source: Source) -> bool:
    """Whether losses see top-k lists."""
    return source.has("gkd_logits_topk")


def loss(value: Any, source: Source) -> str:
    if is_opd(source):
        return "opd"
    if source.get("rlhf_type") not in (None, "gkd"):
        raise ValueError(f"{text(value)} is no distillation; gkd and grpo with a teacher are")
    return "gold" if IS_MOPD(source) else "kl"


def servers(source: Source) -> list[dict[str, Any]]:
    """The teachers of `teacher_model_server`: one address, or JSON with addresses and tags."""
    value = source.get("teacher_model_server")
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return [{"url": text(value)}]
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError("neither an address nor JSON with addresses") from None
    if not found or not all(isinstance(one, dict) and one.get("url") for one in found):
        raise ValueError("each teacher needs a url")
    return found


def served(value: Any, source: Source) -> dict[str, Any]:
    targets: dict[str, Any] = {}
    for place, one in enumerate(servers(source)):
        prefix = f"teachers.{{{place}}}"
        targets[f"{prefix}.backend.type"] = "vllm"
        targets[f"{prefix}.backend.urls"] = [text(one["url"])]
        if one.get("tags"):
            targets[f"{prefix}.domains"] = items(one["tags"])
    return targets


def grouped(value: Any, source: Source) -> dict[str, Any]:
    return {f"teachers.{{{i}}}.model": model for i, model in enumerate(items(value))}


def teachers(source: Source) -> list[str]:
    if is_served(source):
        tags = [(one.get("tags") or [None])[0] for one in servers(source)]
        stems = [str(tag or "").rpartition("/")[2].partition(".")[0] for tag in tags]
        return teacher_names(stems)
    if source.has("teacher_model_group"):
        return teacher_names(list(items(source.get("teacher_model_group"))))
    return teacher_names([source.get("teacher_model")])


def routes(source: Source) -> bool:
    try:
        return is_served(source) and any(one.get("tags") for one in servers(source))
    except ValueError:
        return False


def loss_temperature(value: Any, source: Source) -> float:
    return 1.0 if is_served(source) or is_opd(source) else number(value)


def sft_weight(value: Any, source: Source) -> float:
    return 0.0 if source.get("lmbda") in (1, 1.0, "1", "1.0") else number(value)


def lower_bound(value: Any, source: Source) -> float:
    return 1.0 - share(value)


def upper_bound(value: Any, source: Source) -> float:
    high = source.get("epsilon_high")
    return 1.0 + number(source.get("epsilon") if high is None else high)


BETA_NOTE = "a penalty on the distance to the first student has no counterpart here"
LOSS = (
    Row("rlhf_type", "distillation.loss", loss, default="gkd"),
    Row(
        "use_mopd",
        "distillation.loss",
        loss,
        note="the proposed several teachers with tokenizers of their own, by GOLD",
    ),
    Row(
        "beta",
        "kl.divergence.beta",
        share,
        default=lambda source: 0.04 if is_opd(source) else 0.5,
        when=is_kl,
    ),
    Row("beta", "gold.divergence.beta", share, when=is_gold),
    Row("beta", note=BETA_NOTE, when=is_opd, lost=differs(0.0)),
    Row(
        "lmbda",
        "rollout.lmbda",
        share,
        default=0.5,
        when=is_gkd,
        note="the share of prompts of every step that the student answers; ms-swift draws for a "
        "batch as a whole",
    ),
    Row(
        "seq_kd",
        "rollout.off_policy",
        when=is_gkd,
        to=lambda value, source: "teacher" if truth("seq_kd")(source) else "dataset",
    ),
    Row("temperature", "rollout.temperature", number, default=0.9),
    Row(
        "temperature",
        "distillation.temperature",
        loss_temperature,
        note="ms-swift uses it for sampling and for the loss; 1 in the loss here where teachers "
        "are servers, which send no log-sum-exp, and for a policy gradient",
    ),
    Row(
        "sft_alpha",
        "distillation.crossentropy_weight",
        sft_weight,
        default=0.0,
        when=is_gkd,
        note="of all answers, where ms-swift leaves out those of the student; 0 with lmbda 1",
    ),
    Row("gkd_logits_topk", "distillation.top_k", positive, when=is_gkd),
    Row("teacher_kl_coef", "distillation.distillation_weight", number, default=1.0, when=is_opd),
    Row("epsilon", "opd.lower", lower_bound, default=0.2, when=is_opd),
    Row("epsilon", "opd.upper", upper_bound, when=is_opd),
    Row("epsilon_high", "opd.upper", upper_bound, when=is_opd),
    Row("epsilon", note="GKD has no ratio of policies", when=is_gkd),
    Row("epsilon_high", note="GKD has no ratio of policies", when=is_gkd),
    Row(
        "reward_funcs",
        note="there are no rewards here: the teachers' signal alone is trained",
        lost=some,
    ),
    Row("reward_weights", note="there are no rewards here", lost=some),
    Row("reward_model", note="there are no rewards here", lost=some),
    Row("loss_scale", note="data.train_on says which turns are answers"),
    Row("multi_turn_scheduler", note="answers are one turn here", lost=some),
)
MODELS = (
    Row("model", "student.model", text),
    Row("teacher_model", "teachers.{teacher}.model", text),
    Row("teacher_model_group", "*", grouped, shown="teachers.<name>.model"),
    Row(
        "teacher_model_server",
        "*",
        served,
        shown="teachers.<name>.backend.urls, .domains",
        note="each teacher needs a model or tokenizer directory too, for its tokenizer",
    ),
    Row(
        "teacher_tag_key",
        "distillation.teacher_key",
        text,
        default="dataset",
        when=routes,
        note="rows need this field; mopd does not name them after their file",
    ),
    Row("teacher_adapters", note="merge the adapter into the teacher", lost=some),
    Row("adapters", "student.lora.path", lambda value, source: items(value)[0], when=uses_lora),
    data_row("dataset"),
    Row("torch_dtype", "student.dtype", dtype, default="bfloat16"),
    Row("bf16", note="follows from torch_dtype"),
    Row(
        "tuner_type",
        "student.lora.rank",
        when=uses_lora,
        to=lambda value, source: positive(source.get("lora_rank")),
    ),
    Row(
        "tuner_type",
        note="all weights are trained",
        when=lambda source: not uses_lora(source),
        lost=lambda value: value != "full",
    ),
    Row(
        "train_type",
        "student.lora.rank",
        when=uses_lora,
        to=lambda value, source: positive(source.get("lora_rank")),
    ),
    Row(
        "train_type",
        note="all weights are trained",
        when=lambda source: not uses_lora(source),
        lost=lambda value: value != "full",
    ),
    Row("lora_rank", "student.lora.rank", positive, default=8, when=uses_lora),
    Row("lora_alpha", "student.lora.alpha", number, default=32, when=uses_lora),
    Row(
        "target_modules",
        "student.lora.target_modules",
        modules,
        default="all-linear",
        when=uses_lora,
    ),
    Row(
        "lora_dropout",
        note="adapters have no dropout here",
        default=0.05,
        when=uses_lora,
        lost=differs(0.0),
    ),
    Row("quant_bits", note="mopd trains no quantised model", lost=some),
    Row("quant_method", note="mopd trains no quantised model", lost=some),
    Row(
        "system",
        note="put the system message into the rows, or take "
        "teachers.<name>.privileged for a teacher's own",
        lost=some,
    ),
)
SAMPLING = (
    Row("max_completion_length", "rollout.max_new_tokens", positive, default=512),
    Row("max_new_tokens", "rollout.max_new_tokens", positive),
    Row("num_generations", "rollout.num_generations_per_prompt", positive, default=8, when=is_opd),
    Row("top_p", note="mopd samples from the whole distribution", lost=differs(1.0)),
    Row("top_k", note="mopd samples from the whole distribution", lost=differs(-1)),
    Row("repetition_penalty", note="mopd samples from the whole distribution", lost=differs(1.0)),
    *sampling_rows(),
    Row(
        "async_generate",
        "rollout.max_staleness",
        lambda value, source: int(truth("async_generate")(source)),
    ),
)
WAYS = (
    Row("jsd with 0 and 1 as its ends", "kl.divergence.kind", fixed("jsd"), when=is_kl),
    Row("jsd with 0 and 1 as its ends", "gold.divergence.kind", fixed("jsd"), when=is_gold),
    Row(
        "renormalises inside the top-k",
        "kl.divergence.top_k_mode",
        fixed("renorm"),
        when=lambda source: is_kl(source) and is_listed(source),
    ),
    Row(
        "compares the whole vocabulary",
        "distillation.top_k",
        fixed(None),
        when=lambda source: is_gkd(source) and not is_listed(source) and not is_served(source),
    ),
    Row(
        "sub-distributions without a bin for the rest", "gold.rest_bin", fixed(False), when=is_gold
    ),
    Row("no factor of temperature squared", "distillation.scale_by_t2", fixed(False)),
    Row(
        "a mean over tokens",
        "distillation.normalization",
        fixed("token"),
        note="over the tokens of the whole step, where ms-swift averages means of micro-batches",
    ),
    Row(
        "the signal of an answer's tokens is not clipped",
        "opd.max_advantage",
        fixed(1e4),
        when=is_opd,
    ),
    Row(
        "GRPO's clipped ratio",
        "opd.importance",
        fixed("ppo"),
        when=is_opd,
        note="to the policy of the sampler, where ms-swift takes the trainer's own before the "
        "step, which is 1 in the first update of a batch",
    ),
    Row("no domains", "distillation.domain_normalization", fixed("none")),
    Row("no domains", "train.balance_domains", fixed(False)),
    Row(
        "the student without its adapter as teacher where none is named",
        "teachers.{teacher}.backend.type",
        fixed("self"),
        note="ms-swift takes the student's present weights, which move along",
        when=lambda source: (
            uses_lora(source)
            and not source.has("teacher_model", "teacher_model_server", "teacher_model_group")
        ),
    ),
)

MS_SWIFT = Peer(
    name="ms-swift",
    title="ms-swift",
    rows=(*LOSS, *MODELS, *SAMPLING, *RUN),
    ways=WAYS,
    marks=(
        "rlhf_type",
        "teacher_model",
        "teacher_model_server",
        "teacher_model_group",
        "gkd_logits_topk",
        "sft_alpha",
        "teacher_kl_coef",
        "teacher_tag_key",
        "tuner_type",
    ),
    teachers=teachers,
)
