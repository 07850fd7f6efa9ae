"""Classes, counts and the recommendation, on vocabularies one can count by hand."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import numpy as np
import pytest

from mopd.errors import ConfigError
from mopd.projection import ProjectionOptions, build_projection
from mopd.projection.audit import (
    CLASSES,
    Audit,
    Coverage,
    Reach,
    audit,
    character_class,
    read_texts,
    recommend,
    token_classes,
)
from mopd.projection.plot import plot_audit
from mopd.tokens.vocabulary import Vocabulary
from tests.helpers.vocabularies import byte_level, ids_of, metaspace

SHARP = ProjectionOptions(max_length=4, gamma=0.0)


def run_audit(student: Vocabulary, teacher: Vocabulary, *, texts: tuple[str, ...] = ()) -> Audit:
    return audit(student, teacher, build_projection(student, teacher, SHARP), texts=texts)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("7", "digits 1"),
        (" 42", "digits 2"),
        ("201", "digits 3+"),
        ("2024", "digits 3+"),
        ("\u0663", "other"),  # an Arabic digit: neither Latin nor 0 to 9
        ("...", "punctuation"),
        (" =", "punctuation"),
        ("_", "punctuation"),
        ("<|", "punctuation"),
        ("\n\n", "whitespace"),
        (" ", "whitespace"),
        ("\u3000", "whitespace"),
        ("\u4e2d", "CJK"),
        ("\u3002", "CJK"),
        ("\ud55c\uad6d", "CJK"),
        ("\uff0c", "CJK"),
        ("\U00020000", "CJK"),
        (" the", "latin"),
        ("\u00e9t\u00e9", "latin"),
        ("'s", "latin"),
        ("don't", "latin"),
        ("snake_case", "code"),
        ("_init", "code"),
        (" camelCase", "code"),
        ("()", "code"),
        ("];\n", "code"),
        ("\u0438\u043b\u0438", "other"),
        ("2nd", "other"),
        ("__", "punctuation"),
        ("", "special"),
    ],
)
def test_the_class_of_a_token(text: str, wanted: str) -> None:
    assert character_class(text.encode()) == wanted


def test_a_piece_of_a_character_is_other() -> None:
    assert character_class("\u4e2d".encode()[:2]) == "other"


def test_control_tokens_are_special_whatever_their_text() -> None:
    vocabulary = byte_level([], specials=("<|tool|>",))
    classes = token_classes(vocabulary)
    special = np.flatnonzero(classes == CLASSES.index("special")).tolist()
    assert special == [vocabulary.eos_id, vocabulary.token_bytes.index(b"<|tool|>")]


def test_counts_of_the_student() -> None:
    student = byte_level(["13", "201", "the", "cat"], specials=("<|tool|>",))
    found = run_audit(student, byte_level(["the"]))
    rows = {row.name: row for row in found.student}
    assert tuple(rows) == CLASSES
    assert rows["digits 1"].tokens == Coverage(exact=10, multi=0, null=0)
    # merges pass through "20"
    assert rows["digits 2"].tokens == Coverage(exact=0, multi=2, null=0)
    assert rows["digits 3+"].tokens == Coverage(exact=0, multi=1, null=0)
    # 52 letters, "th", "the" (both sides), "ca", "cat"
    assert rows["latin"].tokens == Coverage(exact=54, multi=2, null=0)
    assert rows["special"].tokens == Coverage(exact=1, multi=0, null=1)
    assert rows["digits 1"].fibre == 0
    assert (rows["digits 2"].fibre, rows["digits 3+"].fibre, rows["latin"].fibre) == (2, 1, 2)
    assert found.overall().total == student.size
    assert found.overall_text() is None
    assert all(row.text is None for row in found.student)


def test_counts_of_the_teacher() -> None:
    teacher = byte_level(["201", "the"], specials=("<|tool|>",))
    rows = {row.name: row for row in run_audit(byte_level(["the"]), teacher).teacher}
    assert (rows["digits 2"].tokens.folded, rows["digits 3+"].tokens.folded) == (1, 1)
    assert rows["latin"].tokens == Reach(kept=54, folded=0, null=0)
    assert rows["special"].tokens == Reach(kept=1, folded=0, null=1)
    assert (rows["special"].exact, rows["digits 1"].exact, rows["digits 2"].exact) == (1, 10, 0)
    assert sum(row.tokens.total for row in rows.values()) == teacher.size
    assert all(row.text is None for row in rows.values())


def test_text_weighs_tokens_by_their_number() -> None:
    student = byte_level(["13", "the"])
    found = run_audit(student, byte_level(["the"]), texts=("the 13 the", "1"))
    rows = {row.name: row for row in found.student}
    assert rows["latin"].text == Coverage(exact=2, multi=0, null=0)
    assert rows["digits 2"].text == Coverage(exact=0, multi=1, null=0)
    assert rows["digits 1"].text == Coverage(exact=1, multi=0, null=0)
    assert found.overall_text() == Coverage(exact=5, multi=1, null=0)


def test_text_as_the_teacher_writes_it_shows_what_is_folded_and_lost() -> None:
    student = metaspace([], letters="abc ")
    teacher = byte_level(["ab", "201"], specials=("<|tool|>",))
    options = ProjectionOptions(max_length=4, gamma=0.0, map="exact")
    projection = build_projection(student, teacher, options)
    found = audit(student, teacher, projection, texts=("ab abc 201 2",))
    rows = {row.name: row for row in found.teacher}
    assert rows["latin"].text == Reach(kept=1, folded=0, null=2)  # c, and "ab" twice
    assert rows["digits 3+"].text == Reach(kept=0, folded=0, null=1)
    pieces = {row.name: row for row in run_audit(student, teacher, texts=("ab abc 201 2",)).teacher}
    assert pieces["latin"].text == Reach(kept=1, folded=2, null=0)
    assert found.reach().text == Reach(kept=5, folded=0, null=3)


def test_recommend_is_what_the_audit_says() -> None:
    # students of two-digit numbers against a teacher of digits, and the other way round
    digits, numbers = byte_level(["the"]), byte_level([f"{n:02d}" for n in range(20)])
    for student, teacher, wanted in (
        (numbers, digits, "pkl"),
        (digits, numbers, "pkl"),
        (numbers, numbers, "hkl"),
        (byte_level(["cat", "snake_case"]), digits, "hkl"),  # no critical class
    ):
        projection = build_projection(student, teacher, SHARP)
        assert recommend(projection, student, teacher) == wanted
        found = audit(student, teacher, projection)
        assert found.recommendation == wanted
        assert ("digits of the teacher (33% of 30" in found.reason) == (
            teacher is numbers and student is digits
        )


def test_byte_tokens_that_spell_a_letter_again_count_as_exact() -> None:
    student, teacher = byte_level([]), metaspace([])  # <0x31> and "1"
    projection = build_projection(student, teacher, SHARP)
    assert recommend(projection, student, teacher) == "hkl"
    assert projection.folded.sum() > 30


def test_one_poor_critical_class_wants_the_projection_loss() -> None:
    student = byte_level([f"{n:02d}" for n in range(10, 16)])
    found = run_audit(student, byte_level([]), texts=("13 13 7",))
    assert found.recommendation == "pkl"
    # 10 of 16 digit tokens
    assert "digits (62% of 16 tokens exact, 33% of 3 in the text)" in found.reason
    assert "whitespace" not in found.reason
    assert "none in the text" in run_audit(student, byte_level([]), texts=("the",)).reason


def test_the_threshold_is_70_percent() -> None:
    four = [f"{n:02d}" for n in range(10, 14)]
    assert run_audit(byte_level(four), byte_level([])).recommendation == "hkl"  # 10 of 14
    assert run_audit(byte_level([*four, "14"]), byte_level([])).recommendation == "pkl"  # of 15


def test_uncritical_classes_do_not_matter() -> None:
    found = run_audit(byte_level(["the cat sat", "snake_case"]), byte_level([]))
    assert found.recommendation == "hkl"
    assert "digits, punctuation, CJK and whitespace" in found.reason


def test_both_kinds_of_tokenizers() -> None:
    student, teacher = byte_level([" the", "\u4e2d"]), metaspace([" the"])
    rows = {row.name: row for row in run_audit(student, teacher).student}
    assert rows["latin"].tokens.null == 0
    assert rows["CJK"].tokens == Coverage(exact=0, multi=1, null=0)
    assert ids_of(student, "\u4e2d")[0]


def test_read_texts(tmp_path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "sort 2 1"}], "answer": "12"},
        {"messages": [{"role": "user", "content": "a\u2028b"}], "answer": None},
    ]
    jsonl, plain = tmp_path / "a.jsonl", tmp_path / "a.txt"
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    jsonl.write_text(text, encoding="utf-8")
    plain.write_text("one\ntwo")
    assert read_texts(jsonl) == ["sort 2 1", "12", "a\u2028b"]
    assert read_texts(plain) == ["one\ntwo"]
    jsonl.write_text('{"messages": []}\n{"text": "x"}')
    with pytest.raises(ConfigError, match=r"a\.jsonl:2: wanted a JSON object with messages"):
        read_texts(jsonl)
    plain.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="not readable as text"):
        read_texts(plain)


def test_the_plot_is_xml_whose_bars_are_full() -> None:
    student, teacher = byte_level(["13", "the"]), byte_level(["the", "201"], specials=("<&>",))
    picture = plot_audit(run_audit(student, teacher, texts=("the 13",)))
    root = ElementTree.fromstring(picture)
    namespace = "{http://www.w3.org/2000/svg}"
    panels = root.findall(f"{namespace}g")
    assert len(panels) == 4
    assert len(ElementTree.fromstring(plot_audit(run_audit(student, teacher)))) == 3
    for panel in panels:
        bars: dict[str, float] = {}
        for box in panel.findall(f"{namespace}rect"):
            if box.attrib["height"] == "18.0":
                bars.setdefault(box.attrib["y"], 0.0)
                bars[box.attrib["y"]] += float(box.attrib["width"])
        assert len(bars) >= 3
        assert list(bars.values()) == pytest.approx([460.0] * len(bars), abs=0.2)
