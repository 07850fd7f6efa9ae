import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mopd.align.boundaries import (
    align_bytes,
    align_positions,
    chunk_counts,
    chunk_sizes,
    payload_index,
)


def chunks(student_ends, teacher_ends, *, both_end_turn=False):
    alignment = align_bytes(
        np.array(student_ends), np.array(teacher_ends), both_end_turn=both_end_turn
    )
    return [tuple(size) for size in chunk_sizes(alignment).tolist()]


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ([1, 2, 4], [2, 3, 4], [(2, 1), (1, 2)]),
        ([2, 3], [1, 3], [(2, 2)]),
        ([2, 4], [1, 3, 4], [(2, 3)]),  # (ab, cd) against (a, bc, d)
        ([3], [1, 2, 3], [(1, 3)]),  # 201 against 2 0 1
        ([1, 2, 3], [1, 2, 3], [(1, 1)] * 3),
        ([3, 4], [2, 4], [(2, 2)]),  # an emoji cut 3 + 1 and 2 + 2
        ([2, 4], [2, 4], [(1, 1)] * 2),
        ([], [], []),
        ([0, 2], [0, 1, 2], [(2, 3)]),  # a token of length 0 ends nowhere,
        ([1, 1, 2], [1, 2], [(1, 1), (2, 1)]),  # it belongs to what follows
    ],
)
def test_known_splits(student, teacher, expected):
    assert chunks(student, teacher) == expected
    assert chunks(student, teacher, both_end_turn=True) == [*expected, (1, 1)]


def test_the_end_of_turn_is_not_paired_behind_a_cut_tail():
    alignment = align_bytes(np.array([2, 5]), np.array([2, 4]), both_end_turn=True)
    assert not alignment.ends_turn
    assert alignment.num_chunks == 1


cuts = st.sets(st.integers(1, 40), max_size=15)


@given(cuts, cuts)
def test_chunks_tile_both_sides_and_cannot_be_refined(student, teacher):
    student, teacher = sorted(student | {41}), sorted(teacher | {41})
    alignment = align_bytes(np.array(student), np.array(teacher), both_end_turn=False)
    a, b = alignment.student_starts, alignment.teacher_starts
    assert a[0] == b[0] == 0
    assert a[-1] == len(student) and b[-1] == len(teacher)
    assert (np.diff(a) > 0).all() and (np.diff(b) > 0).all()
    left, right = np.array([0, *student])[a], np.array([0, *teacher])[b]
    assert (left == right).all()  # equal bytes at every boundary
    assert set(left.tolist()) == {0, *(set(student) & set(teacher))}  # and none is missed


def test_counts_by_type():
    alignment = align_bytes(np.array([1, 2, 4, 5]), np.array([2, 3, 4, 5]), both_end_turn=True)
    assert chunk_counts(alignment) == {
        "1-1": (2, 2),
        "1-n": (1, 1),
        "n-1": (1, 2),
        "n-m": (0, 0),
    }


def test_payload_index():
    alignment = align_bytes(np.array([1, 2, 4, 5]), np.array([2, 3, 4, 5]), both_end_turn=True)
    found = payload_index(alignment)
    assert found.position.tolist() == [0, 2, 3, 4]
    assert found.row.tolist() == [0, 1, 3, 4]
    assert found.size.tolist() == [[2, 1], [1, 2], [1, 1], [1, 1]]
    assert found.token_position.tolist() == [0, 1, 2, 3, 4]
    assert found.token_chunk.tolist() == [0, 0, 1, 2, 3]
    kept = np.array([False, True, True, False])
    some = payload_index(alignment, kept=kept)
    assert some.position.tolist() == some.token_position.tolist() == [2, 3]
    assert (some.row.tolist(), some.token_chunk.tolist()) == ([1, 3], [0, 1])
    assert chunk_counts(alignment, kept=kept)["1-1"] == (1, 1)


def test_positions_pair_by_index():
    assert align_positions(3, 5).num_chunks == 3
