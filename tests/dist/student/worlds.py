"""Tiny students, a vocabulary-parallel loss, and rank functions that several tests share."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mopd.config.schema import OptimizerSection, ParallelSection, StudentSection
from mopd.device import get_device
from mopd.losses.base import LossOutput
from mopd.student.model import StudentModel, build_student
from mopd.student.optim import build_optimizer
from mopd.student.parallel import Topology, initialize
from mopd.student.step import LossFunction, StepResult, Student
from mopd.types import MicroBatch, StepBatch

FAMILIES = ("llama", "llama3", "mistral", "qwen2", "qwen3")
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel axes; `dp` is what the number of processes leaves, `ep` is over it."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    vp: int | None = None
    ep: int = 1
    sequence_parallel: bool = False

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def section(self) -> ParallelSection:
        return ParallelSection(
            tensor_model_parallel_size=self.tp,
            sequence_parallel=self.sequence_parallel,
            pipeline_model_parallel_size=self.pp,
            virtual_pipeline_model_parallel_size=self.vp,
            context_parallel_size=self.cp,
            expert_model_parallel_size=self.ep,
        )


@dataclass(frozen=True)
class Run:
    """What a rank function trains: `micro_rows` rows per micro-batch, `steps` steps."""

    model_dir: str
    layout: Layout = field(default_factory=Layout)
    micro_rows: int = 4
    steps: int = 3
    student: dict[str, Any] = field(default_factory=dict)  # more keys of its section
    packed: bool = False
    uneven: bool = False  # the first of two replicas has three quarters of the rows


def make_model(
    family: str, out_dir: Path, *, dtype: torch.dtype = torch.float32, **sizes: Any
) -> Path:
    """A random model of a family, saved by transformers. 67 tokens: odd, so tp = 2 pads."""
    import transformers as tf

    torch.manual_seed(5)
    sizes = SIZES | sizes
    if family.startswith("moe"):
        model = make_moe(family)
    elif family == "mistral":
        config = tf.MistralConfig(
            vocab_size=67, head_dim=32, sliding_window=None, tie_word_embeddings=False, **sizes
        )
        model = tf.MistralForCausalLM(config)
    elif family.startswith("llama"):
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        if family == "llama3":
            rope |= {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0}
            rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
        config = tf.LlamaConfig(
            vocab_size=67, head_dim=32, rope_parameters=rope, tie_word_embeddings=False, **sizes
        )
        model = tf.LlamaForCausalLM(config)
    elif family == "qwen2":
        sizes |= {"hidden_size": 128}  # Qwen2 has no head_dim of its own
        config = tf.Qwen2Config(vocab_size=67, tie_word_embeddings=True, **sizes)
        model = tf.Qwen2ForCausalLM(config)
    else:
        config = tf.Qwen3Config(vocab_size=67, head_dim=32, tie_word_embeddings=True, **sizes)
        model = tf.Qwen3ForCausalLM(config)
    with torch.no_grad():  # norms and biases start at constants that hide mistakes
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.to(dtype).save_pretrained(out_dir)
    return out_dir


def make_moe(family: str) -> Any:
    """Four experts, two per token. `moe`: in both layers; `moe-raw`: weights of a token's experts
    as they are; `moe-mixed`: the first layer is dense; `moe-deep`: the second of four layers is.
    """
    import transformers as tf

    config = tf.Qwen3MoeConfig(
        vocab_size=67,
        head_dim=32,
        moe_intermediate_size=48,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=family != "moe-raw",
        mlp_only_layers={"moe-mixed": [0], "moe-deep": [1]}.get(family, []),
        router_aux_loss_coef=0.02,
        tie_word_embeddings=family != "moe-mixed",
        **SIZES | {"num_hidden_layers": 4 if family == "moe-deep" else 2},
    )
    return tf.Qwen3MoeForCausalLM(config)


def join(layout: Layout) -> Topology:
    """This process's place in the layout."""
    return initialize(layout.section, backend=get_device("cpu"), seed=3)


def build(
    run: Run,
    loss_function: LossFunction | None = None,
    *,
    section: OptimizerSection | None = None,
    total_steps: int = 10,
) -> Student:
    """A student in the layout of `run`, with the shared loss unless another is given."""
    topology = join(run.layout)
    # A small epsilon would let Adam turn rounding noise of near-zero gradients into steps.
    section = section or OptimizerSection(
        lr=1e-2, lr_warmup_fraction=0.2, adam_eps=1e-4, clip_grad=0.5
    )
    student = StudentSection(
        model=run.model_dir, parallel=run.layout.section, optimizer=section, **run.student
    )
    model = build_student(student, topology=topology)
    optimizer, scheduler = build_optimizer(section, model=model, total_steps=total_steps)
    return Student(
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        loss_function=loss_function or NextToken(model),
        clip_grad=section.clip_grad,
        fused_head=True,
    )


