"""Twinkle's proposed distillation from several teachers: `CTKDLoss`, `CrossTokenLoss`, and the
environment variables of their scripts.

`CTKDLoss` scores rows of a data set; `CrossTokenLoss` lets the student answer. Twinkle's GOLD loss
has TRL's keys: read such a file as TRL's.
"""

from __future__ import annotations

from typing import Any

from mopd.config.peers.hf_trainer import DATA_NOTE
from mopd.config.peers.rows import UNSET, Peer, Row, Source, drops
from mopd.config.peers.twinkle_values import (
    VARIABLES,
    balanced,
    batch_size,
    default_of,
    is_averaged,
    is_cross,
    is_dynamic,
    is_hkl,
    is_pkl,
    is_script,
    kind,
    listed,
    local_model,
    loss_type,
    models,
    prompts,
    sorted_weight,
    weighed,
)
from mopd.config.peers.values import (
    differs,
    fixed,
    number,
    positive,
    teacher_names,
    truth,
)


def _named(key: str, **row: Any) -> tuple[Row, ...]:
    """A row for the argument and for each variable that stands for it. Defaults are the argument's,
    and hold only where none of its names is set."""
    default, when = row.pop("default", None), row.pop("when", lambda source: True)
    names = (key, *VARIABLES.get(key, ()))

    def unset(source: Source) -> Any:
        return None if source.has(*names) else (default(source) if callable(default) else default)

    own = UNSET if default is None else unset
    return (
        Row(key, when=when, default=own, **row),
        *(Row(name, when=when, **row) for name in names[1:]),
    )


