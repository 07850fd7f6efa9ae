"""Path terms that end in the student's own encoding: by hand, and against dictionaries."""

from __future__ import annotations

import numpy as np
import pytest

from mopd.align.boundaries import align_bytes
from mopd.align.canonical import canonical_next
from mopd.align.paths import PathOptions
from mopd.align.payload import PayloadOptions, teacher_rows
from mopd.projection import ProjectionOptions, build_projection
from mopd.tokens.vocabulary import Vocabulary
from mopd.types import Projection, TeacherRows, TeacherScores
from tests.helpers.vocabularies import byte_level

MAX_LENGTH = 4


def answer(
    student: Vocabulary, teacher: Vocabulary, *, text: bytes, ids: list[int], prob: float
) -> tuple[TeacherRows, Projection]:
    """Rows of a teacher that gives each of its actual tokens ``prob``, and another token the rest.

    The other one is the byte `~`, which is in no text.
    """
    theirs = np.array(teacher.encode(text), dtype=np.int32)
    logs = np.full((len(theirs), teacher.size), -np.inf)
    logs[:, teacher.by_bytes[b"~"]] = np.log1p(-prob)
    logs[np.arange(len(theirs)), theirs] = np.log(prob)
    ends = teacher.byte_ends(theirs)
    scores = TeacherScores(
        teacher="t",
        model_fingerprint="f",
        token_ids=theirs,
        byte_ends=ends,
        logprobs=np.full(len(theirs), np.log(prob), dtype=np.float32),
        topk_ids=None,
        topk_logprobs=logs.astype(np.float32),
        log_tail=np.full(len(theirs), -np.inf, dtype=np.float32),
        lse=None,
        valid=np.ones(len(theirs), dtype=bool),
    )
    projection = build_projection(
        student, teacher, ProjectionOptions(max_length=MAX_LENGTH, gamma=0.0)
    )
    path = PathOptions(
        trie=projection.trie, fold=projection.fold, max_length=MAX_LENGTH, canonical=True
    )
    sampled = np.array(ids)
    own = np.array(student.encode(text))
    wanted = canonical_next(student.byte_ends(sampled), own, student.byte_ends(own), ended=True)
    rows = teacher_rows(
        scores,
        align_bytes(student.byte_ends(sampled), ends, both_end_turn=False),
        student_ids=sampled,
        trainable=np.ones(len(sampled), dtype=bool),
        options=PayloadOptions(temperature=1.0, fold=projection.fold, path=path),
        canonical_ids=wanted,
    )
    return rows, projection


def slots(rows: TeacherRows, projection: Projection, position: int) -> dict[frozenset[int], float]:
    """Student tokens of each slot at ``position`` -> target."""
    (q,) = np.flatnonzero(rows.path_position == position)
    trie = projection.trie
    found = {}
    for slot in range(rows.path_offsets[q], rows.path_offsets[q + 1]):
        tokens: set[int] = set()
        for key in rows.path_entry[rows.path_entry_slot == slot].tolist():
            if key < 0:
                tokens.add(-1 - key)
            else:
                tokens.update(trie.member_token[trie.member_ptr[key] : trie.member_ptr[key + 1]])
        found[frozenset(int(t) for t in tokens)] = float(rows.path_target[slot])
    return found


def spelled(vocabulary: Vocabulary, *words: str) -> list[int]:
    return [vocabulary.by_bytes[word.encode()] for word in words]


@pytest.mark.parametrize("sampled", [("ab", "c", "d"), ("a", "b", "c", "d"), ("abc", "d")])
def test_a_teacher_token_across_two_of_the_students(sampled: tuple[str, ...]) -> None:
    # the student writes abc, d; the teacher has abcd as one token, and spells abc as ab, c
    student, teacher = byte_level(["ab", "abc"]), byte_level(["ab", "cd", "abcd"])
    assert student.encode(b"abcd") == spelled(student, "abc", "d")
    rows, projection = answer(
        student, teacher, text=b"abcd", ids=spelled(student, *sampled), prob=0.75
    )
    (abc,) = spelled(student, "abc")
    found = slots(rows, projection, 0)
    assert found[frozenset({abc})] == pytest.approx(1.0)
    assert sum(found.values()) == pytest.approx(1.0)


def test_merges_that_are_not_left_to_right() -> None:
    # b, c merge first: the student writes a, bc where the longest token walked past would be ab
    student, teacher = byte_level(["bc", "ab"]), byte_level([])
    assert student.encode(b"abc") == spelled(student, "a", "bc")
    rows, projection = answer(
        student, teacher, text=b"abc", ids=spelled(student, "ab", "c"), prob=0.9
    )
    a, ab = spelled(student, "a", "ab")
    found = slots(rows, projection, 0)
    # reach(ab) = 0.9, of which 0.9 goes on with c: that is a's; what is left of ab stays with it
    assert found[frozenset({ab})] == pytest.approx(0.09, abs=1e-6)
    assert found[frozenset({a})] == pytest.approx(0.1 + 0.81, abs=1e-6)


def test_nothing_moves_where_the_walk_is_right() -> None:
    student, teacher = byte_level(["ab"]), byte_level([])
    text, ids = b"abc", spelled(student, "a", "b", "c")
    rows, projection = answer(student, teacher, text=text, ids=ids, prob=0.9)
    a, ab = spelled(student, "a", "ab")
    found = slots(rows, projection, 0)
    assert found == pytest.approx({frozenset({a}): 0.1, frozenset({ab}): 0.9}, abs=1e-6)


def test_own_tokens_are_found_by_where_they_begin() -> None:
    ends = np.array([2, 3, 5, 6])  # sampled: 0-2 2-3 3-5 5-6
    own, own_ends = np.array([7, 8, 9]), np.array([3, 5, 6])
    assert canonical_next(ends, own, own_ends, ended=True).tolist() == [7, -1, 8, 9]
    assert canonical_next(ends, own, own_ends, ended=False).tolist() == [7, -1, 8, -1]
    none = np.zeros(0, dtype=np.int64)
    assert canonical_next(ends, none, none, ended=True).tolist() == [-1] * 4
    assert canonical_next(none, own, own_ends, ended=True).tolist() == []
