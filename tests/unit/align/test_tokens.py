"""Alignment of ids: texts compared, differences reported, oracles 26-32 on token bytes."""

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from mopd.align.boundaries import payload_index
from mopd.align.tokens import TokenText, align_tokens, common_prefix
from mopd.tokens.pieces import to_alphabet
from mopd.tokens.vocabulary import Vocabulary
from tests.helpers.vocabularies import EOS, byte_level, ids_of, metaspace

BYTES = byte_level(["th", "the", " the", "201", " York", "New", "_init", " init", "\U0001f60a"])
MARKED = metaspace(["the", "New", " York", "ab", " the"], letters="abcdehtoNwYrk ")
EMOJI = "\U0001f60a".encode()


def raw(*tokens: bytes) -> Vocabulary:
    """A byte-level vocabulary with any bytes as tokens and no merges: ids are given by hand."""
    longer = [token for token in dict.fromkeys(tokens) if len(token) > 1]
    every = [*(bytes([b]) for b in range(256)), *longer]
    vocab = {to_alphabet(token): index for index, token in enumerate(every)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens([AddedToken(EOS, special=True), AddedToken("<pad>", special=True)])
    roles = {"pad": tokenizer.token_to_id("<pad>")}
    spec = json.loads(tokenizer.to_str())
    return Vocabulary(spec, eos_id=tokenizer.token_to_id(EOS), roles=roles)


def ids_by_bytes(vocabulary: Vocabulary, pieces: list[bytes]) -> list[int]:
    table = {data: n for n, data in enumerate(vocabulary.token_bytes)}
    return [table[piece] for piece in pieces]


def align(student, teacher, ours, theirs, *, both_end_turn=False):
    return align_tokens(
        TokenText(ids=np.asarray(ours, dtype=np.int32), vocabulary=student),
        TokenText(ids=np.asarray(theirs, dtype=np.int32), vocabulary=teacher),
        both_end_turn=both_end_turn,
    )


def spans(found):
    """[(student tokens, teacher tokens)] of the chunks that are kept."""
    index = payload_index(found.alignment, kept=found.kept)
    return [tuple(size) for size in index.size.tolist()]


def split(*pieces: str | bytes) -> list[bytes]:
    return [piece if isinstance(piece, bytes) else piece.encode() for piece in pieces]


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (split("a", "b", "cd"), split("ab", "c", "d"), [(2, 1), (1, 2)]),
        (split("ab", "c"), split("a", "bc"), [(2, 2)]),
        (split("ab", "cd"), split("a", "bc", "d"), [(2, 3)]),
        (split("201"), split("2", "0", "1"), [(1, 3)]),
        (split("ab", "c"), split("ab", "c"), [(1, 1), (1, 1)]),
        (split(EMOJI[:3], EMOJI[3:]), split(EMOJI[:2], EMOJI[2:]), [(2, 2)]),
        (split(EMOJI[:2], EMOJI[2:]), split(EMOJI[:2], EMOJI[2:]), [(1, 1), (1, 1)]),
    ],
)
def test_known_splits(ours, theirs, expected):
    student, teacher = raw(*ours), raw(*theirs)
    left, right = ids_by_bytes(student, ours), ids_by_bytes(teacher, theirs)
    found = align(student, teacher, left, right)
    assert spans(found) == expected
    assert (found.method, found.mismatch, found.covered) == ("bytes", None, len(ours))


def test_spaces_of_both_kinds_are_one_byte():
    ours, theirs = ids_of(MARKED, "New", " York"), ids_of(BYTES, "New", " York")
    assert spans(align(MARKED, BYTES, ours, theirs)) == [(1, 1), (1, 1)]


@pytest.mark.parametrize(
    ("ours", "theirs"), [("_init", " init"), ("\t", "\n"), ("the", " the"), ("\u00e9", "e")]
)
def test_what_looks_alike_is_not_equal(ours, theirs):
    found = align(BYTES, BYTES, BYTES.encode(ours.encode()), BYTES.encode(theirs.encode()))
    assert spans(found) == []
    assert found.mismatch == 0


def test_chunks_end_before_the_first_byte_that_differs():
    ours, theirs = BYTES.encode(b"the 201 the"), BYTES.encode(b"the 2x1 the")
    found = align(BYTES, BYTES, ours, theirs, both_end_turn=True)
    assert found.mismatch == 5
    ends = BYTES.byte_ends(ours)[found.alignment.student_starts[1:] - 1]
    assert ends.tolist() == [3, 4]  # "the", " ": the rest begins with 2 on both sides, as one token
    assert not found.alignment.ends_turn


def test_equal_boundaries_behind_a_mismatch_are_not_used():
    student = raw(b"ab", b"xy", b"cd")
    ours = ids_by_bytes(student, split("ab", "xy", "cd"))
    theirs = ids_by_bytes(student, split("ab", "cd", "cd"))
    found = align(student, student, ours, theirs)
    assert (spans(found), found.mismatch) == ([(1, 1)], 2)


def test_a_cut_tail_is_no_mismatch():
    ours, theirs = BYTES.encode(b"the 201"), BYTES.encode(b"the ")
    found = align(BYTES, BYTES, ours, theirs)
    assert found.mismatch is None
    assert found.covered == len(BYTES.encode(b"the "))


PADDED = raw(b"ab", b"cd")
PAD = PADDED.roles["pad"]


