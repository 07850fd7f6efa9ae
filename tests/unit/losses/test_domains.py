"""The divergence of a domain is that of its own rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mopd.losses.head import DistillationHead, TeacherTerm
from mopd.losses.observe import COUNT, SUM
from mopd.losses.vocab import VocabShard
from mopd.projection import ProjectionShard
from mopd.types import MicroBatch, TeacherRows, no_native_rows
from tests.helpers.losses import build_loss, step_of
from tests.helpers.random_losses import V_S, problem, whole_rows
from tests.helpers.token_losses import build_opd

CASES = ["kl", "kl whole", "ctkd", "ctkd native", "gold", "uld", "opd"]
DOMAINS = ("x", "y", "x")  # three texts of three positions


def parts(case: str) -> tuple[Any, Any, TeacherRows]:
    """(loss, projection, payload) with uneven weights."""
    name, _, how = case.partition(" ")
    found = whole_rows(3) if how == "whole" else problem(3, same_vocabulary=name == "kl")
    projection = ProjectionShard(found.projection, start=0, end=V_S, device=torch.device("cpu"))
    generator = np.random.default_rng(1)
    count = len(found.rows.position)
    weight = generator.uniform(0.5, 2.0, count)
    rows = replace(found.rows, row_weight=weight, chunk_weight=weight[::-1].copy())
    if how == "native":
        native = no_native_rows() | {
            "native_position": rows.position,
            "native_weight": weight,
            "native_ids": generator.integers(0, V_S, (count, 1)).astype(np.int32),
            "native_logprobs": np.full((count, 1), -0.5),
            "native_log_tail": np.full(count, np.log1p(-np.exp(-0.5))),
        }
        none = np.zeros((count, 0))
        rows = replace(rows, topk_ids=none.astype(np.int32), topk_logprobs=none, **native)
    if name == "opd":
        return build_opd(), None, rows
    if name == "uld":
        projection = projection.without_common()
    loss = build_loss("gold" if name == "uld" else name, projection)
    return loss, None if name == "kl" else projection, rows


def measured(loss: Any, projection: Any, rows: TeacherRows, micro: MicroBatch) -> dict[str, float]:
    term = TeacherTerm(loss=loss, weight=1.0, projection=projection)
    head = DistillationHead(
        terms={"t": term}, shard=VocabShard(start=0, size=V_S, vocab_size=V_S), block_size=4
    )
    micro = replace(micro, rows={"t": rows})
    _, batch = step_of(rows, 9)
    logits = problem(3).logits.reshape(3, 3, V_S)
    return {name: float(value) for name, value in head(logits, micro, batch).metrics.items()}


@pytest.mark.parametrize("case", CASES)
def test_a_domain_has_the_divergence_of_its_rows(case: str) -> None:
    loss, projection, rows = parts(case)
    micro = MicroBatch(
        tokens=np.zeros((3, 3), dtype=np.int64),
        lengths=np.full(3, 3),
        response_mask=np.ones((3, 3), dtype=bool),
        domains=DOMAINS,
    )
    found = measured(loss, projection, rows, micro)
    for domain in ("x", "y"):
        inside = np.array([DOMAINS[p // 3] == domain for p in rows.position])
        weights = {
            "row_weight": np.where(inside, rows.row_weight, 0.0),
            "chunk_weight": np.where(inside, rows.chunk_weight, 0.0),
        }
        if case == "ctkd native":
            weights["native_weight"] = np.where(inside, rows.native_weight, 0.0)
        only = measured(loss, projection, replace(rows, **weights), replace(micro, domains=()))
        total, count = found[f"{SUM}kl_domain/{domain}"], found[f"{COUNT}kl_domain/{domain}"]
        if case == "uld":
            assert total == count == 0.0
            continue
        used = weights["chunk_weight" if case == "opd" else "row_weight"]
        assert total == pytest.approx(only["kl/t"], rel=1e-9) and abs(total) > 1e-3
        assert count == pytest.approx(used.sum())
        assert not any(key.startswith(SUM) for key in only)
