"""A teacher's rows from a sharded model: top-k, tail, actual token, log-sum-exps of texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mopd.losses.vocab import VocabShard
from mopd.serving.scoring import ScoredSequence, join_rows
from mopd.serving.wire import RawRows
from mopd.student.model import StudentModel
from mopd.student.output import hidden_output, output_weight
from mopd.student.parallel import Topology
from mopd.student.schedule import run_schedule
from mopd.types import MicroBatch

# Logits that exist at once, per rank: on a CPU a block and its temporaries stay in cache.
BLOCK_ELEMENTS = {"cpu": 1 << 20}
BLOCK_ELEMENTS_DEVICE = 1 << 26


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreOptions:
    """What is asked of the model.

    Args:
        top_k: entries per row; None: the whole vocabulary.
        temperature: of the second log-sum-exp.
        vocab_size: tokens of the tokenizer, V; columns behind them never count.
        max_tokens: of one micro-batch, padding included; a longer text goes alone.
    """

    top_k: int | None
    temperature: float
    vocab_size: int
    max_tokens: int


def score_texts(
    model: StudentModel, texts: Sequence[ScoredSequence], options: ScoreOptions
) -> list[RawRows] | None:
    """Rows of each text in order on the replica's lead, None elsewhere. The definitions are those
    of `mopd.types.TeacherScores`.

    Collective over the replica, whose ranks give the same ``texts``; with expert parallelism over
    all replicas, whose texts may differ. The last stage holds one block of logits at a time, and
    the lead the rows of all texts: [T, V] where ``top_k`` is None.
    """
    topology = model.topology
    plan = _plan(texts, options.max_tokens)
    if not plan and topology.ep_size == 1:
        return [] if topology.is_lead else None
    # without a text, too, where other replicas wait for this one's experts
    batches = [_micro_batch([texts[i] for i in part]) for part in plan or [[]]]

    def measure(micro: MicroBatch) -> Callable[..., RawRows | None]:
        def compute(hidden: Tensor, non_loss_data: bool = True) -> RawRows | None:
            del non_loss_data
            if topology.cp_rank > 0:  # the first context rank has the same hidden states
                return None
            return _rows_of_hidden(model, hidden, micro, options)

        return compute

    with torch.no_grad(), hidden_output(model.head):
        found = run_schedule(model, batches, measure, forward_only=True)
    order = [i for part in plan for i in part]
    counts = [len(texts[i].ids) - texts[i].start for i in order]
    joined = join_rows(found) if topology.rank == topology.tail_rank else None
    joined = _to_lead(joined, sum(counts), options, topology)
    return None if joined is None else _in_order(joined, counts, order)


def _plan(texts: Sequence[ScoredSequence], max_tokens: int) -> list[list[int]]:
    """Texts of like length together, within the budget; a function of the texts alone."""
    plan: list[list[int]] = []
    for i in sorted(range(len(texts)), key=lambda i: (len(texts[i].ids), i)):
        # lengths ascend, so the newcomer is the longest
        if not plan or (len(plan[-1]) + 1) * len(texts[i].ids) > max_tokens:
            plan.append([])
        plan[-1].append(i)
    return plan


def _micro_batch(texts: Sequence[ScoredSequence]) -> MicroBatch:
    """Right-padded; ``response_mask`` marks the rows that are asked for."""
    rows = max(len(texts), 1)
    length = max((len(text.ids) for text in texts), default=1)
    tokens = np.zeros((rows, length), dtype=np.int64)
    lengths = np.zeros(rows, dtype=np.int64)
    mask = np.zeros((rows, length), dtype=bool)
    for row, text in enumerate(texts):
        lengths[row] = len(text.ids)
        tokens[row, : len(text.ids)] = text.ids
        mask[row, text.start - 1 : len(text.ids) - 1] = True
    return MicroBatch(tokens=tokens, lengths=lengths, response_mask=mask)


def _rows_of_hidden(
    model: StudentModel, hidden: Tensor, micro: MicroBatch, options: ScoreOptions
) -> RawRows | None:
    """On the tail rank the rows that ``micro`` marks, text by text; other tensor-parallel ranks
    take part and keep nothing."""
    topology, weight = model.topology, output_weight(model.head)
    width = model.padded_vocab_size // topology.tp_size
    shard = VocabShard(
        start=topology.tp_rank * width,
        size=width,
        vocab_size=options.vocab_size,
        group=topology.tp_group,
    ).without_padding()
    columns = weight[: shard.size].t()
    wanted = hidden[torch.as_tensor(micro.response_mask, device=hidden.device)]
    actual = torch.as_tensor(
        np.roll(micro.tokens, -1, axis=1)[micro.response_mask], device=hidden.device
    )
    size = max(1, BLOCK_ELEMENTS.get(hidden.device.type, BLOCK_ELEMENTS_DEVICE) // width)
    parts: list[RawRows] = []
    for begin in range(0, max(1, len(wanted)), size):  # one empty part where nothing is asked
        block = slice(begin, begin + size)
        rows = _rows((wanted[block] @ columns).float(), actual[block], shard, options)
        if topology.rank == topology.tail_rank:
            parts.append(_on_host(rows))
    return join_rows(parts) if parts else None


def _rows(
    logits: Tensor, actual: Tensor, shard: VocabShard, options: ScoreOptions
) -> dict[str, Tensor]:
    """The fields of `RawRows` from this shard's columns [n, V_local]; alike on all shards."""
    lse = _log_sum_exp(logits, shard)
    tempered = lse
    if options.temperature != 1.0:
        tempered = _log_sum_exp(logits / options.temperature, shard)
    column, mine = shard.local(actual)
    own = logits.gather(1, column[:, None])[:, 0] if shard.size else torch.zeros_like(lse)
    rows = {
        "logprobs": shard.sum(torch.where(mine, own, 0.0)) - lse,
        "lse": torch.stack([lse, tempered], dim=1),
    }
    if options.top_k is None:
        whole = shard.gather_columns(torch.nn.functional.pad(logits, (0, shard.padding)))
        return rows | {
            "topk_logprobs": whole[:, : options.vocab_size] - lse[:, None],
            "log_tail": torch.full_like(lse, -torch.inf),
        }
    top, ids = shard.top_k(logits, options.top_k)
    column, mine = shard.local(ids)
    row, slot = mine.nonzero(as_tuple=True)
    outside = logits.index_put((row, column[row, slot]), logits.new_tensor(-torch.inf))
    return rows | {
        "topk_ids": ids.to(torch.int32),
        "topk_logprobs": top - lse[:, None],
        # summed over what is outside: 1 - sum loses its digits where the list holds nearly all
        "log_tail": _log_sum_exp(outside, shard) - lse,
    }


