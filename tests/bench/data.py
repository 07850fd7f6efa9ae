"""The rows of the data path: alignment with payloads, and the building of a projection."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mopd.projection import build_projection
from mopd.tokens.vocabulary import Vocabulary
from mopd.types import Alignment, Projection, TeacherRows
from tests.bench import measure, problems, vocabularies

LENGTHS = {False: (1000, 2000, 4000, 8000), True: (100,)}  # by --quick
SIZES = {False: (128256, 151936), True: (1200, 1500)}


def samples(of: problems.Pair, quick: bool) -> list[problems.Sequence]:
    """One sample per domain and length; ``length`` counts student tokens."""
    found = []
    for number, domain in enumerate(vocabularies.DOMAINS):
        for length in LENGTHS[quick]:
            content = vocabularies.text(of.words, domain, length, seed=10 + number)
            ids = vocabularies.token_ids(of.student, content)[:length]
            text = of.student.decode(ids)
            theirs = np.asarray(of.teacher.encode(text), dtype=np.int32)
            found.append(
                problems.Sequence(
                    student_ids=ids,
                    student_ends=of.student.byte_ends(ids),
                    scores=problems.scores_of(theirs, of.teacher, seed=number),
                )
            )
    return found


def alignment(quick: bool, cache: Path, repeats: int) -> dict[str, Any]:
    of = problems.pair(SIZES[quick], cache)
    options = problems.payload_options(of.projection)
    inputs = samples(of, quick)

    def run() -> list[tuple[Alignment, TeacherRows]]:
        return [problems.aligned(sample, options) for sample in inputs]

    seconds = measure.cpu_seconds({"ours": run}, repeats)["ours"]
    tokens = sum(sample.tokens for sample in inputs)
    wrong = max(_mismatch(s, a, r) for s, (a, r) in zip(inputs, run(), strict=True))
    return {
        "ratio": None,
        "peak_tensors": None,
        "cpu_seconds": seconds,
        "repeats": repeats,
        "work": (
            f"align_bytes + teacher_rows (fold, path terms, top-{problems.TOP_K}), "
            f"{len(inputs)} samples of {LENGTHS[quick][0]}-{LENGTHS[quick][-1]} student tokens, "
            f"{tokens} tokens of both sides"
        ),
        "baseline": None,
        "error": {"value": wrong},
        "tokens_per_second": tokens / seconds,
    }


def _mismatch(sample: problems.Sequence, found: Alignment, rows: TeacherRows) -> float:
    """Against two pointers over the byte counts: boundaries exactly, chunk sums relatively."""
    ours, theirs = sample.student_ends.tolist(), sample.scores.byte_ends.tolist()
    i = j = 0
    starts = [(0, 0)]
    while i < len(ours) and j < len(theirs):
        a, b = ours[i], theirs[j]
        i, j = i + (a <= b), j + (b <= a)
        if a == b:
            starts.append((i, j))
    pairs = zip(found.student_starts.tolist(), found.teacher_starts.tolist(), strict=True)
    if starts != list(pairs):
        return 1.0
    logprobs = sample.scores.logprobs.astype(np.float64)
    bounds = [b for _, b in starts]
    sums = np.array([logprobs[a:b].sum() for a, b in pairwise(bounds)])
    return float(np.max(np.abs(rows.chunk_logprob - sums) / np.maximum(np.abs(sums), 1.0)))


def projection_build(quick: bool, repeats: int) -> dict[str, Any]:
    student, teacher, _ = problems.vocabularies_of(SIZES[quick])
    seconds = measure.cpu_seconds({"ours": builder(student, teacher)}, repeats)["ours"]
    built = builder(student, teacher)()
    sums = np.add.reduceat(built.val.astype(np.float64), built.crow[:-1])
    return {
        "ratio": None,
        "peak_tensors": None,
        "cpu_seconds": seconds,
        "repeats": repeats,
        "work": (
            f"build_projection, V {student.size} / {teacher.size}, "
            f"{int((np.diff(built.crow) > 0).sum())} rows, {built.trie.num_nodes} trie nodes"
        ),
        "baseline": None,
        "error": {"value": float(np.abs(sums - 1.0).max())},
        "peak_bytes": None,
    }


def builder(student: Vocabulary, teacher: Vocabulary) -> Callable[[], Projection]:
    """A build that finds nothing cached on the vocabularies."""

    def run() -> Projection:
        for vocabulary in (student, teacher):
            vocabulary.__dict__.pop("by_bytes", None)
        return build_projection(student, teacher, problems.OPTIONS)

    return run
