"""Every key of a recipe, its type and its only default. Unknown keys are errors.

Names follow Megatron-LM (parallel sizes, optimizer), TRL (`beta`, `temperature`, `lmbda`) and the
cross-tokenizer papers (`max_length`, `gamma`).
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from mopd.config.backends import RolloutBackendSection, TeacherBackendSection
from mopd.config.cluster import ClusterSection, PoolSection, RaySection
from mopd.config.section import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Probability,
    Section,
)

LossName = Literal["ctkd", "gold", "uld", "kl", "opd"]
DivergenceKind = Literal[
    "forward_kl", "reverse_kl", "jsd", "mixed", "skew_kl", "skew_reverse_kl", "akl", "tvd"
]


def _run_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError("a name has letters, digits, `.`, `_` and `-` only, and no slash")
    return name


class RunSection(Section):
    """Where a run lives and what makes it repeatable."""

    name: Annotated[str, AfterValidator(_run_name)] = "default"
    dir: str = "runs"
    seed: NonNegativeInt = 1
    device: Literal["auto", "cpu", "cuda", "npu"] = "auto"
    threads: PositiveInt | None = None  # torch threads per rank; None: the cores, shared evenly
    overwrite: bool = False  # start afresh where a run of this name exists
    stall_s: NonNegativeFloat = 3600.0  # without a finished step, the run ends; 0 waits for ever


class ParallelSection(Section):
    """Megatron's parallel axes; the data-parallel size is what is left of the world size."""

    tensor_model_parallel_size: PositiveInt = 1
    sequence_parallel: bool = False  # norms and residuals split along the sequence; needs tp > 1
    pipeline_model_parallel_size: PositiveInt = 1
    virtual_pipeline_model_parallel_size: PositiveInt | None = None  # stages of each rank
    context_parallel_size: PositiveInt = 1
    expert_model_parallel_size: PositiveInt = 1  # of a mixture of experts, over replicas


class OptimizerSection(Section):
    """Adam with Megatron's learning-rate schedule: warm-up, constant, linear decay to `min_lr`."""

    lr: Annotated[float, Field(gt=0.0)] = 1e-5
    min_lr: NonNegativeFloat = 0.0
    adam_beta1: Probability = 0.9
    adam_beta2: Probability = 0.98
    adam_eps: Annotated[float, Field(gt=0.0)] = 1e-8
    weight_decay: NonNegativeFloat = 0.01
    clip_grad: NonNegativeFloat = 1.0
    lr_warmup_fraction: Probability = 0.05  # the first part of the run, in which lr rises
    lr_decay_fraction: Probability = 0.4  # the last part, in which lr falls to min_lr
    use_distributed_optimizer: bool = False  # its state split over the replicas


class LoraSection(Section):
    """Low-rank adapters (2106.09685): the model stays as it is, ``rank`` columns a layer learn."""

    rank: PositiveInt | None = None  # None trains the model itself
    alpha: Annotated[float, Field(gt=0.0)] = 16.0  # the adapter counts alpha / rank
    target_modules: tuple[str, ...] = (  # names of Hugging Face linear layers, as in PEFT
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    )
    path: str | None = None  # directory of a PEFT adapter to go on from; None starts a fresh one


class RecomputeSection(Section):
    """Activations that backward computes again instead of keeping them. Names are Megatron's."""

    granularity: Literal["full", "selective"] | None = None  # selective: the attention's core
    method: Literal["uniform", "block"] = "uniform"  # of full
    num_layers: PositiveInt = 1  # of full: of one block of `uniform`, or of a stage for `block`


class StudentSection(Section):
    """The model that learns. `model` is a Hugging Face directory (docs/models.md)."""

    model: str | None = None
    tokenizer: str | None = None  # defaults to `model`
    eos_token: str | None = None  # what ends its turn; None: the tokenizer's own
    dtype: Literal["float32", "bfloat16"] = "float32"
    fused_head: bool = True  # output layer and loss in one, without the logits as a whole
    freeze: tuple[str, ...] = ()  # regular expressions: whole Hugging Face names that do not learn
    moe_aux_loss_coeff: NonNegativeFloat | None = None  # None: the model's router_aux_loss_coef
    lora: LoraSection = LoraSection()
    recompute: RecomputeSection = RecomputeSection()
    parallel: ParallelSection = ParallelSection()
    optimizer: OptimizerSection = OptimizerSection()


