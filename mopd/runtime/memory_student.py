"""Memory of one rank of the student, from the model's shape and the recipe alone. No torch.

Weights, gradients and optimizer state are counts of what `mopd.config.slots` lists. Activations
follow Korthikanti et al. (2205.05198): bytes that a layer keeps per token for its backward pass, in
a part that every tensor-parallel rank has (divided by tp with sequence parallelism, their eq. 4)
and a part that is split (their eq. 2), times the micro-batches in flight (their 4.2.3). Their 34 h
and 5 a s are those of a GPT with dropout and materialised scores; the terms here are what the
layers of `mopd.student.spec` keep.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from mopd.config.model_shape import ModelShape
from mopd.config.schema import LoraSection, RunConfig
from mopd.config.slots import Slot, build_slots
from mopd.losses.sizes import PANEL_ROWS, block_rows

# Guesses: what no config.json says.
PROMPT_TOKENS = 512  # of a prompt with its template
LOSS_BLOCKS = 3  # float32 temporaries of a block of logits, beside its gradient
ENTRIES_PER_TOKEN = 2.0  # nonzeros of a projection in a student token's row

ADAPTED_BY_ROWS = ("qkv", "gate_up", "rows")
MAIN_GRADIENT = 4  # bytes: Megatron's grad_reduce_in_fp32
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentJob:
    """The student of a recipe on ``num_ranks`` ranks."""

    config: RunConfig
    shape: ModelShape
    num_ranks: int
    device_type: str  # of torch: cpu, cuda, npu

    @property
    def tp(self) -> int:
        return self.config.student.parallel.tensor_model_parallel_size

    @property
    def pp(self) -> int:
        return self.config.student.parallel.pipeline_model_parallel_size

    @property
    def cp(self) -> int:
        return self.config.student.parallel.context_parallel_size

    @property
    def vp(self) -> int:
        return self.config.student.parallel.virtual_pipeline_model_parallel_size or 1

    @property
    def ep(self) -> int:
        return self.config.student.parallel.expert_model_parallel_size

    @property
    def dp(self) -> int:
        return self.num_ranks // (self.tp * self.pp * self.cp)

    @property
    def width(self) -> int:
        """Bytes of a weight and of an activation."""
        return DTYPE_BYTES[self.config.student.dtype]

    @property
    def text_tokens(self) -> int:
        """Of the longest text: a guess of its prompt, and all that may be answered."""
        return longest_text(self.config, self.shape.max_position_embeddings)

    @property
    def micro_batch_tokens(self) -> int:
        """Of one rank."""
        train = self.config.train
        tokens = train.max_tokens_per_micro_batch or train.micro_batch_size * self.text_tokens
        return math.ceil(min(tokens, self._answers * self.text_tokens) / self.cp)

    @property
    def num_micro_batches(self) -> int:
        """Of one replica in a step."""
        tokens = self.micro_batch_tokens * self.cp
        return max(1, math.ceil(self._answers * self.text_tokens / tokens))

    @property
    def _answers(self) -> int:
        """Of one replica in a step."""
        prompts, rollout = self.config.train.num_prompts_per_step, self.config.rollout
        return max(1, prompts // self.dp) * rollout.num_generations_per_prompt


def longest_text(config: RunConfig, limit: int | None) -> int:
    """Tokens of a prompt (a guess) and an answer, up to a model's ``limit``."""
    return min(PROMPT_TOKENS + config.rollout.max_new_tokens, limit or 1 << 30)


def student_parts(job: StudentJob, *, stage: int) -> dict[str, int]:
    """Bytes by kind, of a rank of pipeline ``stage``."""
    parts = weight_parts(job, stage=stage)
    parts["activations"] = activation_bytes(job, stage=stage)
    if stage == job.pp - 1:
        parts["logits block"] = logits_bytes(job)
    return parts


