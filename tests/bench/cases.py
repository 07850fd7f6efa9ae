"""The loss rows: what is run for us, for the baseline, and in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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
from tests.bench import ctkd_cases, formulas, gold_cases, problems
from tests.helpers.losses import build_loss, step_of

Run = Callable[[], tuple[Tensor, Tensor]]  # -> value, gradient in the logits
SLICE = 256  # rows that a float64 reference takes at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """``rows`` x ``vocab`` student logits; the teacher's vocabulary where it differs."""

    rows: int
    vocab: int
    teacher_vocab: int = 0
    top: int = 64  # listed teacher tokens, shared teacher columns, or sorted student ones

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
    truncation: Callable[[], dict[str, float]] | None = None  # what sorting only some leaves out
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


def _ctkd(found: ctkd_cases.CtkdCase) -> Case:
    problem = found.problem
    case = _against_forward_kl(problem, found.loss, found.formula, found.what)
    return replace(case, ours=through_head(found.loss, problem.logits, found.rows, problem.shard))


def ctkd_boundary(shape: Shape, cache: Path) -> Case:
    sizes = (shape.vocab, shape.teacher_vocab)
    return _ctkd(ctkd_cases.boundary(sizes, shape.rows, cache))


def ctkd_pkl(shape: Shape, cache: Path) -> Case:
    sizes = (shape.vocab, shape.teacher_vocab)
    return _ctkd(ctkd_cases.shared(sizes, shape.rows, cache, columns=shape.top))


def ctkd_pkl_full(shape: Shape, cache: Path) -> Case:
    sizes = (shape.vocab, shape.teacher_vocab)
    return _ctkd(ctkd_cases.shared(sizes, shape.rows, cache, columns=None))


def _sorted(found: gold_cases.SortedProblem) -> Case:
    problem = replace(found.problem, rows=found.rows)
    case = _against_forward_kl(problem, found.loss, found.formula, found.what)
    return replace(case, truncation=found.truncation)


def gold_sorted(shape: Shape, cache: Path) -> Case:
    sizes = (shape.vocab, shape.teacher_vocab)
    return _sorted(gold_cases.hybrid(sizes, shape.rows, cache, top_u=shape.top))


def uld_sorted(shape: Shape, cache: Path) -> Case:
    sizes = (shape.vocab, shape.teacher_vocab)
    return _sorted(gold_cases.uld(sizes, shape.rows, cache, top_u=shape.top))


def uld_exact(shape: Shape, cache: Path) -> Case:
    sizes = (shape.vocab, shape.teacher_vocab)
    return _sorted(gold_cases.uld(sizes, shape.rows, cache, top_u=None))
