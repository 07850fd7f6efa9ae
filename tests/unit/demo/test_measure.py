"""Chunk arithmetic of the world's report, on cases small enough to read."""

from __future__ import annotations

import numpy as np

from mopd.demo.measure import byte_ends, chunk_shares, chunk_sizes


def _chunks(student: str, teacher: str) -> list[tuple[int, int]]:
    """Tokenizations written with bars: "13|9" against "1|3|9"."""
    ends = []
    for text in (student, teacher):
        table = [piece.encode() for piece in text.split("|")]
        ends.append(byte_ends(range(len(table)), table=table))
    return chunk_sizes(ends[0], ends[1])


def test_student_token_longer() -> None:
    assert _chunks("13|9", "1|3|9") == [(1, 2), (1, 1)]


def test_teacher_token_longer() -> None:
    assert _chunks("GA|PI| D", "GAPI| D") == [(2, 1), (1, 1)]


def test_crossing_boundaries_make_one_chunk() -> None:
    assert _chunks("GA|PIT|O", "GAP|ITO") == [(3, 2)]


def test_nothing_written_has_no_chunks() -> None:
    assert chunk_sizes(np.empty(0, np.int64), np.empty(0, np.int64)) == []


def test_shares_count_student_tokens_outside_plain_chunks() -> None:
    shares = chunk_shares([(1, 1), (1, 2), (2, 1), (2, 2)])
    assert shares["tokens_outside_1_1"] == round(5 / 6, 4)
    assert shares["chunks_1_1"] == shares["chunks_1_n"] == 0.25
    assert shares["chunks_m_1"] == shares["chunks_m_n"] == 0.25
