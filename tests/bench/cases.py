"""The loss rows: what is run for us, for the baseline, and in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mopd.losses.base import ProjectionRows
from mopd.losses.divergence import Divergence
from mopd.losses.head import DistillationHead, TeacherTerm
from mopd.losses.vocab import VocabShard
from mopd.types import TeacherRows
from tests.bench import formulas, problems
from tests.helpers.losses import build_loss, step_of

Run = Callable[[], tuple[Tensor, Tensor]]  # -> value, gradient in the logits
SLICE = 256  # rows that a float64 reference takes at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """``rows`` x ``vocab`` student logits; the teacher's vocabulary where it differs."""

    rows: int
    vocab: int
    teacher_vocab: int = 0
    top: int = 64  # listed teacher tokens, or sorted student ones

    def scaled(self, *, rows: int = 1, vocab: int = 1) -> Shape:
        return Shape(
            rows=self.rows * rows,
            vocab=self.vocab * vocab,
            teacher_vocab=self.teacher_vocab * vocab,
            top=self.top,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """``same_formula`` is the row's own loss in plain torch, where the baseline is another one."""

    ours: Run
    baseline: Run
    reference: Run
    same_formula: Run | None = None
    tensor_bytes: int
    work: str
    baseline_name: str

    def side(self, name: str) -> Run:
        run = getattr(self, name)
        assert run is not None
        return run


def plain(logits: Tensor, value: Callable[[Tensor], Tensor]) -> Run:
    """Forward and backward of a formula under autograd."""

    def run() -> tuple[Tensor, Tensor]:
        leaf = logits.detach().requires_grad_()
        total = value(leaf)
        total.backward()
        assert leaf.grad is not None
        return total.detach(), leaf.grad

    return run


def sliced(logits: Tensor, value: Callable[[Tensor, slice], Tensor]) -> Run:
    """The same in float64 for a formula that is a sum over rows."""

    def run() -> tuple[Tensor, Tensor]:
        gradient = torch.empty(logits.shape, dtype=torch.float64)
        total = torch.zeros((), dtype=torch.float64)
        for begin in range(0, len(logits), SLICE):
            cut = slice(begin, begin + SLICE)
            part, gradient[cut] = plain(logits[cut].double(), lambda z, c=cut: value(z, c))()
            total = total + part
        return total, gradient

    return run


def through_head(
    loss: Any, logits: Tensor, rows: Callable[[], TeacherRows], projection: ProjectionRows | None
) -> Run:
    """Forward and backward of `DistillationHead` with one teacher of weight 1."""
    size = logits.shape[1]
    head = DistillationHead(
        terms={"t": TeacherTerm(loss=loss, weight=1.0, projection=projection)},
        shard=VocabShard(start=0, size=size, vocab_size=size),
    )

    def run() -> tuple[Tensor, Tensor]:
        leaf = logits.detach().requires_grad_()
        micro, batch = step_of(rows(), len(logits))
        output = head(leaf[None], micro, batch)
        output.total.backward()
        assert leaf.grad is not None
        return output.total.detach(), leaf.grad

    return run


def _full(shape: Shape, *, beta: float, formula: Callable[..., Tensor]) -> Case:
    logits = problems.peaked_logits(shape.rows, shape.vocab, seed=0)
    teacher = problems.near(logits, seed=1)
    no_tail = np.full(shape.rows, -np.inf, dtype=np.float32)

    def rows() -> TeacherRows:
        return problems.rows_of(None, teacher.numpy(), no_tail)  # the loss takes its softmax

    return Case(
        ours=through_head(build_loss("kl", None, beta=beta), logits, rows, None),
        baseline=plain(logits, lambda z: formulas.forward_kl(z, teacher)),
        reference=sliced(logits, lambda z, cut: formula(z, teacher[cut].double())),
        same_formula=plain(logits, lambda z: formula(z, teacher)) if beta else None,
        tensor_bytes=logits.nbytes,
        work=f"{shape.rows} x {shape.vocab}, dense teacher, its softmax included",
        baseline_name="forward KL: log_softmax + kl_div under autograd",
    )


def forward_kl_full(shape: Shape, cache: Path) -> Case:
    return _full(shape, beta=0.0, formula=formulas.forward_kl)


def jsd_full(shape: Shape, cache: Path) -> Case:
    return _full(shape, beta=0.5, formula=lambda z, t: formulas.jsd(z, t, 0.5))


def _listed(shape: Shape, loss: Any, formula: Callable[..., Tensor], *, what: str) -> Case:
    logits = problems.peaked_logits(shape.rows, shape.vocab, seed=0)
    ids, *listed = problems.top_k(problems.near(logits, seed=1), shape.top)
    values, tail = listed
    fixed = problems.rows_of(ids.numpy().astype(np.int32), values.numpy(), tail.numpy())
    return Case(
        ours=through_head(loss, logits, lambda: fixed, None),
        baseline=plain(logits, lambda z: formulas.topk_tail(z, ids, *listed)),
        reference=sliced(logits, lambda z, c: formula(z, ids[c], *(x[c].double() for x in listed))),
        same_formula=plain(logits, lambda z: formula(z, ids, *listed)),
        tensor_bytes=logits.nbytes,
        work=f"{shape.rows} x {shape.vocab}, top-{shape.top} {what}, forward KL",
        baseline_name="log_softmax + gather + tail under autograd",
    )


def topk_tail(shape: Shape, cache: Path) -> Case:
    return _listed(
        shape,
        build_loss("kl", None, beta=0.0),
        formulas.topk_tail,
        what="+ tail",
    )


def topk_renorm(shape: Shape, cache: Path) -> Case:
    divergence = Divergence(kind="forward_kl", top_k_mode="renorm")
    return _listed(
        shape,
        build_loss("kl", None, divergence=divergence),
        formulas.topk_renorm,
        what="renormalised",
    )


def _against_forward_kl(
    problem: problems.CrossProblem, loss: Any, formula: Callable[[Tensor], Tensor], what: str
) -> Case:
    teacher = problems.near(problem.logits, seed=6)
    rows = problem.rows
    counts = f"{len(problem.logits)} student / {problem.teacher_tokens} teacher tokens"
    return Case(
        ours=through_head(loss, problem.logits, lambda: rows, problem.shard),
        baseline=plain(problem.logits, lambda z: formulas.forward_kl(z, teacher)),
        reference=plain(problem.logits.double(), formula),
        same_formula=plain(problem.logits, formula),
        tensor_bytes=problem.logits.nbytes,
        work=(
            f"{counts}, V {problem.logits.shape[1]} / {problem.shard.teacher_size}, "
            f"{len(rows.position)} boundary rows, {what}"
        ),
        baseline_name="same-tokenizer forward KL (log_softmax + kl_div) on all student rows",
    )


def ctkd_boundary(shape: Shape, cache: Path) -> Case:
    problem = problems.cross_problem((shape.vocab, shape.teacher_vocab), shape.rows, cache)
    loss = build_loss("ctkd", problem.shard, beta=0.0)
    known = {
        dtype: (
            problems.lists_of(problem.rows, dtype),
            problems.paths_of(problem, dtype),
            problems.sparse_weights(problem.projection, shape.vocab, dtype),
        )
        for dtype in (torch.float32, torch.float64)
    }
    what = f"{len(problem.rows.path_position)} path rows, top-{problems.TOP_K} + tail, fold"
    return _against_forward_kl(problem, loss, lambda z: formulas.ctkd(z, *known[z.dtype]), what)


def _gold(problem: problems.CrossProblem, shape: Shape, weights: tuple[float, float]) -> Case:
    loss = build_loss("gold", problem.shard, beta=0.5, weights=weights, top_u=shape.top)

    def formula(logits: Tensor) -> Tensor:
        lists = problems.lists_of(problem.rows, logits.dtype)
        return formulas.gold(
            logits, lists, problem.shard.common, beta=0.5, weights=weights, top_u=shape.top
        )

    return _against_forward_kl(problem, loss, formula, f"{shape.top} sorted")


def gold_512(shape: Shape, cache: Path) -> Case:
    problem = problems.cross_problem((shape.vocab, shape.teacher_vocab), shape.rows, cache)
    return _gold(problem, shape, (0.5, 0.5))


def uld_512(shape: Shape, cache: Path) -> Case:
    problem = problems.cross_problem((shape.vocab, shape.teacher_vocab), shape.rows, cache)
    return _gold(problems.nothing_common(problem), shape, (0.0, 1.0))


BUILDERS: Mapping[str, Callable[[Shape, Path], Case]] = {
    "forward_kl_full": forward_kl_full,
    "jsd_full": jsd_full,
    "topk_tail": topk_tail,
    "topk_renorm": topk_renorm,
    "ctkd_boundary": ctkd_boundary,
    "gold_512": gold_512,
    "uld_512": uld_512,
}

_CROSS = Shape(rows=256, vocab=128256, teacher_vocab=151936, top=512)
FULL: Mapping[str, Shape] = {
    "forward_kl_full": Shape(rows=2048, vocab=32000),
    "jsd_full": Shape(rows=2048, vocab=32000),
    "topk_tail": Shape(rows=512, vocab=151936),
    "topk_renorm": Shape(rows=512, vocab=151936),
    "ctkd_boundary": _CROSS,
    "gold_512": _CROSS,
    "uld_512": _CROSS,
}
_SMALL_CROSS = Shape(rows=48, vocab=1200, teacher_vocab=1500, top=32)
QUICK: Mapping[str, Shape] = {
    "forward_kl_full": Shape(rows=64, vocab=512),
    "jsd_full": Shape(rows=64, vocab=512),
    "topk_tail": Shape(rows=32, vocab=1024, top=16),
    "topk_renorm": Shape(rows=32, vocab=1024, top=16),
    "ctkd_boundary": _SMALL_CROSS,
    "gold_512": _SMALL_CROSS,
    "uld_512": _SMALL_CROSS,
}
# where the scaling row starts from; it doubles the rows and the vocabularies
_HALF_CROSS = Shape(rows=128, vocab=64128, teacher_vocab=75968, top=512)
SCALING_BASE: Mapping[str, Shape] = {
    "forward_kl_full": Shape(rows=512, vocab=16000),
    "jsd_full": Shape(rows=512, vocab=16000),
    "topk_tail": Shape(rows=128, vocab=75968),
    "topk_renorm": Shape(rows=128, vocab=75968),
    "ctkd_boundary": _HALF_CROSS,
    "gold_512": _HALF_CROSS,
    "uld_512": _HALF_CROSS,
}