class PrivilegedSection(Section):
    """What a teacher reads and the student does not (context distillation)."""

    system: str | None = None  # its system message, instead of the prompt's own
    prefix: str | None = None  # text before the first user message
    field: str | None = None  # of a data row: text before the first user message, behind `prefix`


class TeacherSection(Section):
    """One teacher. It judges the domains it lists; an empty list means all of them."""

    model: str | None = None
    tokenizer: str | None = None  # defaults to `model`
    eos_token: str | None = None  # what ends its turn; None: the tokenizer's own
    privileged: PrivilegedSection = PrivilegedSection()
    weight: NonNegativeFloat = 1.0
    loss: LossName | None = None  # None takes `distillation.loss`
    domains: tuple[str, ...] = ()
    projection_matrix_path: str | None = None  # None builds it and caches it under `cache_dir`
    pool: str | None = None  # None: a pool of its own name; `student`: the student's processes
    backend: TeacherBackendSection = TeacherBackendSection()


class DistillationSection(Section):
    """What all losses share."""

    loss: LossName = "ctkd"
    temperature: Annotated[float, Field(gt=0.0)] = 1.0  # of the loss, not of sampling
    scale_by_t2: bool = True  # losses times temperature^2, which keeps their gradient's size
    top_k: PositiveInt | None = 64  # teacher's support per position, plus a tail; null: all tokens
    shared_columns: PositiveInt | None = (
        None  # of top_k=null: these many likeliest tokens of a step
    )
    max_remote_gb_per_step: NonNegativeFloat = 1.0  # of whole rows from one teacher's servers
    teacher_key: str = "domain"  # the field of a data row that routes it to teachers
    default_teacher: str | None = None  # judges rows that no teacher lists; None refuses them
    alignment: Literal["bytes", "position"] = "bytes"  # `position` is a negative control
    positions: Literal["all", "canonical_prefix"] = "all"  # which part of an answer is trained
    max_failed_share: Probability = 0.5  # a batch with more unscored answers stops the run
    normalization: Literal["chunk", "token", "sequence"] = "chunk"  # what a teacher's mean is over
    domain_normalization: Literal["tokens", "none"] = (
        "tokens"  # tokens: a mean of each domain first
    )
    teacher_weighting: Literal["static", "nll", "entropy", "confidence"] = "static"
    teacher_selection: Literal["none", "best", "weighted"] = "none"  # chunk by chunk
    selection_score: Literal["nll", "entropy", "confidence"] = "nll"
    sharpness: NonNegativeFloat = 1.0  # of weighting and selection: softmax(sharpness * score)
    distillation_weight: NonNegativeFloat = 1.0
    crossentropy_weight: NonNegativeFloat = 0.0  # of the response's own tokens
    balance: Literal["fixed", "dynamic"] = "fixed"  # dynamic: scale the losses to the cross entropy
    balance_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9  # of the averages behind dynamic


class DivergenceSection(Section):
    """Teacher P, student Q, on the teacher's top-k. See docs/losses.md."""

    kind: DivergenceKind = "forward_kl"
    beta: Probability = 0.5  # of jsd, TRL's meaning: 0 forward KL, 1 reverse KL
    weight: Probability = 0.5  # of mixed: the share of forward KL
    skew: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1  # of skew_kl and skew_reverse_kl
    alpha: Probability = 0.5  # of akl: teacher mass that counts as tail
    top_k_mode: Literal["tail", "genkl", "renorm", "trunc"] = "tail"  # mass outside the top-k


class GoldDivergenceSection(DivergenceSection):
    """GOLD's default is TRL's: the generalized JSD."""

    kind: DivergenceKind = "jsd"


class KlDivergenceSection(DivergenceSection):
    """On-policy, with one tokenizer, reverse KL is the usual choice."""

    kind: DivergenceKind = "reverse_kl"


class HybridSection(Section):
    """`loss_type: hkl`: common vocabulary and sorted L1 instead of the projection (H-KL)."""

    threshold: Annotated[float, Field(gt=0.0, le=1.0)] | None = 0.6  # None: equal bytes only
    lambda_uld: NonNegativeFloat = 1.0
    top_u: PositiveInt | None = 512  # None sorts everything
    rest_bin: bool = True  # False: no bin for the rest, as in the paper; may be negative


