"""The rows of the data path: alignment with payloads, and the building of a projection."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mopd.align.boundaries import PayloadIndex, payload_index
from mopd.align.tokens import TextAlignment, TokenText, align_tokens
from mopd.projection import build_projection
from mopd.tokens.vocabulary import Vocabulary
from mopd.types import Alignment, Projection, TeacherRows
from tests.bench import measure, problems, vocabularies

LENGTHS = {False: (1000, 2000, 4000, 8000), True: (100,)}  # by --quick
SIZES = {False: (128256, 151936), True: (1200, 1500)}
ROUNDS = {False: 10, True: 1}  # over all samples: one takes a few milliseconds


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


def indexed(of: problems.Pair, sample: problems.Sequence) -> tuple[TextAlignment, PayloadIndex]:
    """Ids and byte tables in, bytes of both sides compared, index of the payload out."""
    found = align_tokens(
        TokenText(ids=sample.student_ids, vocabulary=of.student),
        TokenText(
            ids=sample.scores.token_ids,
            vocabulary=of.teacher,
            byte_ends=sample.scores.byte_ends,
        ),
        both_end_turn=False,
    )
    return found, payload_index(found.alignment, kept=found.kept)


def alignment(quick: bool, cache: Path, repeats: int) -> dict[str, Any]:
    of = problems.pair(SIZES[quick], cache)
    options = problems.payload_options(of.projection)
    inputs = samples(of, quick)

    def index() -> None:
        for _ in range(ROUNDS[quick]):
            for sample in inputs:
                indexed(of, sample)

    def payload() -> list[tuple[Alignment, TeacherRows]]:
        return [problems.aligned(sample, options) for sample in inputs]

    seconds = measure.cpu_seconds({"index": index, "payload": payload}, repeats)
    tokens = sum(sample.tokens for sample in inputs)
    wrong = max(
        max(_wrong_index(of, sample), _wrong_sums(sample, *built))
        for sample, built in zip(inputs, payload(), strict=True)
    )
    return {
        "ratio": None,
        "peak_tensors": None,
        "cpu_seconds": seconds["index"] / ROUNDS[quick],
        "repeats": repeats,
        "work": (
            "align_tokens + payload_index: ids and byte tables in, bytes of both sides compared, "
            f"chunk and row indices out; {len(inputs)} samples of "
            f"{LENGTHS[quick][0]}-{LENGTHS[quick][-1]} student tokens (prose, code, CJK, emoji), "
            f"{tokens} tokens of both sides; payload: align_bytes + teacher_rows (fold, path "
            f"terms, top-{problems.TOP_K})"
        ),
        "baseline": None,
        "error": {"value": wrong},
        "tokens_per_second": tokens * ROUNDS[quick] / seconds["index"],
        "payload_tokens_per_second": tokens / seconds["payload"],
    }


def two_pointers(ours: list[int], theirs: list[int]) -> list[tuple[int, int]]:
    """Starts of the chunks by one slow walk over both byte counts: the reference."""
    i = j = 0
    starts = [(0, 0)]
    while i < len(ours) and j < len(theirs):
        a, b = ours[i], theirs[j]
        i, j = i + (a <= b), j + (b <= a)
        if a == b:
            starts.append((i, j))
    return starts


def _wrong_index(of: problems.Pair, sample: problems.Sequence) -> float:
    """0.0 if every boundary is found, every chunk has equal bytes and every index is right."""
    found, index = indexed(of, sample)
    ours, theirs = sample.student_ids.tolist(), sample.scores.token_ids.tolist()
    starts = two_pointers(sample.student_ends.tolist(), sample.scores.byte_ends.tolist())
    chunks = list(pairwise(starts))
    tokens = [
        (position, n) for n, ((a, _), (c, _)) in enumerate(chunks) for position in range(a, c)
    ]
    right = (
        found.method == "bytes"
        and found.mismatch is None
        and bool(found.kept.all())
        and all(
            of.student.decode(ours[a:c]) == of.teacher.decode(theirs[b:d])
            for (a, b), (c, d) in chunks
        )
        and list(zip(index.position.tolist(), index.row.tolist(), strict=True)) == starts[:-1]
        and index.size.tolist() == [[c - a, d - b] for (a, b), (c, d) in chunks]
        and list(zip(index.token_position.tolist(), index.token_chunk.tolist(), strict=True))
        == tokens
    )
    return 0.0 if right else 1.0


def _wrong_sums(sample: problems.Sequence, found: Alignment, rows: TeacherRows) -> float:
    """Boundaries against two pointers exactly, chunk sums relatively."""
    starts = two_pointers(sample.student_ends.tolist(), sample.scores.byte_ends.tolist())
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