UNCUT = "prompts are not cut here, and answers by rollout.max_new_tokens"
LENGTH_NOTE = (
    "tokens of more pieces are mapped to the first ones; twinkle leaves their rows, and those of "
    "exactly so many pieces, empty"
)
LOSS = (
    *_named(
        "loss_type", target="ctkd.loss_type", to=loss_type, default=default_of("auto", "pkl", "hkl")
    ),
    *_named("max_length", target="ctkd.max_length", to=positive, default=4, note=LENGTH_NOTE),
    *_named("gamma", target="ctkd.gamma", to=number, default=0.1, when=is_pkl),
    *_named("beta", note="a row's first weight cancels: rows of a projection add up to 1 here"),
    *_named(
        "temperature",
        target="distillation.temperature",
        to=number,
        default=default_of(1.0, 1.0, 1.2),
    ),
    *_named("teacher_weights", target="*", to=weighed, shown="teachers.<name>.weight"),
    Row("topk", "distillation.top_k", positive, when=lambda s: not is_cross(s)),
    Row("CTKD_TOPK", "distillation.top_k", positive, when=lambda s: not is_cross(s)),
    *_named(
        "vocab_topk",
        target="distillation.shared_columns",
        to=positive,
        default=512,
        when=is_averaged,
        note="the likeliest tokens of a whole step",
    ),
    *_named(
        "uncommon_topk",
        target="ctkd.hkl.top_u",
        to=positive,
        default=8192,
        when=lambda s: is_cross(s) and is_hkl(s),
    ),
    *_named(
        "reverse_kl",
        target="ctkd.divergence.kind",
        to=kind,
        default=default_of(None, "false", "true"),
        when=is_averaged,
    ),
    *_named(
        "gamma_kl",
        target="ctkd.hkl.lambda_uld",
        to=sorted_weight,
        default=default_of(None, 1.0, 0.5),
        when=lambda s: is_cross(s) and is_hkl(s),
        note="the sorted term beside a common term of weight 1; distillation_weight counts both",
    ),
    *_named(
        "gamma_uld",
        target="ctkd.hkl.lambda_uld",
        to=sorted_weight,
        default=default_of(None, 0.5, 0.0),
        when=lambda s: is_cross(s) and is_hkl(s),
        note="one sorted term holds all that is not common",
    ),
    *_named(
        "kl_loss_weight",
        target="distillation.distillation_weight",
        to=number,
        default=default_of(None, 1.0, 0.5),
        when=is_cross,
    ),
    *_named(
        "ce_loss_weight",
        target="distillation.crossentropy_weight",
        to=number,
        default=default_of(None, 1.0, 1.0),
        when=is_cross,
    ),
    *_named(
        "dynamic_loss_scaling",
        target="*",
        to=balanced,
        shown="distillation.balance",
        when=is_cross,
        note="goes by running means of whole steps",
    ),
    Row(
        "exact_token_match_only",
        "ctkd.map",
        when=is_pkl,
        to=lambda value, source: "exact" if truth("exact_token_match_only")(source) else "pieces",
    ),
    Row("projection_topk", note="all pieces of a token have their weight"),
    Row("device", note="run.device is cpu, cuda or npu"),
)
MODELS = (
    *(Row(key, "student.model", local_model) for key in ("student_model_id", "STUDENT_MODEL_ID")),
    *(
        Row(key, "*", listed, shown="teachers.<name>.model")
        for key in (
            "teacher_model_ids",
            "TEACHER_MODEL_IDS",
            "TEACHER_MODEL_ID",
            "TEACHER_MODEL_ID_2",
        )
    ),
    *(Row(key, "data.path", local_model, note=DATA_NOTE) for key in ("dataset_id", "DATASET_ID")),
    *drops(
        "devices are the recipe's cluster and pools",
        "MODEL_GPUS",
        "SAMPLER_GPUS",
        "STUDENT_SAMPLER_GPUS",
        "TEACHER_GPUS",
        "DEVICE_IDS",
        "SHARED_TEACHER_GPUS",
    ),
)
RUN = (
    *(
        Row(
            key,
            "train.num_prompts_per_step",
            prompts,
            default=value,
            note="prompts of a whole step: batch x accumulation",
        )
        for key, value in (
            ("batch_size", None),
            ("gradient_accumulation_steps", None),
            ("BATCH_SIZE", default_of(8, 2, 2)),
            ("GRADIENT_ACCUMULATION_STEPS", default_of(2, 4, 4)),
        )
    ),
    *(
        Row(key, "student.optimizer.lr", number, default=value)
        for key, value in (("learning_rate", None), ("LR", None))
    ),
    *(Row(key, "train.steps", positive) for key in ("max_steps", "MAX_STEPS")),
    *(Row(key, "rollout.max_new_tokens", positive) for key in ("max_new_tokens", "MAX_NEW_TOKENS")),
    *(
        Row(key, "rollout.num_generations_per_prompt", positive, when=is_cross)
        for key in ("n_samples", "N_SAMPLES")
    ),
    Row("MAX_LENGTH", "ctkd.max_length", positive, when=is_cross, note=LENGTH_NOTE),
    Row("MAX_LENGTH", note=UNCUT, when=lambda source: not is_cross(source)),
    *drops(UNCUT, "MAX_LENGTH_SEQ"),
    Row("MIN_GEN_TOKENS", note="short answers are trained as well", lost=differs(0)),
    Row("MIN_NEW_TOKENS", note="the student may stop where it likes", lost=differs(0)),
    *drops("evaluations need data.heldout_path: set evaluate.interval with it", "EVAL_**"),
)
WAYS = (
    Row(
        "a batch is one micro-batch",
        "train.micro_batch_size",
        lambda value, source: batch_size(source),
    ),
    Row("projects between vocabularies", "distillation.loss", fixed("ctkd")),
    Row("no path terms and no fold", "ctkd.path_terms", fixed(False)),
    Row(
        "no path terms and no fold",
        "ctkd.unreachable",
        fixed("renorm"),
        when=is_averaged,
        note="rows are renormalised over what the student can write",
    ),
    Row(
        "rows of a data set are scored",
        "rollout.backend.type",
        fixed("dataset"),
        when=lambda source: not is_cross(source),
    ),
    Row(
        "lists of 64",
        "distillation.top_k",
        fixed(64),
        when=lambda source: not is_cross(source) and not source.has("topk", "CTKD_TOPK"),
    ),
    Row("whole rows of the teachers", "distillation.top_k", fixed(None), when=is_cross),
    Row(
        "renormalises inside its likeliest tokens",
        "ctkd.divergence.top_k_mode",
        fixed("renorm"),
        when=is_averaged,
    ),
    Row(
        "rows of a chunk are averaged",
        "ctkd.merge",
        when=is_averaged,
        to=lambda value, source: "mean_prob" if is_dynamic(source) else "nemo",
    ),
    Row("no domains", "distillation.domain_normalization", fixed("none")),
    Row("no domains", "train.balance_domains", fixed(False)),
    Row("an adapter of rank 8", "student.lora.rank", fixed(8), when=is_script),
    Row("an adapter of rank 8", "student.lora.alpha", fixed(32.0), when=is_script),
    Row(
        "Adam at the script's rate",
        "student.optimizer.lr",
        when=is_script,
        to=lambda value, source: number(
            source.get("LR") or source.get("learning_rate") or (2e-5 if is_cross(source) else 1e-4)
        ),
    ),
    Row(
        "answers of 2048 tokens",
        "rollout.max_new_tokens",
        fixed(2048),
        when=lambda source: (
            is_script(source) and not source.has("MAX_NEW_TOKENS", "max_new_tokens")
        ),
    ),
    Row(
        "0.2 and 0.8 for two teachers",
        "*",
        shown="teachers.<name>.weight",
        to=lambda value, source: weighed([0.2, 0.8], source),
        when=lambda source: (
            is_script(source)
            and is_cross(source)
            and not source.has("TEACHER_WEIGHTS", "teacher_weights")
        ),
    ),
)

TWINKLE = Peer(
    name="twinkle",
    title="twinkle",
    rows=(*LOSS, *MODELS, *RUN),
    ways=WAYS,
    marks=(
        "CTKD_**",
        "STUDENT_MODEL_ID",
        "TEACHER_MODEL_ID",
        "TEACHER_MODEL_IDS",
        "TEACHER_WEIGHTS",
        "teacher_weights",
        "teacher_model_ids",
        "student_model_id",
        "gamma_uld",
        "gamma_kl",
    ),
    teachers=lambda source: teacher_names(models(source)),
)