class LearnedSection(Section):
    """Train the projection's weights on their fixed sparsity (X-Token)."""

    enabled: bool = False
    lr: Annotated[float, Field(gt=0.0)] = 1e-2
    path: str | None = None  # directory with <teacher>.safetensors of an earlier run, to go on from


Merge = Literal["boundary", "mean_prob", "nemo", "observed", "bayesian"]


class CtkdSection(Section):
    """Projection-matrix KL at common byte boundaries (X-Token 2605.21699, with fold and path)."""

    loss_type: Literal["pkl", "hkl", "auto"] = "pkl"  # auto: by the audit of the vocabularies
    max_length: PositiveInt = 4
    gamma: NonNegativeFloat = 0.0
    map: Literal["pieces", "exact"] = "pieces"
    roles: dict[str, str] = Field(default_factory=dict)  # control tokens, student to teacher
    similarity: str | None = None  # embeddings of both sides' token strings, safetensors
    direction: Literal["push", "pull"] = "push"
    merge: Literal[Merge, "decayed"] = "boundary"  # which rows of a chunk speak for it
    divergence: DivergenceSection = DivergenceSection()
    unreachable: Literal["fold", "rest", "renorm"] = "fold"
    path_terms: bool = True
    canonical_paths: bool = False  # path terms end in the student's own encoding of the text
    interior_rows: bool = False  # teach student tokens inside chunks from the boundary's row
    lambda_chunk: NonNegativeFloat = 0.0
    learned: LearnedSection = LearnedSection()
    hkl: HybridSection = HybridSection()


class GoldSection(Section):
    """Common-vocabulary divergence plus sorted L1 on the rest (GOLD / ULD 2402.12030)."""

    divergence: GoldDivergenceSection = GoldDivergenceSection()
    matched_weight: NonNegativeFloat | None = None  # both None: |matched| / V_T and 1 - that
    unmatched_weight: NonNegativeFloat | None = None
    top_u: PositiveInt | None = 512  # None sorts everything
    rest_bin: bool = True  # False: TRL's sub-distributions without a bin for the rest
    merge: Merge = "boundary"
    lambda_chunk: NonNegativeFloat = 0.0


class UldSection(Section):
    """Sorted L1 over both vocabularies (ULD 2402.12030): blind to which token is which."""

    top_u: PositiveInt | None = 512


class KlSection(Section):
    """Same-tokenizer divergence on listed tokens plus tail, or on the whole vocabulary."""

    divergence: KlDivergenceSection = KlDivergenceSection()
    support: Literal["teacher", "student", "union"] = "teacher"  # others need top_k=null
    support_top_k: PositiveInt = 64  # of support student and union


class OpdSection(Section):
    """Policy gradient of the reverse KL on the sampled tokens, across tokenizers by chunk."""

    importance: Literal["icepop", "tis", "ppo", "sequence_mask", "none"] = "icepop"
    lower: NonNegativeFloat | None = None  # of the ratio; both None: the usual ones (losses/opd.py)
    upper: NonNegativeFloat | None = None
    max_advantage: Annotated[float, Field(gt=0.0)] = 5.0  # per student token of a chunk
    policy: Literal["current", "old"] = "current"  # old: the sampler's log-probabilities
    discount: Probability = 0.0
    iw_gamma: NonNegativeFloat = 0.0  # IW-OPD (2606.22600): early tokens count more


class RolloutSection(Section):
    """How the student samples its own answers."""

    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    max_new_tokens: PositiveInt = 128
    num_generations_per_prompt: PositiveInt = 1
    stop_token_ids: tuple[NonNegativeInt, ...] = ()  # end an answer as a cut does, and are left out
    segmentation: Literal["any", "canonical"] = "any"  # canonical: only the tokenizer's own, of hf
    mask_truncated_completions: bool = False  # train nothing of answers without an end
    max_staleness: NonNegativeInt = 0  # optimizer steps between sampling and training; > 0 overlaps
    lmbda: Probability = 1.0  # the share of answers that the student writes itself
    off_policy: Literal["dataset", "teacher"] = "dataset"  # who writes the others
    pool: str | None = None  # None: `student` where it samples in process, else `rollout`
    backend: RolloutBackendSection = RolloutBackendSection()


