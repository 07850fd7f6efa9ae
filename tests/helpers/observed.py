"""What is observed beside a loss, row by row from the definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mopd.config.schema import ParallelSection
from mopd.device import get_device
from mopd.losses.observe import COUNT, SUM, Carry, Observer
from mopd.losses.source import LogitsSource
from mopd.losses.vocab import VocabShard
from mopd.projection import ProjectionShard
from mopd.student.parallel import initialize
from mopd.types import TeacherRows
from tests.helpers.losses import step_of
from tests.helpers.random_losses import V_S, V_T, Problem, problem, whole_rows

TEMPERATURE = 1.7


def case_of(carry: Carry, *, whole: bool = False) -> Problem:
    """A case whose lists are in the tokens that ``carry`` reads the student in."""
    return whole_rows(5) if whole else problem(5, same_vocabulary=carry == "own")


def expected(case: Problem, carry: Carry) -> dict[str, float]:
    """Means over the boundary rows."""
    found: dict[str, list[float]] = {}
    rows = case.rows
    for r, position in enumerate(rows.position):
        logits = case.logits[position].numpy()
        plain = _softmax(logits)
        found.setdefault("entropy", []).append(-float((plain * np.log(plain)).sum()))
        for p, token, chunk in zip(
            rows.token_position, rows.token_id, rows.token_chunk, strict=True
        ):
            if p == position and (rows.chunk_size[chunk] == 1).all():
                found.setdefault("top1", []).append(float(plain.argmax() == token))
        if carry != "none":
            _compare(found, case, r, _softmax(logits / TEMPERATURE), carry)
    return {name: float(np.mean(values)) for name, values in found.items()}


def _compare(
    found: dict[str, list[float]], case: Problem, r: int, probs: np.ndarray, carry: Carry
) -> None:
    listed = _listed(case.rows, r)
    common = case.projection.common
    if carry == "columns":
        dense = np.zeros((V_S, V_T + 1))
        for s in range(V_S):
            cut = slice(case.projection.crow[s], case.projection.crow[s + 1])
            dense[s, case.projection.col[cut]] = case.projection.val[cut]
        student = dict(enumerate((probs @ dense)[:V_T]))
    elif carry == "common":
        student = {t: probs[common[t]] for t in range(V_T) if common[t] >= 0}
    else:
        student = dict(enumerate(probs))
    found.setdefault("teacher_topk_mass", []).append(sum(listed.values()))
    support = [token for token in listed if token in student]
    if support:
        likeliest = sorted(student, key=lambda token: -student[token])
        shared = set(likeliest[: len(support)]) & set(support)
        found.setdefault("topk_mass", []).append(float(sum(student[t] for t in support)))
        found.setdefault("topk_overlap", []).append(len(shared) / len(support))
    best = max(listed, key=lambda token: listed[token])
    if best in student:
        first = max(student, key=lambda token: student[token])
        found.setdefault("top1_projected", []).append(float(first == best))


def _listed(rows: TeacherRows, r: int) -> dict[int, float]:
    logs = rows.topk_logprobs[r]
    if rows.topk_ids is None:
        return {t: float(p) for t, p in enumerate(_softmax(logs / TEMPERATURE)) if p > 0}
    pairs = zip(rows.topk_ids[r], logs, strict=True)
    return {int(t): float(np.exp(log)) for t, log in pairs if t >= 0}


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max())
    return shifted / shifted.sum()


def observed(case: Problem, carry: Carry, shard: VocabShard, logits: torch.Tensor) -> dict:
    """Means from `Observer.sums` on the columns of ``shard``."""
    end = shard.start + shard.size
    projection = ProjectionShard(
        case.projection, start=shard.start, end=end, device=torch.device("cpu")
    )
    observer = Observer(carry=carry, temperature=TEMPERATURE, projection=projection)
    micro, _ = step_of(case.rows, len(case.logits))
    source = LogitsSource(logits, shard)
    sums = observer.sums(source, case.rows, micro, shard.without_padding())
    names = [key.removeprefix(SUM) for key in sums if key.startswith(SUM)]
    assert {*sums} == {p + name for p in (SUM, COUNT) for name in names}
    return {name.removesuffix("/t"): float(sums[SUM + name] / sums[COUNT + name]) for name in names}


def shard_observed(carry: Carry, whole: bool, size: int) -> dict[str, Any]:
    """On a rank of ``size``; padded columns hold +50."""
    topology = initialize(
        ParallelSection(tensor_model_parallel_size=size), backend=get_device("cpu"), seed=1
    )
    case = case_of(carry, whole=whole)
    width = -(-V_S // size)
    start = topology.tp_rank * width
    padded = torch.full((len(case.logits), width * size), 50.0, dtype=case.logits.dtype)
    padded[:, :V_S] = case.logits
    shard = VocabShard(start=start, size=width, vocab_size=V_S, group=topology.tp_group)
    return observed(case, carry, shard, padded[:, start : start + width].contiguous())
