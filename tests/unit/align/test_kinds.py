"""Tokenizers of every kind against each other: what gave the boundaries, and that they hold."""

import unicodedata

import numpy as np
import pytest

from mopd.align.tokens import TokenText, align_tokens
from mopd.teachers.base import teacher_input
from mopd.types import Rollout
from tests.unit.tokens.trained import KINDS, TEXTS, vocabulary

# Texts whose tokens do not spell the bytes, per kind; all other samples are aligned by bytes.
NORMALISED = {
    "byte_level": set(),
    "sentencepiece": set(),
    "unigram": {"code", "cjk", "accents", "ligatures"},  # two spaces, wide forms, e + accent
    "wordpiece": set(TEXTS) - {"cjk"},  # spaces
}
MIN_COVERAGE = 0.75


def said(data: bytes) -> str:
    """The text that normalisers leave alone, written out a second time."""
    text = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", data.decode()).casefold())
    dropped = ("Mn", "Zs", "Cc", "Cf")
    return "".join(c for c in text if unicodedata.category(c) not in dropped)


def align_text(student_kind: str, teacher_kind: str, text: bytes):
    """The student writes ``text`` in its own ids; the teacher reads what these spell."""
    student, teacher = vocabulary(student_kind), vocabulary(teacher_kind)
    ids = student.read(text).ids
    reading = teacher.read(student.decode(ids))
    found = align_tokens(
        TokenText(ids=np.asarray(ids, dtype=np.int32), vocabulary=student),
        TokenText(
            ids=np.asarray(reading.ids, dtype=np.int32),
            vocabulary=teacher,
            byte_ends=reading.byte_ends,
        ),
        both_end_turn=False,
    )
    return ids, reading, found


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("teacher_kind", KINDS)
@pytest.mark.parametrize("student_kind", ["byte_level", "sentencepiece", "unigram"])
def test_chunks_say_the_same(student_kind, teacher_kind, name):
    student, teacher = vocabulary(student_kind), vocabulary(teacher_kind)
    ids, reading, found = align_text(student_kind, teacher_kind, TEXTS[name].encode())
    assert found.mismatch is None
    assert found.method == reading.method
    if student_kind != "unigram":  # whose text is normalised already
        expected = "offsets" if name in NORMALISED[teacher_kind] else "bytes"
        assert found.method == expected
    a, b = found.alignment.student_starts, found.alignment.teacher_starts
    assert (np.diff(a) > 0).all() and (np.diff(b) > 0).all()
    for chunk in np.flatnonzero(found.kept):
        ours = student.decode(ids[a[chunk] : a[chunk + 1]])
        theirs = teacher.decode(reading.ids[b[chunk] : b[chunk + 1]])
        if found.method == "bytes":
            assert ours == theirs
        else:
            assert said(ours) == said(theirs)
    assert found.covered >= MIN_COVERAGE * len(ids)
    # what was dropped at the end belongs to the last chunk, so that the turns end together
    assert (a[-1], b[-1]) == (len(ids), len(reading.ids))


def test_a_wordpiece_ends_every_word_where_the_text_does():
    ids, reading, found = align_text("byte_level", "wordpiece", b"The quick brown fox\n")
    assert found.method == "offsets"
    teacher = vocabulary("wordpiece")
    assert teacher.decode(reading.ids) == b"thequickbrownfox"
    own = teacher.byte_ends(reading.ids).tolist()
    ends = dict(zip(own, reading.byte_ends.tolist(), strict=True))
    assert [ends[n] for n in (3, 8, 13, 16)] == [3, 9, 15, 20]
    assert found.kept.all() and found.covered == len(ids)


def test_a_ligature_is_one_chunk():
    text = "\ufb01ne".encode()
    ids, reading, found = align_text("byte_level", "unigram", text)
    assert vocabulary("unigram").decode(reading.ids) == b"fine"
    inside = {1, 2}  # the ligature has three bytes and two letters
    assert not inside & set(reading.byte_ends.tolist())
    assert found.kept.all() and found.covered == len(ids)


def test_text_that_the_teacher_cannot_spell_is_not_kept():
    _, reading, found = align_text("byte_level", "wordpiece", "The \u0416\u0416 fox".encode())
    assert vocabulary("wordpiece")._unknown in reading.ids
    assert found.method == "offsets"
    assert 0 < found.kept.sum() < len(found.kept)
    student = vocabulary("byte_level")
    ids = student.encode("The \u0416\u0416 fox".encode())
    starts = found.alignment.student_starts
    lost = [ids[starts[c] : starts[c + 1]] for c in np.flatnonzero(~found.kept)]
    assert [student.decode(part) for part in lost] == [" \u0416\u0416".encode()]