def test_frames_do_not_change_the_chunks():
    text = ids_by_bytes(PADDED, split("ab", "cd"))
    theirs = ids_by_bytes(PADDED, split("a", "b", "cd"))
    plain = align(PADDED, PADDED, text, theirs)
    for left, right in ((1, 0), (0, 2), (2, 3)):
        framed = align(PADDED, PADDED, [PAD] * left + text + [PAD] * right, theirs)
        assert spans(framed) == spans(plain) == [(1, 2), (1, 1)]
        starts = plain.alignment.student_starts + left
        assert framed.alignment.student_starts.tolist() == starts.tolist()
    mirrored = align(PADDED, PADDED, theirs, [PAD, *text, PAD])
    assert spans(mirrored) == [(2, 1), (1, 1)]
    assert mirrored.alignment.teacher_starts.tolist() == [1, 2, 3]


def test_a_frame_inside_the_text_costs_its_chunk_only():
    ours = [*ids_by_bytes(PADDED, split("ab")), PAD, *ids_by_bytes(PADDED, split("cd"))]
    theirs = PADDED.encode(b"ab<pad>cd")  # what a teacher reads of it
    found = align(PADDED, PADDED, ours, theirs)
    assert found.alignment.num_chunks == 3
    assert found.kept.tolist() == [True, False, True]
    assert found.covered == 2
    mask = found.trainable(np.array([True, True, False]))
    assert mask.tolist() == [True, False, False]


def test_an_id_beyond_the_vocabulary_has_no_text():
    ours = [*ids_by_bytes(PADDED, split("ab")), PADDED.size + 7]
    found = align(PADDED, PADDED, ours, ids_by_bytes(PADDED, split("ab")))
    assert spans(found) == [(1, 1)]


def test_the_end_of_turn_is_paired_behind_equal_texts_only():
    text = BYTES.encode(b"the")
    both = [*text, BYTES.eos_id]
    for ours, theirs, ends in ((text, text, True), (text, text[:-1], False)):
        found = align(BYTES, BYTES, ours, theirs, both_end_turn=True)
        assert found.alignment.ends_turn is ends
        assert found.covered == (len(both) if ends else 0)
    for ours, theirs in (([97, PAD], [97]), ([PAD], []), ([], [PAD])):
        framed = align(PADDED, PADDED, ours, theirs, both_end_turn=True)
        assert not framed.alignment.ends_turn


def test_nothing_to_align():
    for ours, theirs in (([], []), ([], [1]), ([1], []), ([PAD], [PAD])):
        found = align(PADDED, PADDED, ours, theirs)
        assert (spans(found), found.covered, found.mismatch) == ([], 0, None)
    found = align(PADDED, PADDED, [], [], both_end_turn=True)
    assert (found.alignment.ends_turn, spans(found)) == (True, [(1, 1)])


def test_common_prefix():
    a = np.frombuffer(b"abcd", dtype=np.uint8)
    assert [common_prefix(a, a[:k]) for k in (0, 2, 4)] == [0, 2, 4]
    assert common_prefix(a, np.frombuffer(b"abxd", dtype=np.uint8)) == 2


def two_pointers(left: list[int], right: list[int]) -> list[tuple[int, int]]:
    i = j = 0
    starts = [(0, 0)]
    while i < len(left) and j < len(right):
        a, b = left[i], right[j]
        i, j = i + (a <= b), j + (b <= a)
        if a == b:
            starts.append((i, j))
    return starts


def cut(data: bytes, at: set[int]) -> list[bytes]:
    edges = [0, *sorted(c for c in at if c < len(data)), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


cuts = st.sets(st.integers(1, 30), max_size=14)


@given(st.binary(min_size=1, max_size=31), cuts, cuts, st.integers(0, 40), st.booleans())
def test_any_two_splits_of_any_bytes(data, ours, theirs, flipped, other_text):
    """Spans tile, spell equal bytes, and are the ones of the slow walk: none can be refined."""
    left = cut(data, ours)
    changed = bytearray(data)
    if other_text and flipped < len(data):
        changed[flipped] ^= 0x01
    right = cut(bytes(changed), theirs)
    student, teacher = raw(*left), raw(*right)
    a, b = ids_by_bytes(student, left), ids_by_bytes(teacher, right)
    found = align(student, teacher, a, b)
    differs = flipped if bytes(changed) != data else None
    assert (found.method, found.mismatch) == ("bytes", differs)
    ends = student.byte_ends(a).tolist(), teacher.byte_ends(b).tolist()
    limit = len(data) if differs is None else differs
    starts = [(i, j) for i, j in two_pointers(*ends) if i == 0 or ends[0][i - 1] <= limit]
    s, t = found.alignment.student_starts, found.alignment.teacher_starts
    assert list(zip(s.tolist(), t.tolist(), strict=True)) == starts
    assert (np.diff(s) > 0).all() and (np.diff(t) > 0).all()
    assert found.kept.all()
    index = payload_index(found.alignment)
    for (p, m), (q, n) in pairwise(starts):
        assert student.decode(a[p:q]) == teacher.decode(b[m:n])
        inside = {*ends[0][p : q - 1]} & {*ends[1][m : n - 1]}
        assert not inside
    if differs is None:
        assert (s[-1], t[-1]) == (len(left), len(right))
    walked = [(x, c) for c in range(len(starts) - 1) for x in range(starts[c][0], starts[c + 1][0])]
    assert list(zip(index.token_position, index.token_chunk, strict=True)) == walked
