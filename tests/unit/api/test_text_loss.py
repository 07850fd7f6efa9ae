"""The library's losses are those of training: numbers, gradients, masks and what tokens have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

import mopd
from mopd.align.batch import Batching
from mopd.config import load_config
from mopd.config.schema import RunConfig
from mopd.demo import World
from mopd.losses.head import DistillationHead
from mopd.losses.vocab import VocabShard
from mopd.projection import build_projection as build_matrix
from mopd.runtime.aligner import Aligner, AlignOptions, Tally
from mopd.runtime.collate import collate
from mopd.runtime.objective import step_objective, teacher_terms
from mopd.runtime.payloads import Pair, pairs, payload_options, projection_options
from mopd.serving.models import load_causal_lm
from mopd.teachers.hf import HfOptions, HfTeacher
from mopd.tokens.chat import ChatTokenizer
from tests.helpers.teachers import make_rollout_of

TEXT = "bo ka vi 12 caf\u00e9 bobo 3 4 56"
PADDED = 8  # columns behind the student's vocabulary
LOSSES: dict[str, Callable[..., mopd.TextLoss]] = {
    "ctkd": mopd.ctkd_loss,
    "gold": mopd.gold_loss,
    "uld": mopd.uld_loss,
    "kl": mopd.kl_loss,
    "opd": mopd.opd_loss,
}
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("ctkd", {}, {}),
    ("ctkd", {"lambda_chunk": 1.0, "divergence": {"kind": "jsd"}}, {"temperature": 2.0}),
    ("ctkd", {"map": "exact", "interior_rows": True}, {"normalization": "token"}),
    ("ctkd", {"canonical_paths": True}, {}),
    ("ctkd", {"loss_type": "hkl"}, {}),
    ("ctkd", {"direction": "pull", "gamma": 0.5, "path_terms": False}, {}),
    ("gold", {}, {"temperature": 1.5, "scale_by_t2": False}),
    ("gold", {"merge": "observed"}, {}),
    ("uld", {}, {"normalization": "sequence"}),
    ("kl", {}, {}),
    ("kl", {"support": "union", "support_top_k": 5}, {}),
    ("opd", {"discount": 0.5, "importance": "none"}, {}),
    ("opd", {"importance": "sequence_mask", "lower": 0.0, "upper": 1e9, "policy": "old"}, {}),
]


@dataclass(frozen=True)
class Side:
    student: mopd.Tokenizer
    teacher: mopd.Tokenizer
    logits: torch.Tensor  # [S, V_S + PADDED] float64
    teacher_logits: torch.Tensor  # [T, V_T]
    aligned: mopd.AlignedText


class Bench:
    """A real teacher's logits of one answer; the student is random numbers."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.chat = {
            "student": ChatTokenizer.load(world.student),
            "upper": ChatTokenizer.load(world.teachers["upper"]),
        }
        self.rollout = make_rollout_of(self.chat["student"], TEXT.encode())
        generator = torch.Generator().manual_seed(3)
        shape = (len(self.rollout.token_ids), self.chat["student"].vocabulary.size + PADDED)
        self.logits = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)

    def directory(self, teacher: str) -> Any:
        return self.world.student if teacher == "student" else self.world.teachers[teacher]

    def side(self, teacher: str) -> Side:
        """What a notebook does: two tokenizers, two models, rows behind the prompt."""
        student = mopd.load_tokenizer(self.world.student)
        other = mopd.load_tokenizer(self.directory(teacher))
        aligned = mopd.align_text(TEXT, student, other, end_turn=True)
        model = load_causal_lm(self.directory(teacher), device=torch.device("cpu"))
        prompt = self.chat[teacher].prompt_ids(self.rollout.prompt.messages)
        ids = torch.tensor(np.concatenate([prompt, aligned.teacher_ids]), dtype=torch.int64)
        with torch.no_grad():
            found = model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1]
        return Side(student, other, self.logits, found, aligned)

    def training(self, teacher: str, config: RunConfig) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, gradient [S, V]) of a run's own teacher, aligner, collation and head."""
        student, other = self.chat["student"], self.chat[teacher]
        scorer = HfTeacher(
            "t",
            self.directory(teacher),
            tokenizer=other,
            student=student,
            device=torch.device("cpu"),
            options=HfOptions(
                top_k=config.distillation.top_k,
                temperature=config.distillation.temperature,
                batch_size=1,
            ),
        )
        matrix = build_matrix(student.vocabulary, other.vocabulary, projection_options(config))
        needed = config.distillation.loss in ("ctkd", "gold", "uld")
        found: dict[str, Pair] = pairs(
            config,
            {"t": matrix} if needed else {},
            student=student.vocabulary,
            teachers={"t": other.vocabulary},
        )
        objective = step_objective(config, ["sort"])
        aligner = Aligner(
            student=student,
            teachers={"t": other},
            payload={
                "t": payload_options(
                    config, found["t"], student=student.vocabulary, teacher=other.vocabulary
                )
            },
            objective=objective,
            options=AlignOptions(),
        )
        said = [{"t": scorer.score([self.rollout])[0]}]
        batch, _ = collate(
            0,
            aligner.samples([self.rollout], said, Tally()),
            scores=said,
            masked=(0.0, 1.0),
            objective=objective,
            batching=Batching(size=1),
            pad_id=student.pad_id,
            sum_over_replicas=lambda sums: sums,
        )
        size, width = student.vocabulary.size, self.logits.shape[1]
        head = DistillationHead(
            terms=teacher_terms(config, found, start=0, end=width, device=torch.device("cpu")),
            shard=VocabShard(start=0, size=width, vocab_size=size),
        )
        first = len(self.rollout.prompt_ids) - 1
        whole = torch.zeros((1, batch.micro_batches[0].tokens.shape[1], width), dtype=torch.float64)
        whole[0, first:-1] = self.logits
        whole.requires_grad_()
        total = head(whole, batch.micro_batches[0], batch).total / batch.num_tokens
        (gradient,) = torch.autograd.grad(total, whole)
        return total.detach(), gradient[0, first:-1]


