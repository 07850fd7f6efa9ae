"""Computes a dumped step again: its losses and metrics, in one process on the CPU.

A dump (`debug.dump_step`) is a directory of safetensors and JSON. `replay` needs neither the
student's model nor its teachers nor the run.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mopd.config.load import load_config
from mopd.config.schema import RunConfig
from mopd.errors import ArtifactError
from mopd.losses.base import LossOutput
from mopd.losses.head import DistillationHead
from mopd.losses.vocab import VocabShard
from mopd.projection.learned import LearnedShard, joined
from mopd.projection.store import projection_of
from mopd.runtime.dump_write import CONFIG, DIGEST, FORMAT, MANIFEST, PROJECTIONS, step_values
from mopd.runtime.objective import teacher_terms
from mopd.runtime.payloads import Pair
from mopd.storage.files import sha256
from mopd.types import MicroBatch, StepBatch, TeacherRows

SMALLEST = 1e-3  # differences of smaller numbers are measured against this
CPU = torch.device("cpu")

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """A step as it was recorded and as its tensors give it; keys as in a step's line."""

    step: int
    recorded: Mapping[str, float]
    computed: Mapping[str, float]

    @property
    def differences(self) -> dict[str, float]:
        """|a - b| / max(|a|, |b|, 1e-3) of every key; infinite where one side has no number."""
        keys = {**self.recorded, **self.computed}
        nan = math.nan
        return {k: _relative(self.recorded.get(k, nan), self.computed.get(k, nan)) for k in keys}

    @property
    def largest_difference(self) -> float:
        """The largest relative difference of any key."""
        return max(self.differences.values(), default=0.0)


def replay(directory: Path) -> Replay:
    """Computes the step in ``directory`` (``<run>/dump-<step>``) again.

    Raises:
        ArtifactError: no dump, or a file of it is missing or damaged; one line.
    """
    manifest = _read_manifest(directory)
    try:
        return _replay(directory, manifest)
    except (SafetensorError, KeyError, OSError) as error:
        raise ArtifactError(f"{directory}: not a whole dump ({error}); dump it again") from error


def _replay(directory: Path, manifest: Mapping[str, Any]) -> Replay:
    config = load_config(str(directory / CONFIG), [])
    ranks = [(rank, load_file(directory / rank["file"])) for rank in manifest["ranks"]]
    pairs = _pairs(manifest, load_file(directory / PROJECTIONS))
    head = _head(config, manifest, pairs, ranks)
    batch = _batch(manifest)
    total, sums = 0.0, dict[str, float]()
    for micro, run_head in _micro_batches(manifest, ranks):
        with torch.no_grad():
            output = run_head(head, micro, batch)
        total += float(output.total)
        for name, value in output.metrics.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    computed = step_values(total / max(batch.num_tokens, 1), sums, batch)
    recorded = manifest["recorded"].items()
    return Replay(
        step=manifest["step"],
        recorded={
            name: math.nan if value is None else value
            for name, value in recorded
            if not name.endswith("/raw")
        },
        computed=computed,
    )


def _read_manifest(directory: Path) -> dict[str, Any]:
    """After every file's SHA-256 was compared."""
    try:
        content = (directory / MANIFEST).read_bytes()
        digest = (directory / DIGEST).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(
            f"{directory}: not a dump ({error}); train with debug.dump_step=<step> to write one"
        ) from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise ArtifactError(f"{directory / MANIFEST} does not match its SHA-256 in {DIGEST}")
    manifest = json.loads(content)
    if manifest["format"] != FORMAT:
        raise ArtifactError(
            f"{directory} has format {manifest['format']}, not {FORMAT}; use the mopd that wrote it"
        )
    for name, wanted in manifest["files"].items():
        path = directory / name
        if not path.is_file():
            raise ArtifactError(f"{path} is missing; dump the step again")
        if path.stat().st_size != wanted["size"] or sha256(path) != wanted["sha256"]:
            raise ArtifactError(
                f"{path} does not match its SHA-256: it is damaged; dump the step again"
            )
    return manifest


def _pairs(manifest: Mapping[str, Any], arrays: Tensors) -> dict[str, Pair]:
    found = {}
    for i, teacher in enumerate(manifest["teachers"]):
        projection = None
        if teacher["projection"] is not None:
            projection = projection_of(
                {name: tensor.numpy() for name, tensor in _under(arrays, f"{i}.").items()},
                student_fingerprint=teacher["projection"]["student"],
                teacher_fingerprint=teacher["projection"]["teacher"],
            )
        found[teacher["name"]] = Pair(loss=teacher["loss"], projection=projection)
    return found