def weight_parts(job: StudentJob, *, stage: int) -> dict[str, int]:
    """Weights, gradients and Adam's state.

    Gradients are float32 (4 bytes a trainable weight). Adam keeps two moments and, of bfloat16
    weights, a float32 main copy: 8 or 12 bytes, over the replicas with the distributed optimizer
    (ZeRO 1, 1910.02054, 3.1), where experts count their own replicas.
    """
    section = job.config.student
    slots = [
        slot
        for slot in build_slots(job.shape, pp_size=job.pp, vp_size=job.vp, ep_size=job.ep)
        if slot.stage == stage and slot.ep_rank in (None, 0)
    ]
    weights, gradients, optimizer = 0, 0, 0.0
    per_weight = 8 if job.width == 4 else 12
    for slot in slots:
        size, adapters = local_size(slot, job.tp), 0
        if section.lora.rank is not None:
            adapters = adapter_size(slot, section.lora, job.tp)
        trainable = adapters if section.lora.rank is not None else size * _learns(slot, job.config)
        holders = job.dp * job.cp // (1 if slot.ep_rank is None else job.ep)
        weights += (size + adapters) * job.width
        gradients += trainable * MAIN_GRADIENT
        split = max(1, holders) if section.optimizer.use_distributed_optimizer else 1
        optimizer += trainable * per_weight / split
    return {"weights": weights, "gradients": gradients, "optimizer": math.ceil(optimizer)}


def frozen_bytes(job: StudentJob, *, stage: int, width: int) -> int:
    """Weights of a model that lies on the student's ranks and does not learn."""
    ep = job.ep if job.shape.moe is not None else 1
    slots = build_slots(job.shape, pp_size=job.pp, vp_size=job.vp, ep_size=ep)
    mine = (slot for slot in slots if slot.stage == stage and slot.ep_rank in (None, 0))
    return sum(local_size(slot, job.tp) for slot in mine) * width


def local_size(slot: Slot, tp: int) -> int:
    """Elements of a Megatron parameter on one tensor-parallel rank."""
    total = sum(math.prod(size) for size in slot.sizes)
    if slot.kind == "whole":
        return total
    if slot.kind == "vocab":  # padded, so that every rank has as many rows
        rows, columns = slot.sizes[0]
        return math.ceil(rows / tp) * columns
    return total // tp


