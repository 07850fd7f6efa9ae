"""NeMo-RL's cross-tokenizer off-policy distillation, in both of its forms.

The older form has `gold_loss` and `xtoken_loss` in `loss_fn`; the newer one a partition KL over
prefixes (`prefix_bidir_v3_*`) and an `aligner` block per teacher. Its schema has no defaults: those
here are of its example configuration.
"""

from __future__ import annotations

from mopd.config.peers.nemo_rl_run import RUN
from mopd.config.peers.nemo_rl_values import (
    IS_DYNAMIC,
    PATHS,
    SHARED_PATHS,
    V6,
    balanced,
    columns,
    distillation_weight,
    is_common,
    is_direct,
    is_gold,
    is_hkl,
    is_pkl,
    is_projected,
    is_v6,
    kind,
    losses,
    partition_kind,
    projected,
    scored,
    selects,
    teachers,
)
from mopd.config.peers.rows import Peer, Row, drops
from mopd.config.peers.values import (
    differs,
    fixed,
    is_on,
    number,
    positive,
    share,
    some,
    text,
    truth,
)

IGNORED = "NeMo ignores it with dynamic_loss_scaling"
LOSS = (
    Row(
        "loss_fn.gold_loss",
        "*",
        losses,
        shown="teachers.<name>.loss",
        when=is_common,
        note="common tokens have equal bytes, and both models are compared at common boundaries",
    ),
    Row(
        "loss_fn.gold_loss",
        "*",
        losses,
        shown="teachers.<name>.loss",
        when=lambda source: not is_common(source),
    ),
    Row("loss_fn.xtoken_loss", "ctkd.loss_type", when=is_hkl, to=fixed("hkl")),
    Row("loss_fn.temperature", "distillation.temperature", number, default=1.0),
    Row(
        "loss_fn.vocab_topk",
        "distillation.shared_columns",
        columns,
        default=8192,
        when=lambda source: is_pkl(source) or not any(projected(source)),
        note="the likeliest tokens of a whole step, where NeMo takes those of a micro-batch",
    ),
    Row(
        "loss_fn.vocab_topk",
        note="NeMo reads it for P-KL and for teachers with the student's tokenizer",
        when=lambda source: is_common(source) or is_v6(source),
    ),
    Row("loss_fn.uncommon_topk", "gold.top_u", positive, default=8192, when=is_gold),
    Row("loss_fn.uncommon_topk", "ctkd.hkl.top_u", positive, when=is_hkl),
    Row("loss_fn.reverse_kl", "ctkd.divergence.kind", kind, default=False, when=is_pkl),
    Row("loss_fn.reverse_kl", "kl.divergence.kind", kind, when=is_direct),
    Row("loss_fn.reverse_kl", "gold.divergence.kind", kind, when=is_gold),
    Row("loss_fn.reverse_kl", note="H-KL is a forward KL", lost=is_on, when=is_hkl),
    Row(
        "loss_fn.kl_loss_weight",
        "distillation.distillation_weight",
        default=1.0,
        to=distillation_weight,
        when=lambda source: not IS_DYNAMIC(source),
        note="times the sum of the teachers' weights, which are normalised to 1 here",
    ),
    Row("loss_fn.kl_loss_weight", note=IGNORED, when=IS_DYNAMIC),
    Row(
        "loss_fn.ce_loss_scale",
        "distillation.crossentropy_weight",
        number,
        default=0.1,
        when=lambda source: not IS_DYNAMIC(source),
    ),
    Row("loss_fn.ce_loss_scale", note=IGNORED, when=IS_DYNAMIC),
    Row(
        "loss_fn.dynamic_loss_scaling",
        "*",
        balanced,
        default=True,
        when=IS_DYNAMIC,
        shown="distillation.balance",
        note="goes by running means of whole steps, where NeMo takes the current micro-batch",
    ),
    Row(
        "loss_fn.dynamic_loss_scaling",
        "distillation.balance",
        fixed("fixed"),
        when=lambda source: not IS_DYNAMIC(source),
    ),
    Row(
        "loss_fn.kd_loss_mode",
        "distillation.teacher_selection",
        lambda value, source: "best" if selects(source) else "none",
        default="sum",
        when=lambda source: source.get("loss_fn.kd_loss_mode") in ("sum", "select_teacher"),
    ),
    Row(
        "loss_fn.kd_loss_mode",
        note="teachers are chosen chunk by chunk, NeMo's per micro-batch",
        when=selects,
    ),
    Row(
        "loss_fn.kd_loss_mode",
        note="averaged logits need one tokenizer; teachers are summed",
        lost=some,
        when=lambda source: source.get("loss_fn.kd_loss_mode") == "averaged_logits",
    ),
    Row(
        "loss_fn.sum_weights_metric",
        "distillation.teacher_weighting",
        scored,
        note="scores are per byte here, so that they compare across tokenizers",
    ),
    Row(
        "loss_fn.alpha",
        "distillation.sharpness",
        number,
        when=lambda source: source.has("loss_fn.sum_weights_metric"),
    ),
    Row("loss_fn.normalize_teacher_by_vocab", note="teachers have their weights alone", lost=is_on),
    Row(
        "loss_fn.loss_type",
        note="the divergence is what is trained",
        lost=lambda value: value != "KL",
    ),
    Row(
        "loss_fn.exact_token_match_only",
        note="chunks have equal bytes on both sides always",
        lost=is_on,
    ),
    Row(
        "loss_fn.project_teacher_to_student",
        note="ctkd.direction=pull does so, with options of its own",
        lost=is_on,
    ),
    Row(f"{V6}_loss_fn", "ctkd.divergence.kind", partition_kind, default="kl", when=is_v6),
    Row(f"{V6}_jsd_beta", "ctkd.divergence.beta", share, default=0.5, when=is_v6),
    Row(
        f"{V6}_noise_filter_topk",
        note="no chunk is left out for the teacher's doubt",
        lost=differs(0),
    ),
    Row(f"{V6}_position_0_kl", note="boundaries of chunks of several tokens are always judged"),
    Row(f"{V6}_**", note="the partition over prefixes has no counterpart", lost=some),
    Row("loss_fn.common_indices_from_subtoks", note="tokens of equal bytes are common"),
    Row("loss_fn.kl_chunk_shift", note="rows are those before a chunk's first token always"),
    Row(
        "loss_fn.teacher_topk_ipc_k",
        "distillation.top_k",
        positive,
        when=lambda source: str(source.get("loss_fn.teacher_topk_ipc_k")) != "0",
    ),
    *drops("is about how teachers' logits travel", "loss_fn.teacher_topk_ipc_**"),
)
ALIGNER = (
    *(
        Row(
            key,
            note="a .pt is converted by `mopd projection convert`; set the teacher's "
            "projection_matrix_path to the result, else the projection is built here",
        )
        for key in (*(f"teachers.*.{path}" for path in PATHS), *SHARED_PATHS)
    ),
    Row("token_aligner.max_comb_len", note="chunks are found by bytes and have no largest size"),
    Row(
        "token_aligner.learnable",
        "ctkd.learned.enabled",
        when=is_pkl,
        to=lambda value, source: truth("token_aligner.learnable")(source),
    ),
    Row("token_aligner.exact_token_match_only", note="chunks have equal bytes always", lost=is_on),
    Row(
        "token_aligner.project_teacher_to_student",
        note="ctkd.direction=pull does so, with options of its own",
        lost=is_on,
    ),
    Row(
        "token_aligner.projection_matrix_multiplier",
        note="rows of a projection add up to 1",
        lost=differs(1.0),
    ),
    *drops("stands in loss_fn too, or says how the projection is stored", "token_aligner.**"),
    *drops(
        "chunks are found by bytes, without tables",
        "teachers.*.aligner.pseudo_target_path",
        "teachers.*.aligner.reverse_pseudo_target_path",
    ),
    Row(
        "teachers.*.aligner.drop_first_assistant_chunk_kl",
        note="all of an answer is trained",
        lost=is_on,
    ),
)
MODELS = (
    Row("policy.model_name", "student.model", text),
    Row("policy.tokenizer.name", "student.tokenizer", text),
    Row("teacher.model_name", "teachers.{teacher}.model", text),
    Row("teacher.tokenizer.name", "teachers.{teacher}.tokenizer", text),
    Row("teachers.*.model_name", "teachers.{teacher}.model", text),
    Row("teachers.*.tokenizer.name", "teachers.{teacher}.tokenizer", text),
    Row("teachers.*.weight", "teachers.{teacher}.weight", number, default=1.0),
    *drops(
        "teachers run in transformers here, in the student's process; docs/teachers.md has servers",
        "teacher.**",
        "teachers.*.**",
    ),
)
WAYS = (
    Row(
        "a teacher without a projection shares the student's tokenizer",
        "*",
        losses,
        shown="teachers.<name>.loss",
    ),
    Row("answers come with the data", "rollout.backend.type", fixed("dataset")),
    Row(
        "whole rows of the teachers",
        "distillation.top_k",
        fixed(None),
        when=lambda source: not source.has("loss_fn.teacher_topk_ipc_k"),
    ),
    Row(
        "renormalises inside its likeliest tokens",
        "ctkd.divergence.top_k_mode",
        fixed("renorm"),
        when=is_pkl,
    ),
    Row(
        "renormalises inside its likeliest tokens",
        "kl.divergence.top_k_mode",
        fixed("renorm"),
        when=is_direct,
    ),
    Row(
        "rows of a chunk are averaged",
        "ctkd.merge",
        when=is_pkl,
        to=lambda value, source: "mean_prob" if IS_DYNAMIC(source) else "nemo",
        note="with dynamic_loss_scaling probabilities are averaged on both sides: NeMo's mean "
        "of logarithms can be negative",
    ),
    Row("pieces decay by 0.1", "ctkd.gamma", fixed(0.1), when=is_projected),
    Row("no path terms and no fold", "ctkd.path_terms", fixed(False), when=is_projected),
    Row(
        "no path terms and no fold",
        "ctkd.unreachable",
        fixed("renorm"),
        when=is_pkl,
        note="rows are renormalised over what the student can write",
    ),
    Row(
        "equal tokens in chunks of one, whole chunks else",
        "ctkd.map",
        fixed("exact"),
        when=is_v6,
        note="NeMo's partition over prefixes is not here: the "
        "nearest are columns of equal bytes at every boundary, and the chunk term",
    ),
    Row(
        "equal tokens in chunks of one, whole chunks else",
        "ctkd.lambda_chunk",
        fixed(1.0),
        when=is_v6,
    ),
    Row(
        "common tokens and the rest without a bin",
        "gold.rest_bin",
        lambda value, source: IS_DYNAMIC(source),
        when=is_gold,
        note="a bin for the rest is kept with dynamic_loss_scaling, which compares sizes",
    ),
    Row("both terms count 1", "gold.matched_weight", fixed(1.0), when=is_gold),
    Row("both terms count 1", "gold.unmatched_weight", fixed(1.0), when=is_gold),
    Row("no domains", "distillation.domain_normalization", fixed("none")),
    Row("no domains", "train.balance_domains", fixed(False)),
)


NEMO_RL = Peer(
    name="nemo-rl",
    title="NeMo-RL",
    rows=(*LOSS, *ALIGNER, *MODELS, *RUN),
    ways=WAYS,
    marks=("policy.**", "loss_fn.**", "token_aligner.**", "distillation.**"),
    teachers=teachers,
)
