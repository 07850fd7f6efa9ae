"""How near a student's rows are to its teacher's, beside the loss: sums without a gradient.

A teacher's k likeliest tokens are its support. The student is read in the teacher's tokens: as it
is where the tokenizers are one, on tokens with equal bytes, or through W (q~ = W^T q). On a large
vocabulary only every n-th row is looked at; which ones depends on the text alone, so that no layout
of ranks and micro-batches changes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mopd.losses.base import ProjectionRows, RowBlock
from mopd.losses.learned import LearnedRows
from mopd.losses.rows import Block
from mopd.losses.softmax import tempered
from mopd.losses.source import Source
from mopd.losses.vocab import VocabShard
from mopd.types import MicroBatch, TeacherRows

SUM, COUNT = "sum_of/", "count_of/"  # before a key of a step's line: what it is a mean of
MAX_SUPPORT = 64  # tokens of a row that are compared; whole rows: their likeliest
COLUMNS_PER_ROW = 4096  # vocabulary of which every row is looked at
BLOCK_ELEMENTS = 8_000_000  # of a block of rows, over the larger vocabulary

Carry = Literal["own", "common", "columns", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Observer:
    """What is looked at for one teacher.

    ``carry`` is how the student's tokens become the teacher's: ``own`` (one tokenizer), ``common``
    (a projection's partners of equal bytes), ``columns`` (its W), or ``none``: then only the
    student is looked at. ``temperature`` is the loss's, at which masses are taken.
    """

    carry: Carry
    temperature: float
    projection: ProjectionRows | None = None
    _tables: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @torch.no_grad()
    def sums(
        self, source: Source, payload: TeacherRows, micro: MicroBatch, shard: VocabShard
    ) -> dict[str, Tensor]:
        """Scalar sums and counts, to be added over micro-batches and replicas.

        ``SUM + name/<teacher>`` and ``COUNT + name/<teacher>``; what cannot be known is left out.
        """
        found: dict[str, Tensor] = {}
        chosen = _chosen(payload, micro, shard.vocab_size)
        width = max(shard.vocab_size, self.projection.teacher_size if self.projection else 0)
        blocks = list(_blocks(payload, chosen, max(1, BLOCK_ELEMENTS // width), source))
        cut = [block for block, _ in blocks]
        for block, (_, token) in zip(source.visit(cut), blocks, strict=True):
            for name, (total, count) in self._block(source.read(block), block, token, shard):
                for prefix, value in ((SUM, total.sum()), (COUNT, count.sum())):
                    key = f"{prefix}{name}/{payload.teacher}"
                    found[key] = found[key] + value if key in found else value
        return found

    def _block(
        self, logits: Tensor, block: Block, token: Tensor, shard: VocabShard
    ) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
        """(name, (values [n], 0 or 1 [n])). ``token`` [n] follows; -1: its chunk is not 1-1."""
        plain = shard.softmax(logits, out=torch.empty_like(logits))
        entropy = shard.lse_of(logits, plain) - shard.sum(torch.linalg.vecdot(plain, logits))
        every = torch.ones_like(entropy)
        yield "entropy", (entropy, every)
        _, likeliest = shard.top_k(plain, 1)
        one_to_one = (token >= 0).to(plain.dtype)
        yield "top1", ((likeliest[:, 0] == token).to(plain.dtype) * one_to_one, one_to_one)
        rows = block.rows
        if self.carry == "none" or rows.topk_logprobs.shape[1] == 0:
            return
        probs = plain
        if self.temperature != 1.0:
            probs = tempered(logits, torch.empty_like(logits), self.temperature, shard)
        ids, mass = _support(rows, self.temperature)
        if self.carry == "columns":
            pair = self._through_columns(probs, ids, shard)
        else:
            pair = self._on_tokens(probs, ids, shard)
        yield "teacher_topk_mass", (mass.sum(dim=1), every)
        yield from _compared(ids, mass, *pair)

    def _through_columns(
        self, probs: Tensor, ids: Tensor, shard: VocabShard
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The student's mass at ``ids`` [n, k], its own likeliest tokens [n, k], and ``ids``."""
        assert self.projection is not None
        student, column, weight = self._entries(self.projection, probs.device)
        pushed = probs.index_select(1, student) * weight.to(probs.dtype)
        carried = probs.new_zeros(len(probs), self.projection.teacher_size)
        carried = shard.sum(carried.index_add_(1, column, pushed))
        mass = torch.where(ids >= 0, carried.gather(1, ids.clamp_min(0)), 0.0)
        return mass, carried.topk(ids.shape[1], dim=1).indices, ids

    def _on_tokens(
        self, probs: Tensor, ids: Tensor, shard: VocabShard
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same among the student's tokens that the teacher has, and ``ids`` as those; -1
        without one."""
        if self.carry == "common":
            assert self.projection is not None
            partner = self.projection.common[ids.clamp_min(0)]
            ids = torch.where(ids >= 0, partner, -1)
            probs = probs * self._shared(self.projection.common, probs, shard)
        column, mine = shard.local(ids)
        mine = mine & (ids >= 0)
        mass = shard.sum(torch.where(mine, probs.gather(1, column), 0.0))
        _, top = shard.top_k(probs, ids.shape[1])
        return mass, top, ids

    def _entries(
        self, projection: ProjectionRows, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All of W's entries; kept where nothing trains them."""
        if "weight" in self._tables:
            return self._tables["student"], self._tables["column"], self._tables["weight"]
        student, column, weight = projection.columns(
            torch.arange(projection.teacher_size, device=device)
        )
        if not isinstance(projection, LearnedRows):
            self._tables.update(student=student, column=column, weight=weight)
        return student, column, weight

    def _shared(self, common: Tensor, like: Tensor, shard: VocabShard) -> Tensor:
        """[V_local] 1 at tokens that the teacher has, 0 elsewhere."""
        if "shared" not in self._tables:
            column, mine = shard.local(common[common >= 0])
            shared = like.new_zeros(like.shape[1])
            self._tables["shared"] = shared.index_fill_(0, column[mine], 1.0)
        return self._tables["shared"]


def _compared(
    listed: Tensor, teacher: Tensor, mass: Tensor, top: Tensor, ids: Tensor
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """``top`` [n, k] are the student's likeliest, ``ids`` the support as far as it is mapped."""
    mapped = ids >= 0
    count = mapped.sum(dim=1)
    some = (count > 0).to(mass.dtype)
    yield "topk_mass", (mass.sum(dim=1) * some, some)
    place = torch.arange(top.shape[1], device=top.device)
    kept = place < count[:, None]  # as many of the student's as of the teacher's
    shared = (top[:, :, None] == ids[:, None, :]) & mapped[:, None, :] & kept[:, :, None]
    share = shared.sum(dim=(1, 2)).to(mass.dtype) / count.clamp_min(1)
    yield "topk_overlap", (share, some)
    best = torch.where(listed >= 0, teacher, -1.0).argmax(dim=1, keepdim=True)
    wanted = ids.gather(1, best)[:, 0]
    known = (wanted >= 0).to(mass.dtype)
    yield "top1_projected", ((top[:, 0] == wanted).to(mass.dtype) * known, known)


def _support(rows: RowBlock, temperature: float) -> tuple[Tensor, Tensor]:
    """The teacher's likeliest tokens [n, k] (-1 where padded) and their probabilities."""
    logs, ids = rows.topk_logprobs, rows.topk_ids
    if ids is None:  # logits of the whole vocabulary, at temperature 1
        logs = torch.log_softmax(logs / temperature, dim=-1)
        ids = torch.arange(logs.shape[1], device=logs.device)
    ids = ids.expand(logs.shape)
    if ids.shape[1] > MAX_SUPPORT:
        logs, place = logs.masked_fill(ids < 0, -torch.inf).topk(MAX_SUPPORT, dim=1)
        ids = ids.gather(1, place)
    present = (ids >= 0) & (logs > -torch.inf)
    return torch.where(present, ids, -1), torch.where(present, torch.exp(logs), 0.0)


def text_of(micro: MicroBatch, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of flattened positions [n]: the text that each lies in, and its place there."""
    if micro.offsets is None:
        return positions // micro.tokens.shape[1], positions % micro.tokens.shape[1]
    text = np.searchsorted(micro.offsets, positions, side="right") - 1
    return text, positions - micro.offsets[text]


def _chosen(payload: TeacherRows, micro: MicroBatch, vocab_size: int) -> np.ndarray:
    """Indices of the boundary rows that are looked at."""
    every = -(-vocab_size // COLUMNS_PER_ROW)
    if every == 1 or not len(payload.position):
        return np.arange(len(payload.position))
    text, place = text_of(micro, payload.position)
    flat = micro.tokens.reshape(-1)
    starts = micro.offsets
    if starts is None:
        starts = np.arange(len(micro.tokens)) * micro.tokens.shape[1]
    sums = [
        int(flat[begin : begin + size].sum())
        for begin, size in zip(starts[: len(micro.lengths)], micro.lengths, strict=True)
    ]
    return np.flatnonzero((place + np.asarray(sums)[text]) % every == 0)


def _blocks(
    payload: TeacherRows, chosen: np.ndarray, size: int, source: Source
) -> Iterator[tuple[Block, Tensor]]:
    """Blocks of the ``chosen`` rows, and the token behind each row (-1: its chunk is not 1-1)."""
    following = _one_to_one_tokens(payload)

    def tensor(array: np.ndarray) -> Tensor:
        held = torch.as_tensor(np.ascontiguousarray(array), device=source.device)
        return held.to(source.dtype if held.is_floating_point() else torch.int64)

    for begin in range(0, len(chosen), size):
        index = chosen[begin : begin + size]
        ids = payload.topk_ids
        if ids is not None:
            ids = tensor(ids if ids.ndim == 1 else ids[index])
        held: Mapping[str, Tensor | None] = {
            "boundary": torch.arange(len(index), device=source.device),
            "topk_ids": ids,
            "topk_logprobs": tensor(payload.topk_logprobs[index]),
        }
        nothing = torch.zeros(0, device=source.device)
        rows = RowBlock(**{f.name: held.get(f.name, nothing) for f in fields(RowBlock)})  # pyright: ignore[reportArgumentType]
        block = Block(positions=payload.position[index], rows=rows, tokens=slice(0, 0))
        yield block, tensor(following[index])


def _one_to_one_tokens(payload: TeacherRows) -> np.ndarray:
    """[R] int64 the student token that is the whole chunk of a boundary row, else -1."""
    found = np.full(len(payload.position), -1, dtype=np.int64)
    single = (payload.chunk_size[payload.token_chunk] == 1).all(axis=1)
    index = np.searchsorted(payload.position, payload.token_position[single])
    inside = index < len(found)
    index, token = index[inside], payload.token_id[single][inside]
    here = payload.position[index] == payload.token_position[single][inside]
    found[index[here]] = token[here]
    return found
