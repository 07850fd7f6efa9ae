"""Rank functions around models that only score."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mopd.config.schema import StudentSection
from mopd.serving.offload import Offloaded
from mopd.serving.scoring import ScoredSequence
from mopd.serving.wire import RawRows
from mopd.student.frozen import build_frozen
from mopd.student.model import StudentModel
from mopd.student.scorer import ScoreOptions, score_texts
from tests.dist.student.worlds import Layout, join

VOCAB_SIZE = 61  # the tokenizer's: fewer than the model's 67, which tp = 2 pads to 68


def texts(seed: int = 0, *, count: int = 7, size: int = VOCAB_SIZE) -> list[ScoredSequence]:
    """Prompts and answers of unequal lengths; the last one's answer is empty."""
    draw = np.random.default_rng(seed)
    found = []
    for n in range(count):
        ids = draw.integers(0, size, draw.integers(6, 40)).astype(np.int32)
        start = len(ids) if n == count - 1 else int(draw.integers(1, len(ids)))
        found.append(ScoredSequence(ids=ids, start=start))
    return found


def frozen(model_dir: str, layout: Layout, *, dtype: str = "float32") -> StudentModel:
    section = StudentSection(model=model_dir, parallel=layout.section)
    return build_frozen(Path(model_dir), section=section, dtype=dtype, topology=join(layout))


def score(
    model_dir: str, layout: Layout, options: ScoreOptions, seeds: Sequence[int | None] = (0,)
) -> list[RawRows] | None:
    """The rows of the replica's `texts`, whose seed is ``seeds[dp_rank]``; of none for None."""
    model = frozen(model_dir, layout)
    seed = seeds[model.topology.dp_rank]
    own = [] if seed is None else texts(seed, size=options.vocab_size)
    return score_texts(model, own, options)


def score_offloaded(
    model_dir: str, layout: Layout, options: ScoreOptions
) -> tuple[list[int], list[list[RawRows] | None]]:
    """Bytes on the device before, within, after; rows of the model as it is and twice loaded."""
    model = frozen(model_dir, layout)
    found = [score_texts(model, texts(), options)]
    weights = Offloaded(model.chunks)
    sizes = [weights.num_bytes]
    for _ in range(2):
        with weights.loaded():
            sizes.append(weights.num_bytes)
            found.append(score_texts(model, texts(), options))
        sizes.append(weights.num_bytes)
    return sizes, found