class NextToken:
    """Mean cross entropy on response rows, written against vocabulary shards."""

    def __init__(self, model: StudentModel) -> None:
        self._model = model

    def __call__(
        self, logits: torch.Tensor, micro_batch: MicroBatch, batch: StepBatch
    ) -> LossOutput:
        rows = torch.from_numpy(micro_batch.response_mask)
        targets = torch.from_numpy(np.roll(micro_batch.tokens, -1, axis=1))[rows]
        losses = cross_entropy(logits[rows], targets, self._model)
        scale = batch.num_tokens / batch.denominators["teacher"]
        count = torch.tensor(float(len(targets)))
        return LossOutput(total=losses.sum() * scale + logits[:0].sum(), metrics={"rows": count})


class _Sum(torch.autograd.Function):
    """Sum over tensor-parallel ranks whose gradient goes to each of them as it is."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        values = values.clone()
        if group is not None:
            dist.all_reduce(values, group=group)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, model: StudentModel) -> torch.Tensor:
    """Cross entropy [R] of vocabulary shards [R, V_local] and token ids [R]."""
    topology, local = model.topology, logits.shape[-1]
    ids = torch.arange(local) + topology.tp_rank * local
    logits = logits.float().masked_fill(ids >= model.vocab_size, float("-inf"))
    maximum = logits.detach().amax(-1)
    if topology.tp_group is not None:
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=topology.tp_group)
    exponentials = (logits - maximum[:, None]).exp().sum(-1)
    total = _Sum.apply(exponentials, topology.tp_group)
    is_target = ids == targets[:, None]
    chosen = torch.where(is_target, logits, 0.0).sum(-1)
    return total.log() + maximum - _Sum.apply(chosen, topology.tp_group)


def step_batch(step: int, *, run: Run, dp_rank: int, empty: int = 0) -> StepBatch:
    """One replica's share of eight random rows of unequal length; rows are dealt in order."""
    generator = np.random.default_rng(step)
    rows, width = 8, 12
    tokens = generator.integers(0, 67, (rows, width))
    lengths = generator.integers(5, width + 1, rows)
    position = np.arange(width)
    mask = (position >= 2) & (position < lengths[:, None] - 1)
    tokens[position >= lengths[:, None]] = 0
    parts = [3 * rows // 4] if run.uneven else run.layout.dp
    mine = np.array_split(np.arange(rows), parts)[dp_rank]
    micro_batches = [
        MicroBatch(tokens=tokens[part], lengths=lengths[part], response_mask=mask[part])
        for part in mine.reshape(-1, run.micro_rows)
    ]
    if run.packed:
        micro_batches = [packed(micro_batch) for micro_batch in micro_batches]
    nothing = MicroBatch(
        tokens=np.zeros((run.micro_rows, width), dtype=np.int64),
        lengths=np.zeros(run.micro_rows, dtype=np.int64),
        response_mask=np.zeros((run.micro_rows, width), dtype=bool),
    )
    return StepBatch(
        step=step,
        micro_batches=(*micro_batches, *[nothing] * empty),
        denominators={"teacher": float(mask.sum())},
        num_tokens=int(lengths.sum()),
        metrics={},
    )


def packed(micro: MicroBatch) -> MicroBatch:
    """The same texts behind each other."""
    real = np.arange(micro.tokens.shape[1]) < micro.lengths[:, None]
    return MicroBatch(
        tokens=micro.tokens[real][None],
        lengths=micro.lengths,
        response_mask=micro.response_mask[real][None],
        offsets=np.concatenate([[0], np.cumsum(micro.lengths)]),
    )


def gradients(run: Run) -> tuple[StepResult, dict[str, torch.Tensor]]:
    """One step that changes nothing: its result, and on leads its gradient by Hugging Face name."""
    section = OptimizerSection(lr=1e-2, lr_warmup_fraction=0.0, clip_grad=0.0)
    student = build(run, section=section)
    result = student.train_step(step_batch(0, run=run, dp_rank=student.model.topology.dp_rank))
    with torch.no_grad():
        for _, parameter in student.model.named_parameters():
            parameter.copy_(parameter.main_grad)
    return result, full_weights(student)


def full_weights(student: Student) -> dict[str, torch.Tensor]:
    """Hugging Face tensors on the lead rank, nothing elsewhere."""
    from mopd.student.hf_io import iter_hf_weights

    return {
        name: tensor.clone()
        for name, tensor in iter_hf_weights(student.model)
        if tensor is not None
    }


def train(run: Run) -> tuple[list[StepResult], dict[str, torch.Tensor]]:
    """Train; every step's result, and the weights on replica 0's lead."""
    student = build(run)
    dp_rank = student.model.topology.dp_rank
    results = [
        student.train_step(step_batch(step, run=run, dp_rank=dp_rank)) for step in range(run.steps)
    ]
    return results, full_weights(student)


def logits(run: Run, tokens: np.ndarray) -> torch.Tensor:
    """Full logits of `tokens`, as seen by this rank."""
    return build(run).forward_logits(tokens)


def round_trip(run: Run, out_dir: str) -> bool:
    """Load and save; whether this rank is the lead."""
    from mopd.student.hf_export import save_hf

    student = build(run)
    save_hf(student.model, out_dir, source_dir=run.model_dir)
    return student.model.topology.is_lead


def logprobs(run: Run, ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """The probe's scores on every rank."""
    return build(run).logprobs(ids, vocab_size=vocab_size)