def adapter_size(slot: Slot, section: LoraSection, tp: int) -> int:
    """Elements of A [R, I] and B [O, R] of one parameter, on one tensor-parallel rank."""
    assert section.rank is not None
    total = 0
    for name, size in zip(slot.tensors, slot.sizes, strict=True):
        if len(size) != 2 or name.split(".")[-2] not in section.target_modules:
            continue
        rows, columns = size
        by_rows = slot.kind in ADAPTED_BY_ROWS
        sharded, whole = (rows, columns) if by_rows else (columns, rows)
        total += section.rank * (sharded // tp + whole)
    return total


def _learns(slot: Slot, config: RunConfig) -> bool:
    patterns = config.student.freeze
    frozen = (any(re.fullmatch(p, name) for p in patterns) for name in slot.tensors)
    return not (patterns and all(frozen))


def activation_bytes(job: StudentJob, *, stage: int) -> int:
    """What waits for the backward pass on a rank of ``stage``, at its peak.

    One block at a time is whole again, where backward computes it a second time.
    """
    kept, again = activations_per_token(job, stage=stage)
    return math.ceil((kept * _in_flight(job, stage) + again) * job.micro_batch_tokens)


def activations_per_token(job: StudentJob, *, stage: int) -> tuple[float, float]:
    """Bytes that a forward pass of ``stage`` keeps, and those of a block that is computed again.

    With full recomputation a block keeps its input alone; with selective recomputation, which is of
    little use with fused attention, its core keeps queries, keys and values.
    """
    recompute = job.config.student.recompute
    layers = list(_layers(job, stage))
    whole = [_layer_bytes(job, layer) for layer in layers]
    kept, extra = sum(whole), 0.0
    boundary = job.shape.hidden_size * job.width / _sequence_split(job)
    if recompute.granularity == "full":
        count, size = len(layers), recompute.num_layers
        if recompute.method == "uniform":
            kept, extra = math.ceil(count / size) * boundary, max(whole) * size
        else:
            again = min(count, size * job.vp)
            kept, extra = again * boundary + sum(whole[again:]), max(whole)
    if stage == job.pp - 1:  # the final norm
        kept += _norm(job, job.shape.hidden_size) / _sequence_split(job)
    return kept, extra


def _layers(job: StudentJob, stage: int) -> Iterator[int]:
    per_chunk = job.shape.num_layers // (job.pp * job.vp)
    for chunk in range(job.vp):
        first = (chunk * job.pp + stage) * per_chunk
        yield from range(first, first + per_chunk)


def _in_flight(job: StudentJob, stage: int) -> float:
    """Micro-batches whose activations a stage holds at once.

    1F1B (2104.04473, 2.2): one for each stage from here on. Interleaved: Megatron's warm-up of
    2 (p - r - 1) + (v - 1) p micro-batches of a v-th of the stage each, and the one at work.
    """
    if job.pp == 1:
        return 1.0
    if job.vp == 1:
        return float(min(job.pp - stage, job.num_micro_batches))
    pieces = 2 * (job.pp - stage - 1) + (job.vp - 1) * job.pp + 1
    return min(pieces, job.num_micro_batches * job.vp) / job.vp


def _sequence_split(job: StudentJob) -> int:
    return job.tp if job.config.student.parallel.sequence_parallel else 1


def _norm(job: StudentJob, size: int) -> float:
    """A norm of ``size``: its input in float32, its result, and that before the weight, where the
    weight learns."""
    return size * (4 + job.width * (2 if _norms_learn(job) else 1))


def _norms_learn(job: StudentJob) -> bool:
    return job.config.student.lora.rank is None


def _layer_bytes(job: StudentJob, layer: int) -> float:
    """Kept per token by one layer, on one rank."""
    shape, width = job.shape, job.width
    queries = shape.num_attention_heads * shape.head_dim
    groups = shape.num_query_groups * shape.head_dim
    # the fused projection (values are a part of it), then queries and keys behind the rotation
    core = width * ((queries + 2 * groups) + (queries + groups))
    if shape.qk_norm:
        core += _qk_norm(job, queries, groups)
    core += width * queries  # the result, which is the output projection's input
    if job.config.student.recompute.granularity != "selective":
        core += 4 * shape.num_attention_heads  # log-sum-exps
    split = core + (0 if layer in shape.sparse_layers else 5 * width * shape.ffn_hidden_size)
    per_rank = 2 * _norm(job, shape.hidden_size) / _sequence_split(job) + split / job.tp
    return per_rank + (_experts_bytes(job) if layer in shape.sparse_layers else 0.0)


def _qk_norm(job: StudentJob, queries: int, groups: int) -> int:
    """Norms of queries and keys. In float32 keys, and queries of a single group, are a part of the
    fused projection."""
    weighed = job.width * (queries + groups) if _norms_learn(job) else 0
    if job.width < 4:
        return weighed + 4 * (queries + groups)
    return weighed + (4 * queries if job.shape.num_query_groups > job.tp else 0)


def _experts_bytes(job: StudentJob) -> float:
    """Router and experts, where every expert gets as many tokens: K copies of each token."""
    moe, width = job.shape.moe, job.width
    assert moe is not None
    copies = moe.num_experts_per_tok
    router = 4 * 4 * moe.num_experts / _sequence_split(job)
    tokens = 2 * job.shape.hidden_size + 5 * moe.ffn_hidden_size / job.tp
    return router + copies * width * tokens


def logits_bytes(job: StudentJob) -> int:
    """The output layer and the loss (`mopd.losses.head`): blocks of logits, and what adds up.

    Fused: a panel of logits, their copy in float32, the gradient and the loss's temporaries for
    one block of rows; gradients of the hidden states and of the output weight. Else the logits
    and their gradient as a whole.
    """
    columns = math.ceil(job.shape.vocab_size / job.tp)
    tokens, hidden, width = job.micro_batch_tokens, job.shape.hidden_size, job.width
    rows = min(tokens, block_rows(job.device_type, columns))
    block = rows * columns * 4 * (1 + LOSS_BLOCKS + (width != 4))
    if not job.config.student.fused_head:
        return block + 2 * tokens * columns * width
    panel = min(tokens, max(rows, PANEL_ROWS)) * columns * width
    states = tokens * hidden * (4 + width)
    frozen = job.config.student.lora.rank is not None
    of_weight = 0 if frozen else columns * hidden * (4 + (width if width != 4 else 0))
    return block + panel + states + of_weight


def projection_bytes(job: StudentJob, teacher_vocab_size: int) -> int:
    """Rows of one tensor-parallel rank: 12 bytes a nonzero, 16 per teacher token."""
    rows = math.ceil(job.shape.vocab_size / job.tp)
    return math.ceil(12 * ENTRIES_PER_TOKEN * rows) + 16 * teacher_vocab_size