def test_ids_from_elsewhere_are_matched_as_strings():
    """A teacher that cuts the same words into other pieces than its tokenizer would."""
    student, teacher = vocabulary("byte_level"), vocabulary("wordpiece")
    text = "The quick brown caf\u00e9".encode()
    ids = student.encode(text)
    letters = [teacher.token_bytes.index(bytes([b])) for b in b"thequickbrowncafe"]
    assert letters != teacher.read(text).ids
    found = align_tokens(
        TokenText(ids=np.asarray(ids, dtype=np.int32), vocabulary=student),
        TokenText(ids=np.asarray(letters, dtype=np.int32), vocabulary=teacher),
        both_end_turn=False,
    )
    assert found.method == "strings"
    assert found.kept.all() and found.covered == len(ids)
    last = found.alignment.teacher_starts[-1]
    assert last == len(letters)


def test_strings_keep_only_what_says_the_same():
    student, teacher = vocabulary("byte_level"), vocabulary("wordpiece")
    ids = student.encode(b"The quick brown fox jumps over the lazy dog")
    other = teacher.read(b"The quick brXwn fox jumps over the lazy dog").ids
    found = align_tokens(
        TokenText(ids=np.asarray(ids, dtype=np.int32), vocabulary=student),
        TokenText(ids=np.asarray(other, dtype=np.int32), vocabulary=teacher),
        both_end_turn=False,
    )
    starts = found.alignment.student_starts
    lost = [student.decode(ids[starts[c] : starts[c + 1]]) for c in np.flatnonzero(~found.kept)]
    assert found.method == "strings"
    assert b"o" in b"".join(lost)
    assert all(part.strip() in b"brown" for part in lost)
    assert found.covered >= 0.9 * len(ids)


class Reader:
    """A teacher's tokenizer without a template."""

    def __init__(self, kind: str) -> None:
        self.vocabulary = vocabulary(kind)
        self.eos_id = self.vocabulary.eos_id

    def prompt_ids(self, messages) -> np.ndarray:
        return np.array([1], dtype=np.int32)


def written(data: bytes, *, stops: bool) -> Rollout:
    student = vocabulary("byte_level")
    ids = np.asarray([*student.encode(data), *([student.eos_id] if stops else [])], dtype=np.int32)
    return Rollout(
        prompt=type("Asked", (), {"messages": ()})(),  # pyright: ignore
        sample_index=0,
        prompt_ids=np.array([1], dtype=np.int32),
        token_ids=ids,
        loss_mask=np.ones(len(ids), dtype=bool),
        logprobs=np.zeros(len(ids), dtype=np.float32),
        byte_ends=student.byte_ends(ids),
        response=data,
        policy_version=0,
        finish_reason="stop" if stops else "length",
    )


@pytest.mark.parametrize("kind", ["sentencepiece", "unigram", "wordpiece"])
def test_a_cut_character_does_not_reach_the_teacher(kind):
    data = "the fox \U0001f60a".encode()[:-2]
    read = teacher_input(written(data, stops=False), Reader(kind), student=Reader("byte_level"))
    teacher = vocabulary(kind)
    kept = b"thefox" if kind == "wordpiece" else data[:-2]
    assert teacher.decode(read.token_ids) == kept
    assert read.byte_ends[-1] == len(data) - 2
    ids = vocabulary("byte_level").encode(data)
    found = align_tokens(
        TokenText(ids=np.asarray(ids, dtype=np.int32), vocabulary=vocabulary("byte_level")),
        TokenText(ids=read.token_ids, vocabulary=teacher, byte_ends=read.byte_ends),
        both_end_turn=False,
    )
    assert found.method == ("offsets" if kind == "wordpiece" else "bytes")
    ends = vocabulary("byte_level").byte_ends(ids)
    assert ends[found.alignment.student_starts[-1] - 1] <= len(data) - 2  # the rest is masked
    assert found.covered < len(ids)


@pytest.mark.parametrize("kind", ["sentencepiece", "unigram", "wordpiece"])
@pytest.mark.parametrize("data", [b"the fox", b"the fox \n", b"the\n", b""])
def test_the_turns_end_together(kind, data):
    rollout = written(data, stops=True)
    read = teacher_input(rollout, Reader(kind), student=Reader("byte_level"))
    assert read.token_ids[-1] == vocabulary(kind).eos_id
    assert read.byte_ends[-1] == len(data)
    found = align_tokens(
        TokenText(ids=rollout.token_ids[:-1], vocabulary=vocabulary("byte_level")),
        TokenText(
            ids=read.token_ids[:-1], vocabulary=vocabulary(kind), byte_ends=read.byte_ends[:-1]
        ),
        both_end_turn=True,
    )
    assert found.alignment.ends_turn
    assert found.covered == len(rollout.token_ids)


def test_what_cannot_be_read_at_all_has_no_tokens_and_no_end():
    rollout = written(b"the \xff fox", stops=True)
    read = teacher_input(rollout, Reader("wordpiece"), student=Reader("byte_level"))
    assert len(read.token_ids) == len(read.byte_ends) == 0
    spelled = teacher_input(rollout, Reader("sentencepiece"), student=Reader("byte_level"))
    assert vocabulary("sentencepiece").decode(spelled.token_ids) == b"the \xff fox"
