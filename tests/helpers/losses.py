"""Random payloads and a dense reference for every loss, written from the formulas alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mopd.losses.base import Loss
from mopd.losses.ctkd import CtkdLoss
from mopd.losses.divergence import Divergence
from mopd.losses.gold import GoldLoss
from mopd.losses.head import DistillationHead, TeacherTerm
from mopd.losses.kl import KlLoss
from mopd.losses.vocab import VocabShard
from mopd.projection import ProjectionShard
from mopd.types import (
    FibreTrie,
    MicroBatch,
    Projection,
    StepBatch,
    TeacherRows,
    no_native_rows,
)

TAIL_FLOOR = 1e-30


def make_trie(nodes: dict[tuple[int, ...], tuple[dict[int, list[int]], int]]) -> FibreTrie:
    """path -> ({next piece: student tokens}, stop token or -1)."""
    paths = sorted(nodes)
    groups = [(piece, nodes[p][0][piece]) for p in paths for piece in sorted(nodes[p][0])]

    def offsets(sizes: list[int]) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    return FibreTrie(
        node_ptr=offsets([len(p) for p in paths]),
        node_piece=np.array([t for p in paths for t in p], dtype=np.int32),
        group_ptr=offsets([len(nodes[p][0]) for p in paths]),
        group_piece=np.array([piece for piece, _ in groups], dtype=np.int32),
        member_ptr=offsets([len(m) for _, m in groups]),
        member_token=np.array([t for _, m in groups for t in m], dtype=np.int32),
        stop_token=np.array([nodes[p][1] for p in paths], dtype=np.int32),
        group_open=np.zeros(len(groups), dtype=bool),
        node_column=np.full(len(paths), -1, dtype=np.int32),
        column_ptr=np.zeros(1, dtype=np.int64),
        column_node=np.zeros(0, dtype=np.int32),
    )


def make_projection(
    weights: np.ndarray,
    *,
    nodes: dict[tuple[int, ...], tuple[dict[int, list[int]], int]] | None = None,
    common: np.ndarray | None = None,
) -> Projection:
    """From a dense [V_S, V_T + 1] matrix whose last column is null."""
    rows = [np.flatnonzero(row) for row in weights]
    size = weights.shape[1] - 1
    return Projection(
        crow=np.concatenate([[0], np.cumsum([len(r) for r in rows])]).astype(np.int32),
        col=np.concatenate(rows).astype(np.int32),
        val=np.concatenate([w[r] for w, r in zip(weights, rows, strict=True)]).astype(np.float32),
        kind=np.ones(len(weights), dtype=np.uint8),
        fold=np.arange(size, dtype=np.int32),
        common=np.full(size, -1, dtype=np.int32) if common is None else common.astype(np.int32),
        trie=make_trie(nodes or {}),
        student_fingerprint="s",
        teacher_fingerprint="t",
    )


def make_rows(
    position: list[int],
    topk_ids: np.ndarray,
    topk_probs: np.ndarray,
    *,
    paths: list[tuple[int, list[Any], list[float], float]] | None = None,
    tokens: list[tuple[int, int, int]] | None = None,
    chunk_logprob: list[float] | None = None,
    chunk_size: list[tuple[int, int]] | None = None,
) -> TeacherRows:
    """``paths``: (position, slots, target, weight), a slot being one key or a list of keys;
    ``tokens``: (position, id, chunk).
    """
    paths, tokens = paths or [], tokens or []
    slots = [[x] if isinstance(x, int) else x for _, row, _, _ in paths for x in row]
    with np.errstate(divide="ignore"):
        tail = np.log(np.maximum(1.0 - topk_probs.sum(1), 0.0))
        logs = np.log(topk_probs)
    return TeacherRows(
        teacher="t",
        position=np.array(position),
        row_weight=np.ones(len(position)),
        topk_ids=topk_ids.astype(np.int32),
        topk_logprobs=logs,
        log_tail=tail,
        chunk_logprob=np.array(chunk_logprob or [0.0] * len(position)),
        chunk_size=np.array(chunk_size or [(1, 1)] * len(position), dtype=np.int32).reshape(-1, 2),
        chunk_weight=np.ones(len(position)),
        chunk_owned=np.ones(len(position), dtype=bool),
        chunk_sequence=np.zeros(len(position), dtype=np.int64),
        token_position=np.array([p for p, _, _ in tokens], dtype=np.int64),
        token_id=np.array([t for _, t, _ in tokens], dtype=np.int64),
        token_chunk=np.array([c for _, _, c in tokens], dtype=np.int64),
        token_sampling_logprob=np.zeros(len(tokens)),
        **no_native_rows(),
        path_position=np.array([p for p, _, _, _ in paths], dtype=np.int64),
        path_weight=np.array([w for _, _, _, w in paths], dtype=np.float64),
        path_entry=np.array([x for slot in slots for x in slot], dtype=np.int64),
        path_entry_slot=np.repeat(np.arange(len(slots)), [len(slot) for slot in slots]),
        path_offsets=np.concatenate([[0], np.cumsum([len(t) for _, _, t, _ in paths])]).astype(
            np.int64
        ),
        path_target=np.array([x for _, _, t, _ in paths for x in t], dtype=np.float64),
    )


def step_of(rows: TeacherRows, length: int) -> tuple[MicroBatch, StepBatch]:
    """One micro-batch of one row of logits, divided by 1."""
    micro = MicroBatch(
        tokens=np.zeros((1, length), dtype=np.int64),
        lengths=np.array([length]),
        response_mask=np.ones((1, length), dtype=bool),
        rows={"t": rows},
    )
    batch = StepBatch(
        step=0, micro_batches=(micro,), denominators={"t": 1.0}, num_tokens=1, metrics={}
    )
    return micro, batch


def run_head(
    loss: Any,
    logits: Tensor,
    rows: TeacherRows,
    *,
    shard: VocabShard,
    projection: ProjectionShard | None,
    block_size: int = 512,
) -> tuple[Tensor, Tensor]:
    """(value, gradient) of ``logits`` [n, V_local] through the driver."""
    head = DistillationHead(
        terms={"t": TeacherTerm(loss=loss, weight=1.0, projection=projection)},
        shard=shard,
        block_size=block_size,
    )
    leaf = logits.clone().requires_grad_()
    micro, batch = step_of(rows, len(logits))
    output = head(leaf[None], micro, batch)
    output.total.backward()
    assert leaf.grad is not None
    return output.total.detach(), leaf.grad


def divergence_of(options: dict[str, Any], beta: float) -> Divergence:
    """``divergence`` as it is, else a JSD with TRL's ``beta``."""
    return options.get("divergence") or Divergence(kind="jsd", beta=options.get("beta", beta))