class DataSection(Section):
    """Rows: chat messages, an optional checkable answer, an `id` and a routing field.

    Each path is JSONL, Parquet or Arrow: a file, a directory, or a pattern as in data/*.parquet.
    """

    path: str | None = None
    heldout_path: str | None = None  # prompts that the student answers in an evaluation
    validation_path: str | None = None  # rows with answers, for a validation loss
    messages_key: str = "messages"  # list of objects with `role` and `content`
    prompt_key: str | None = None  # a text that becomes one user message, instead of messages
    response_key: str = "response"  # the answer to train on, where answers come from the data
    answer_key: str = "answer"  # the checkable answer, for accuracy
    train_on: Literal["last", "all"] = "last"  # which assistant turns of messages are answers


class EvaluateSection(Section):
    """Held-out accuracy and validation loss before and after, and every ``interval`` steps.

    With an ``interval`` the divergence of the teachers on held-out answers is measured as well.
    """

    interval: PositiveInt | None = None  # steps between two evaluations; None: only the two
    # what `keep_best` and `patience` go by; loss: on data.validation_path
    metric: Literal["accuracy", "kl", "loss"] = "accuracy"
    patience: PositiveInt | None = None  # evaluations without a better one that end the run
    max_prompts_per_domain: PositiveInt = 512  # of validation rows as well
    kl_prompts_per_domain: NonNegativeInt = 32  # held-out answers that teachers judge; 0: none
    teachers: bool = True  # also measure each teacher on its domains, for the headroom
    fail_if_not_learned: bool = True


class TrainSection(Section):
    """The loop."""

    steps: PositiveInt = 300
    num_prompts_per_step: PositiveInt = 64
    micro_batch_size: PositiveInt = 64  # answers, where `max_tokens_per_micro_batch` is null
    packing: bool = False  # answers behind each other, without padding
    max_tokens_per_micro_batch: PositiveInt | None = None  # as many answers as fit
    balance_domains: bool = True  # equal numbers of prompts per domain in every step


class CheckpointSection(Section):
    """Checkpoints under `<run>/checkpoints/step-<n>`."""

    save_interval: PositiveInt = 50
    keep_last: PositiveInt = 2
    keep_best: NonNegativeInt = 0  # and these many with the best `evaluate.metric`
    async_save: bool = False  # written in the background, from a copy in host memory
    verify: bool = True  # every file's SHA-256, before anything is loaded


class JournalSection(Section):
    """Rollouts and replies on disk, so that a run that was killed goes on bit by bit the same."""

    replies: Literal["full", "digest", "off"] = (
        "full"  # of teachers, kept since the oldest checkpoint
    )
    max_gb: NonNegativeFloat = 8.0  # of replies per replica; beyond it digests are kept


class LoggingSection(Section):
    """`metrics.jsonl` and the terminal are always on."""

    tensorboard: bool = True
    wandb: bool = False  # Weights & Biases; WANDB_MODE=offline works without a network
    wandb_project: str = "mopd"
    log_interval: PositiveInt = 10  # steps between two lines on the terminal
    sample_interval: PositiveInt | None = 50  # steps between two whose answers samples.jsonl keeps
    samples_per_domain: PositiveInt = 4


class DebugSection(Section):
    """What is kept to look into a step."""

    dump_step: NonNegativeInt | None = None  # the step whose tensors go to <run>/dump-<step>


class RunConfig(Section):
    """A whole recipe, resolved."""

    run: RunSection = RunSection()
    launcher: Literal["torchrun", "ray"] = "torchrun"
    cache_dir: str = ".cache/mopd"
    student: StudentSection = StudentSection()
    teachers: dict[str, TeacherSection] = Field(default_factory=dict)
    distillation: DistillationSection = DistillationSection()
    ctkd: CtkdSection = CtkdSection()
    gold: GoldSection = GoldSection()
    uld: UldSection = UldSection()
    kl: KlSection = KlSection()
    opd: OpdSection = OpdSection()
    rollout: RolloutSection = RolloutSection()
    data: DataSection = DataSection()
    evaluate: EvaluateSection = EvaluateSection()
    train: TrainSection = TrainSection()
    checkpoint: CheckpointSection = CheckpointSection()
    journal: JournalSection = JournalSection()
    logging: LoggingSection = LoggingSection()
    debug: DebugSection = DebugSection()
    cluster: ClusterSection = ClusterSection()
    pools: dict[str, PoolSection] = Field(default_factory=dict)
    ray: RaySection = RaySection()