def _head(
    config: RunConfig,
    manifest: Mapping[str, Any],
    pairs: Mapping[str, Pair],
    ranks: list[tuple[Any, dict[str, Tensor]]],
) -> DistillationHead:
    """All columns in one place."""
    size = manifest["padded_vocab_size"]
    terms = teacher_terms(config, pairs, start=0, end=size, device=CPU)
    for i, term in enumerate(terms.values()):
        if isinstance(term.projection, LearnedShard):
            states = [_under(tensors, f"learned.{i}.") for tensors in _columns(ranks, (0, 0))]
            term.projection.load(joined([{k: v.numpy() for k, v in s.items()} for s in states]))
    return DistillationHead(
        terms=terms, shard=VocabShard(start=0, size=size, vocab_size=manifest["vocab_size"])
    )


def _batch(manifest: Mapping[str, Any]) -> StepBatch:
    told = manifest["batch"]
    pairs = {name: dict(told[name]) for name in ("denominators", "weights")}
    return StepBatch(**(told | pairs), step=manifest["step"], micro_batches=(), metrics={})


def _columns(
    ranks: list[tuple[Any, dict[str, Tensor]]], place: tuple[int, int]
) -> list[dict[str, Tensor]]:
    """The tensors of the tensor-parallel ranks of one (replica, context rank), in their order."""
    found = [
        (rank["place"][2], tensors) for rank, tensors in ranks if rank["place"][:2] == [*place]
    ]
    return [tensors for _, tensors in sorted(found, key=lambda pair: pair[0])]


RunHead = Callable[[DistillationHead, MicroBatch, StepBatch], LossOutput]


def _micro_batches(
    manifest: Mapping[str, Any], ranks: list[tuple[Any, dict[str, Tensor]]]
) -> list[tuple[MicroBatch, RunHead]]:
    """Of all replicas and context ranks, each with how the loss reads its rows."""
    weights = [tensors["weight"] for tensors in _columns(ranks, (0, 0)) if "weight" in tensors]
    weight = torch.cat(weights) if weights else None
    names = [teacher["name"] for teacher in manifest["teachers"]]
    found: list[tuple[MicroBatch, RunHead]] = []
    for rank, tensors in ranks:
        dp_rank, cp_rank, tp_rank = rank["place"]
        if tp_rank:
            continue
        columns = _columns(ranks, (dp_rank, cp_rank))
        for place, told in enumerate(rank["micro_batches"]):
            micro = _micro_batch(_under(tensors, f"{place}."), told, names)
            positions = tensors[f"{place}.positions"]
            if weight is None:
                rows = torch.cat([part[f"{place}.logits"] for part in columns], dim=-1)
                found.append((micro, _of_logits(_placed(rows, positions, micro))))
            else:
                rows = _placed(tensors[f"{place}.hidden"], positions, micro)
                found.append((micro, _of_hidden(rows, weight)))
    return found


def _of_logits(logits: Tensor) -> RunHead:
    return lambda head, micro, batch: head(logits, micro, batch)


def _of_hidden(hidden: Tensor, weight: Tensor) -> RunHead:
    return lambda head, micro, batch: head.from_hidden(hidden, weight, micro, batch)


def _placed(rows: Tensor, positions: Tensor, micro: MicroBatch) -> Tensor:
    """[B, L, ...] with 0 where no loss looks."""
    whole = rows.new_zeros(micro.tokens.size, rows.shape[-1])
    whole[positions] = rows
    return whole.reshape(*micro.tokens.shape, -1)


def _micro_batch(arrays: Tensors, told: Mapping[str, Any], names: list[str]) -> MicroBatch:
    rows = {}
    for i in told["teachers"]:
        fields: dict[str, Any] = {"topk_ids": None}
        fields |= {name: tensor.numpy() for name, tensor in _under(arrays, f"{i}.").items()}
        rows[names[i]] = TeacherRows(teacher=names[i], **fields)
    micro = MicroBatch(
        tokens=arrays["tokens"].numpy(),
        lengths=arrays["lengths"].numpy(),
        response_mask=arrays["response_mask"].numpy(),
        rows=rows,
        domains=tuple(told["domains"]),
    )
    if "offsets" not in arrays:
        return micro
    return replace(micro, offsets=np.asarray(arrays["offsets"].numpy()))


def _under(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _relative(left: float, right: float) -> float:
    if left == right or (math.isnan(left) and math.isnan(right)):
        return 0.0
    difference = abs(left - right) / max(abs(left), abs(right), SMALLEST)
    return math.inf if math.isnan(difference) else difference