def build_loss(name: str, shard: ProjectionShard, **options: Any) -> Loss:
    """A loss with the recipe's defaults unless told otherwise."""
    temperature = options.get("temperature", 1.0)
    scale = temperature**2
    lambda_chunk = options.get("lambda_chunk", 0.0)
    if name == "kl":
        return KlLoss(
            divergence=divergence_of(options, 1.0),
            temperature=temperature,
            value_scale=scale,
            support=options.get("support", "teacher"),
            support_top_k=options.get("support_top_k", 5),
        )
    if name == "ctkd":
        return CtkdLoss(
            projection=shard,
            divergence=divergence_of(options, 0.0),
            temperature=temperature,
            value_scale=scale,
            lambda_chunk=lambda_chunk,
        )
    return GoldLoss(
        projection=shard,
        divergence=divergence_of(options, 0.5),
        temperature=temperature,
        value_scale=scale,
        weights=options.get("weights", (0.5, 0.5)),
        top_u=options.get("top_u", 512),
        lambda_chunk=lambda_chunk,
    )


def divergence(teacher: Tensor, student: Tensor, beta: float) -> Tensor:
    """The textbook sum over the last dimension, in fp64."""

    def kl(p: Tensor, q: Tensor) -> Tensor:
        inner = p * (torch.log(p.clamp_min(TAIL_FLOOR)) - torch.log(q.clamp_min(TAIL_FLOOR)))
        return torch.where(p > 0, inner, 0.0).sum(-1)

    if beta == 0.0:
        return kl(teacher, student)
    if beta == 1.0:
        return kl(student, teacher)
    mixture = beta * teacher + (1 - beta) * student
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def dense_ctkd(
    logits: Tensor, rows: TeacherRows, projection: Projection, *, beta: float, temperature: float
) -> Tensor:
    """Boundary and path terms from dense matrices and Python loops."""
    weights = torch.zeros(projection.student_size, projection.teacher_size + 1, dtype=logits.dtype)
    for s in range(projection.student_size):
        for e in range(projection.crow[s], projection.crow[s + 1]):
            weights[s, projection.col[e]] = float(projection.val[e])
    scaled = logits[:, : projection.student_size] / temperature
    probs = torch.softmax(scaled, dim=-1)
    total = logits.new_zeros(())
    for r, at in enumerate(rows.position):
        kept = rows.topk_ids[r] >= 0
        ids = torch.as_tensor(rows.topk_ids[r][kept].astype(np.int64))
        listed = torch.exp(torch.as_tensor(rows.topk_logprobs[r][kept]))
        pushed = probs[at] @ weights
        inside = pushed[ids]
        teacher = torch.cat([listed, torch.exp(torch.as_tensor(rows.log_tail[r : r + 1]))])
        student = torch.cat([inside, (1.0 - inside.sum())[None]])
        total = total + divergence(teacher, student, beta)
    trie = projection.trie
    for q, at in enumerate(rows.path_position):
        cut = range(rows.path_offsets[q], rows.path_offsets[q + 1])
        members = [
            [
                token
                for key in rows.path_entry[rows.path_entry_slot == slot].tolist()
                for token in (
                    [-1 - key]
                    if key < 0
                    else trie.member_token[trie.member_ptr[key] : trie.member_ptr[key + 1]].tolist()
                )
            ]
            for slot in cut
        ]
        masses = torch.stack([probs[at][m].sum() for m in members])
        target = torch.as_tensor(rows.path_target[cut.start : cut.stop])
        total = total + float(rows.path_weight[q]) * divergence(target, masses / masses.sum(), beta)
    return total * temperature**2