@pytest.fixture(scope="module")
def bench(tiny_world: World) -> Bench:
    return Bench(tiny_world)


@pytest.fixture(scope="module")
def side(bench: Bench) -> Side:
    return bench.side("upper")


@pytest.fixture(scope="module")
def projection(side: Side) -> mopd.TokenProjection:
    return mopd.build_projection(side.student, side.teacher)


def recipe(name: str, options: dict[str, Any], shared: dict[str, Any], top_k: int | None):
    """The same through a recipe's own keys."""
    words = [f"distillation.{key}={value}" for key, value in shared.items()]
    for key, value in options.items():
        nested = value.items() if isinstance(value, dict) else [(None, value)]
        words += [f"{name}.{key}{f'.{k}' if k else ''}={v}" for k, v in nested]
    words += [f"distillation.loss={name}", f"distillation.top_k={top_k or 'null'}"]
    return load_config("mopd_ctkd", [*words, "teachers.t.weight=1"])


@pytest.mark.parametrize(
    ("name", "options", "shared", "top_k"),
    # the student's support needs whole rows
    [(*case, k) for case in CASES for k in (None, 16) if k is None or "support" not in case[1]],
)
def test_training_has_the_same_numbers(
    bench: Bench,
    side: Side,
    name: str,
    options: dict[str, Any],
    shared: dict[str, Any],
    top_k: int | None,
) -> None:
    teacher = "student" if name == "kl" else "upper"
    own = bench.side(teacher) if name == "kl" else side
    logits = own.logits.clone().requires_grad_()
    temperature = shared.get("temperature", 1.0)
    scores: Any = own.teacher_logits
    if top_k is not None:
        scores = mopd.top_k_of(scores, own.aligned, k=top_k, temperature=temperature)
    keywords, more = dict(options), []
    if name in ("ctkd", "gold", "uld"):
        built = {k: keywords.pop(k) for k in ("map", "gamma") if k in keywords}
        more = [mopd.build_projection(own.student, own.teacher, **built)]
    if name == "opd":  # what the answer's sampler said
        keywords["sampling_logprobs"] = torch.zeros(len(own.aligned.student_ids))
    found = LOSSES[name](logits, scores, own.aligned, *more, **keywords, **shared)
    (gradient,) = torch.autograd.grad(found.loss, logits)
    expected, expected_gradient = bench.training(teacher, recipe(name, options, shared, top_k))
    # a mean over sequences weighs a run's rows in float32
    near = 1e-7 if shared.get("normalization") == "sequence" else 1e-12
    torch.testing.assert_close(found.loss.detach(), expected, rtol=near, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=near, atol=1e-12)
    assert gradient.any()
    parts = found.per_chunk.sum() / found.denominator
    torch.testing.assert_close(parts, found.loss.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.per_token.sum(), found.per_chunk.sum())
    assert not found.per_token[~found.judged].any()


@pytest.mark.parametrize("name", ["ctkd", "gold", "uld"])
def test_the_gradient_is_that_of_the_value(
    side: Side, projection: mopd.TokenProjection, name: str
) -> None:
    def value(logits: torch.Tensor) -> torch.Tensor:
        return LOSSES[name](logits, side.teacher_logits, side.aligned, projection).loss

    logits = side.logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(logits), logits)
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        along = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
        step = 1e-5 * along
        slope = (value(side.logits + step) - value(side.logits - step)) / 2e-5
        torch.testing.assert_close((gradient * along).sum(), slope, rtol=1e-5, atol=1e-9)


