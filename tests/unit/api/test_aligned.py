"""Two tokenizers over one text, and how that is shown."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

import mopd
from mopd.demo import World
from tests.helpers.fast_tokenizers import tokenizer


@pytest.fixture(scope="module")
def student() -> mopd.Tokenizer:
    return tokenizer(["ab", "cde", "<b>"])


@pytest.fixture(scope="module")
def teacher() -> mopd.Tokenizer:
    return tokenizer(["abc", "de", "<b>x"])


def test_chunks_spell_the_text_on_both_sides(
    student: mopd.Tokenizer, teacher: mopd.Tokenizer
) -> None:
    text = "abcdecde\u00e9 ab"
    aligned = mopd.align_text(text, student, teacher, end_turn=True)
    assert b"".join(chunk.data for chunk in aligned.chunks) == text.encode()
    assert [c.kind for c in aligned.chunks[:2]] == ["n-m", "1-n"]
    assert aligned.chunks[0].data == b"abcde"
    for chunk in aligned.chunks:
        theirs = aligned.teacher_ids[chunk.teacher.start : chunk.teacher.stop]
        assert teacher.decode(theirs) == chunk.data
    assert aligned.coverage == 1.0 and aligned.chunks[-1].data == b""
    assert aligned.student_ids[-1] == student.eos_id
    assert aligned.teacher_ids[-1] == teacher.eos_id


def test_ids_that_the_student_wrote_itself(
    student: mopd.Tokenizer, teacher: mopd.Tokenizer
) -> None:
    aligned = mopd.align_tokens([97, 98, 99], student, teacher)  # a, b, c one by one
    assert aligned.student_ids.tolist() == [97, 98, 99]
    assert [c.kind for c in aligned.chunks] == ["n-1"]
    same = mopd.align_tokens([97, 98, 99], student, student)
    assert same.teacher_ids.tolist() == [97, 98, 99]


def test_a_character_that_was_cut_is_in_no_chunk(
    student: mopd.Tokenizer, teacher: mopd.Tokenizer
) -> None:
    cut = np.frombuffer("a\u00e9".encode()[:-1], dtype=np.uint8).astype(np.int32)
    aligned = mopd.align_tokens(cut, student, teacher)
    assert aligned.teacher_ids.tolist() == [97] and aligned.coverage == 0.5
    assert "!" in str(aligned)


def test_given_teacher_ids(student: mopd.Tokenizer, teacher: mopd.Tokenizer) -> None:
    ids = [97, 98, teacher.eos_id]
    aligned = mopd.align_tokens(
        [*student.encode("ab").tolist(), student.eos_id], student, teacher, teacher_ids=ids
    )
    assert aligned.teacher_ids.tolist() == ids
    assert [c.kind for c in aligned.chunks] == ["1-n", "1-1"]


def test_two_rows_one_above_the_other(student: mopd.Tokenizer, teacher: mopd.Tokenizer) -> None:
    shown = str(mopd.align_text("abcde cde", student, teacher, end_turn=True)).splitlines()
    assert shown[0].startswith("5 student tokens, 6 teacher tokens, 4 chunks")
    assert shown[2:] == [
        "student | [ab][cde] | [ ] | [cde]   | [<end>]",
        "teacher | [abc][de] | [ ] | [c][de] | [<end>]",
    ]
    long = str(mopd.align_text("abcde " * 40, student, teacher))
    assert max(map(len, long.splitlines())) <= 100


class Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_markup_of_a_text_is_escaped(student: mopd.Tokenizer, teacher: mopd.Tokenizer) -> None:
    text = "<b>x<script>alert(1)</script>\x1b[2J\n"
    aligned = mopd.align_text(text, student, teacher)
    page = Text()
    page.feed(aligned._repr_html_())
    assert not page.tags & {"b", "script"} and "script" in "".join(page.words).replace("][", "")
    assert "\x1b" not in aligned._repr_html_() + str(aligned)
    assert len(str(aligned).splitlines()) % 3 == 1


def test_mistakes_are_one_line(
    student: mopd.Tokenizer, teacher: mopd.Tokenizer, tiny_world: World
) -> None:
    from transformers import PreTrainedTokenizer

    class Slow(PreTrainedTokenizer):
        vocab_size = 1

        def get_vocab(self) -> dict[str, int]:
            return {}

    backend = Backend(BPE(vocab={"a": 0, "b": 1}, merges=[]))
    endless = PreTrainedTokenizerFast(tokenizer_object=backend)
    two = mopd.load_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="b"))
    cases: list[tuple[str, Any]] = [
        ("fast tokenizer", lambda: mopd.load_tokenizer(Slow())),
        ("eos_token", lambda: mopd.load_tokenizer(endless)),
        ("no directory", lambda: mopd.load_tokenizer("/nowhere/at/all")),
        ("round-trip", lambda: mopd.align_text("xyz", two, teacher)),
        ("no tokens", lambda: mopd.align_text("xyz", student, two)),
        ("0 to", lambda: mopd.align_tokens([10**6], student, teacher)),
        ("list of token ids", lambda: mopd.align_tokens([[1]], student, teacher)),
    ]
    for expected, call in cases:
        with pytest.raises(mopd.MopdError) as caught:
            call()
        assert expected in str(caught.value) and "\n" not in str(caught.value), expected
    assert mopd.load_tokenizer(tiny_world.student).encode("bo").dtype == np.int32
