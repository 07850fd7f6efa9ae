"""The row of packing: a student's whole step on texts of unequal length, packed and padded."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mopd.config.schema import OptimizerSection, ParallelSection, StudentSection
from mopd.device import get_device
from mopd.losses.head import DistillationHead
from mopd.losses.vocab import VocabShard
from mopd.student.model import build_student
from mopd.student.optim import build_optimizer
from mopd.student.parallel import initialize, shutdown
from mopd.student.step import Student
from mopd.types import MicroBatch, StepBatch
from tests.bench import measure

VOCAB, SHORTEST, SPREAD = 1024, 512, 4
TEXTS, ROWS = {False: 16, True: 2}, {False: 4, True: 2}


def packing(quick: bool, repeats: int) -> dict[str, Any]:
    """Micro-batches of the same room: padded rows, and as many packed tokens."""
    texts = draw(TEXTS[quick], 32 if quick else SHORTEST)
    rows, longest = ROWS[quick], max(map(len, texts))
    sides = {
        "ours": step_of(packed(texts, rows * longest)),
        "baseline": step_of(padded(texts, rows, longest)),
    }
    with tempfile.TemporaryDirectory(prefix="mopd-bench-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron's own, once a layer
        try:
            student = build(Path(folder), small=quick)
            losses = {name: student.train_step(batch).loss for name, batch in sides.items()}
            seconds = measure.cpu_seconds(
                {name: lambda b=batch: student.train_step(b) for name, batch in sides.items()},
                min(repeats, 3),
            )
        finally:
            shutdown()
    tokens = sum(map(len, texts))
    return {
        "ratio": seconds["ours"] / seconds["baseline"],
        "peak_tensors": None,
        "cpu_seconds": seconds["ours"],
        "repeats": min(repeats, 3),
        "work": (
            f"a training step of {len(texts)} texts of {min(map(len, texts))}-{longest} tokens "
            f"(log-uniform), {tokens / seconds['ours']:,.0f} tokens a CPU second packed, "
            f"{tokens / seconds['baseline']:,.0f} padded"
        ),
        "baseline": f"the same texts padded to the longest, {rows} rows a micro-batch",
        # the first step of both starts from the same weights, up to a learning rate of 1e-12
        "error": {"value": abs(losses["ours"] / losses["baseline"] - 1.0)},
    }


def draw(count: int, shortest: int) -> list[np.ndarray]:
    """Random texts whose lengths are log-uniform over a factor of `SPREAD`."""
    generator = np.random.default_rng(0)
    lengths = (shortest * SPREAD ** generator.random(count)).astype(int)
    lengths[:2] = shortest, shortest * SPREAD
    return [generator.integers(0, VOCAB, n) for n in lengths.tolist()]


def padded(texts: list[np.ndarray], rows: int, length: int) -> list[MicroBatch]:
    found = []
    for begin in range(0, len(texts), rows):
        part = texts[begin : begin + rows]
        tokens = np.zeros((len(part), length), dtype=np.int64)
        for row, text in enumerate(part):
            tokens[row, : len(text)] = text
        lengths = np.array([len(text) for text in part])
        mask = np.arange(length) < lengths[:, None] - 1
        found.append(MicroBatch(tokens=tokens, lengths=lengths, response_mask=mask))
    return found


def packed(texts: list[np.ndarray], budget: int) -> list[MicroBatch]:
    groups: list[list[np.ndarray]] = []
    for text in texts:
        if not groups or sum(map(len, groups[-1])) + len(text) > budget:
            groups.append([])
        groups[-1].append(text)
    found = []
    for group in groups:
        lengths = np.array([len(text) for text in group])
        offsets = np.cumsum([0, *lengths])
        mask = np.ones((1, int(offsets[-1])), dtype=bool)
        mask[0, offsets[1:] - 1] = False
        found.append(
            MicroBatch(
                tokens=np.concatenate(group)[None],
                lengths=lengths,
                response_mask=mask,
                offsets=offsets,
            )
        )
    return found


def step_of(micro_batches: list[MicroBatch]) -> StepBatch:
    return StepBatch(
        step=0,
        micro_batches=tuple(micro_batches),
        denominators={},
        num_tokens=sum(int(m.lengths.sum()) for m in micro_batches),
        metrics={},
        num_response_tokens=sum(int(m.response_mask.sum()) for m in micro_batches),
        crossentropy_weight=1.0,
    )


def build(folder: Path, *, small: bool) -> Student:
    """A random Qwen3 of 4 layers that hardly moves."""
    import transformers as tf

    hidden = 64 if small else 256
    config = tf.Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    tf.Qwen3ForCausalLM(config).save_pretrained(folder)
    topology = initialize(ParallelSection(), backend=get_device("cpu"), seed=1)
    section = StudentSection(model=str(folder), optimizer=OptimizerSection(lr=1e-12))
    model = build_student(section, topology=topology)
    optimizer, scheduler = build_optimizer(section.optimizer, model=model, total_steps=100)
    head = DistillationHead(terms={}, shard=VocabShard(start=0, size=VOCAB, vocab_size=VOCAB))
    return Student(
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        loss_function=head,
        clip_grad=1.0,
        fused_head=True,
    )