def test_a_loss_goes_on_in_the_graph_more_than_once(
    side: Side, projection: mopd.TokenProjection
) -> None:
    leaf = side.logits.clone().requires_grad_()
    before = leaf.detach().clone()
    loss = mopd.ctkd_loss(leaf * 1.0, side.teacher_logits, side.aligned, projection).loss
    (once,) = torch.autograd.grad(3.0 * loss, leaf, retain_graph=True)
    (twice,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(once, 3.0 * twice)
    assert torch.equal(leaf.detach(), before)


def test_a_mask_leaves_chunks_out(side: Side, projection: mopd.TokenProjection) -> None:
    size = len(side.aligned.student_ids)
    mask = torch.arange(size) < size // 2
    logits = side.logits.clone().requires_grad_()
    every = mopd.ctkd_loss(side.logits, side.teacher_logits, side.aligned, projection)
    half = mopd.ctkd_loss(logits, side.teacher_logits, side.aligned, projection, loss_mask=mask)
    (gradient,) = torch.autograd.grad(half.loss, logits)
    assert 0 < half.num_chunks < every.num_chunks
    assert not half.judged[~mask].any() and not gradient[~mask].any()
    torch.testing.assert_close(half.per_chunk, every.per_chunk[: half.num_chunks])


@pytest.mark.parametrize("name", ["ctkd", "gold", "uld", "opd"])
def test_nothing_judged_is_zero(side: Side, projection: mopd.TokenProjection, name: str) -> None:
    nothing = torch.zeros(len(side.aligned.student_ids), dtype=torch.bool)
    more = [] if name == "opd" else [projection]
    logits = side.logits.clone().requires_grad_()
    found = LOSSES[name](logits, side.teacher_logits, side.aligned, *more, loss_mask=nothing)
    (gradient,) = torch.autograd.grad(found.loss, logits)
    assert float(found.loss.detach()) == 0.0 and not gradient.any() and found.num_chunks == 0
    assert found.per_chunk.shape == (0,) and not found.per_token.any()


def test_an_empty_text(side: Side, projection: mopd.TokenProjection) -> None:
    aligned = mopd.align_text("", side.student, side.teacher)
    found = mopd.ctkd_loss(side.logits[:0], side.teacher_logits[:0], aligned, projection)
    assert float(found.loss) == 0.0 and found.per_token.shape == (0,)


def test_mistakes_are_one_line(side: Side, projection: mopd.TokenProjection) -> None:
    logits, teacher, aligned = side.logits, side.teacher_logits, side.aligned
    swapped = mopd.build_projection(side.teacher, side.student)
    spoilt = teacher.clone()
    spoilt[1, 2] = float("nan")
    top = mopd.top_k_of(teacher, aligned, k=4)
    bare = mopd.TopK(ids=top.ids, logprobs=top.logprobs)
    far = torch.full_like(top.ids, 10**6)
    short = mopd.TopK(ids=top.ids[1:], logprobs=top.logprobs)
    unlike = mopd.TopK(ids=far, logprobs=top.logprobs)
    heavy = mopd.TopK(ids=top.ids, logprobs=-top.logprobs)
    strange: Any = {"kind": "jsd", "top_k_mode": "genkl"}
    ones = torch.ones(2)

    def ctkd(scores: Any, student: torch.Tensor = logits, matrix=projection, **options: Any):
        return lambda: mopd.ctkd_loss(student, scores, aligned, matrix, **options)

    def gold(scores: Any, **options: Any):
        return lambda: mopd.gold_loss(logits, scores, aligned, projection, **options)

    def opd(scores: Any, **options: Any):
        return lambda: mopd.opd_loss(logits, scores, aligned, **options)

    mistakes: list[tuple[str, Callable[[], object]]] = [
        ("take rows", ctkd(teacher, logits[1:])),
        ("columns", ctkd(teacher, logits[:, :9])),
        ("floats", ctkd(teacher, logits.long())),
        ("teacher's logits", ctkd(teacher[1:])),
        ("not finite", ctkd(spoilt)),
        ("built for", ctkd(teacher, matrix=swapped)),
        ("belongs to", ctkd(teacher, map="exact")),
        ("path_terms", ctkd(teacher, path_term=False)),
        ("trains over", ctkd(teacher, learned={})),
        ("temperature=2", gold(top, temperature=2.0)),
        ("token_logprobs", gold(bare)),
        ("genkl", gold(teacher, divergence=strange)),
        ("temperature", gold(teacher, temperature=-1.0)),
        ("TopK.ids", opd(unlike)),
        ("mass", opd(heavy)),
        ("K]", opd(short)),
        ("loss_mask", opd(teacher, loss_mask=ones)),
        ("sampling_logprobs", opd(teacher, sampling_logprobs=logits)),
        ("tokenizers", lambda: mopd.kl_loss(logits, teacher, aligned)),
        ("k=0", lambda: mopd.top_k_of(teacher, aligned, k=0)),
    ]
    for expected, call in mistakes:
        with pytest.raises(mopd.ArgumentError) as caught:
            call()
        assert expected in str(caught.value) and "\n" not in str(caught.value), expected