def _log_sum_exp(values: Tensor, shard: VocabShard) -> Tensor:
    """[n] over all shards; -inf where every value is -inf."""
    peak = values.amax(dim=-1) if shard.size else values.new_full((len(values),), -torch.inf)
    peak = shard.max(peak).clamp(min=torch.finfo(values.dtype).min)
    return peak + torch.log(shard.sum(torch.exp(values - peak[:, None]).sum(dim=-1)))


def _on_host(rows: dict[str, Tensor]) -> RawRows:
    arrays = {name: tensor.cpu().numpy() for name, tensor in rows.items()}
    return RawRows(topk_ids=arrays.pop("topk_ids", None), **arrays)


def _to_lead(
    rows: RawRows | None, count: int, options: ScoreOptions, topology: Topology
) -> RawRows | None:
    """The tail rank's ``rows`` on the lead, through host memory; None elsewhere."""
    if topology.tail_rank == topology.lead_rank:
        return rows if topology.is_lead else None
    if rows is None and not topology.is_lead:
        return None
    size = options.vocab_size
    listed = size if options.top_k is None else min(options.top_k, size)
    shapes = {"topk_logprobs": (listed,), "logprobs": (), "log_tail": (), "lse": (2,)}
    if options.top_k is not None:
        shapes = {"topk_ids": (listed,)} | shapes
    moved: dict[str, np.ndarray] = {}
    for name, shape in shapes.items():
        if rows is not None:
            part = torch.from_numpy(np.ascontiguousarray(getattr(rows, name)))
            dist.send(part, dst=topology.lead_rank, group=topology.replica_group)
            continue
        dtype = torch.int32 if name == "topk_ids" else torch.float32
        room = torch.empty((count, *shape), dtype=dtype)
        dist.recv(room, src=topology.tail_rank, group=topology.replica_group)
        moved[name] = room.numpy()
    return RawRows(topk_ids=moved.pop("topk_ids", None), **moved) if topology.is_lead else None


def _in_order(rows: RawRows, counts: Sequence[int], order: Sequence[int]) -> list[RawRows]:
    """The rows of each text, text ``order[n]`` being the n-th in ``rows``."""
    names = ("topk_logprobs", "logprobs", "log_tail", "lse")
    cuts = np.cumsum(counts)[:-1]
    parts = {name: np.split(getattr(rows, name), cuts) for name in names}
    ids = None if rows.topk_ids is None else np.split(rows.topk_ids, cuts)
    place = {i: n for n, i in enumerate(order)}
    return [
        RawRows(
            topk_ids=None if ids is None else ids[place[i]],
            **{name: parts[name][place[i]] for name in names},
        )
        for i in range(len(order))
    ]
