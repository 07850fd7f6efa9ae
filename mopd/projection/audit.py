"""How much of two vocabularies is one-to-one, by class of characters, and what that suggests."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from mopd.errors import ConfigError
from mopd.tokens.vocabulary import Vocabulary
from mopd.types import EXACT, MULTI, NULL, SIMILAR, SPECIAL, Projection

DIGITS = ("digits 1", "digits 2", "digits 3+")
CLASSES = (*DIGITS, "punctuation", "whitespace", "CJK", "latin", "code", "other", "special")
# Classes that a model cannot do without: a hybrid loss would not teach those of its tokens that
# are not one to one.
CRITICAL = {
    "digits": DIGITS,
    "punctuation": ("punctuation",),
    "CJK": ("CJK",),
    "whitespace": ("whitespace",),
}
MIN_EXACT = 0.7

_BRACKETS = re.compile(r"[()\[\]{}]")
_IDENTIFIER = re.compile(r"\w*[a-z][A-Z]\w*|(?=\w*[^\W\d_])\w*_\w*")
_CJK = re.compile(
    "[\u3000-\u30ff\u3130-\u318f\u31f0-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff]"
)
_CJK_WIDE = re.compile("[\uff00-\uffef\U00020000-\U0003ffff]")
_LATIN = re.compile("['\u2019]?[A-Za-z\u00c0-\u024f\u1e00-\u1eff]+(['\u2019][A-Za-z]*)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """Student tokens by the kind of their row: the end of turn and roles count as exact, tokens
    that go to similar ones as multi.
    """

    exact: int
    multi: int
    null: int

    @property
    def total(self) -> int:
        return self.exact + self.multi + self.null

    def shares(self) -> tuple[float, float, float]:
        """Exact, multi and null as parts of 1; zeros where there is nothing."""
        total = max(self.total, 1)
        return self.exact / total, self.multi / total, self.null / total


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentClass:
    """One character class of the student's tokens."""

    name: str
    tokens: Coverage  # every token once
    text: Coverage | None  # every token as often as the sample has it
    fibre: (
        int  # tokens that path terms tell apart: their row says how they begin, not what they are
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """Teacher tokens by their column: their own, another's, or none (unreachable)."""

    kept: int
    folded: int
    null: int

    @property
    def total(self) -> int:
        return self.kept + self.folded + self.null

    def shares(self) -> tuple[float, float, float]:
        """Kept, folded and null as parts of 1; zeros where there is nothing."""
        total = max(self.total, 1)
        return self.kept / total, self.folded / total, self.null / total


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherClass:
    """One character class of the teacher's tokens."""

    name: str
    tokens: Reach  # every token once
    text: Reach | None  # every token as often as the sample has it, as the teacher writes it
    exact: int  # tokens of the same bytes as one student token's

    @property
    def exact_share(self) -> float:
        return self.exact / max(self.tokens.total, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """Classes in the order of `CLASSES`, those without tokens included."""

    student: tuple[StudentClass, ...]
    teacher: tuple[TeacherClass, ...]
    recommendation: Literal["pkl", "hkl"]
    reason: str

    def overall(self) -> Coverage:
        """All student tokens."""
        return _sum([row.tokens for row in self.student])

    def overall_text(self) -> Coverage | None:
        """All tokens of the sample, or None without one."""
        parts = [row.text for row in self.student if row.text is not None]
        return _sum(parts) if parts else None

    def reach(self) -> TeacherClass:
        """All teacher tokens, those of the sample included."""
        texts = [row.text for row in self.teacher if row.text is not None]
        return TeacherClass(
            name="all",
            tokens=_sum_reach([row.tokens for row in self.teacher]),
            text=_sum_reach(texts) if texts else None,
            exact=sum(row.exact for row in self.teacher),
        )


def audit(
    student: Vocabulary, teacher: Vocabulary, projection: Projection, *, texts: Sequence[str] = ()
) -> Audit:
    """Counts per class of both vocabularies, and the loss that they suggest.

    ``texts`` are encoded by both; they add how often each kind of token is really met.
    """
    rows = _student_classes(student, projection, texts)
    theirs = _teacher_classes(student, teacher, projection, texts)
    recommendation, reason = _recommend(rows, theirs)
    return Audit(student=rows, teacher=theirs, recommendation=recommendation, reason=reason)


def recommend(
    projection: Projection, student: Vocabulary, teacher: Vocabulary
) -> Literal["pkl", "hkl"]:
    """The loss that `audit` suggests: ``hkl`` where each critical class is `MIN_EXACT` one to one.

    Both sides count. Student tokens that are not one to one would be pushed down whatever they
    are; the mass of such teacher tokens would be sent to them instead of to their first pieces.
    """
    rows = _student_classes(student, projection, ())
    return _recommend(rows, _teacher_classes(student, teacher, projection, ()))[0]


def token_classes(vocabulary: Vocabulary) -> np.ndarray:
    """[V] int64: index into `CLASSES` of every token."""
    index = {name: number for number, name in enumerate(CLASSES)}
    return np.fromiter(
        (
            index["special" if control else character_class(data)]
            for data, control in zip(vocabulary.token_bytes, vocabulary.control, strict=True)
        ),
        dtype=np.int64,
        count=vocabulary.size,
    )


def character_class(data: bytes) -> str:
    """The class of a token's bytes. White space around a word or a number does not count.

    ``other`` holds what fits nowhere, among it pieces of UTF-8 characters and other scripts.
    """
    if not data:
        return "special"
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return "other"
    if not (core := text.strip()):
        return "whitespace"
    if core.isascii() and core.isdigit():
        return DIGITS[min(len(core), len(DIGITS)) - 1]
    if _CJK.search(core) or _CJK_WIDE.search(core):
        return "CJK"
    if _BRACKETS.search(core) or _IDENTIFIER.fullmatch(core):
        return "code"
    if _LATIN.fullmatch(core):
        return "latin"
    return "punctuation" if all(unicodedata.category(c)[0] in "PS" for c in core) else "other"


def read_texts(path: Path) -> list[str]:
    """Messages and answers of a ``.jsonl`` file of prompts, or any other file as one text.

    Raises:
        ConfigError: not readable, or a line that is no JSON object with ``messages``.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as text ({error})") from error
    if path.suffix != ".jsonl":
        return [content] if content else []
    texts: list[str] = []
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            texts += [str(message["content"]) for message in row["messages"]]
            texts += [str(row["answer"])] if row.get("answer") is not None else []
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path}:{number}: wanted a JSON object with messages (role, content)"
            ) from error
    return texts


def _student_classes(
    student: Vocabulary, projection: Projection, texts: Sequence[str]
) -> tuple[StudentClass, ...]:
    kind = np.where(projection.kind == SPECIAL, EXACT, projection.kind)
    kind = np.where(kind == SIMILAR, MULTI, kind)
    fibre = np.zeros(student.size, dtype=np.int64)
    fibre[np.unique(projection.trie.member_token)] = 1
    ones = np.ones(student.size, dtype=np.int64)
    used = _occurrences(student, texts) if texts else None
    classes = token_classes(student)
    return tuple(
        StudentClass(
            name=name,
            tokens=_coverage(kind, ones * (classes == number)),
            text=None if used is None else _coverage(kind, used * (classes == number)),
            fibre=int(fibre[classes == number].sum()),
        )
        for number, name in enumerate(CLASSES)
    )


def _teacher_classes(
    student: Vocabulary, teacher: Vocabulary, projection: Projection, texts: Sequence[str]
) -> tuple[TeacherClass, ...]:
    exact = (projection.common >= 0) | np.fromiter(
        (data in student.by_bytes for data in teacher.token_bytes), bool, count=teacher.size
    )
    ones = np.ones(teacher.size, dtype=np.int64)
    used = _occurrences(teacher, texts) if texts else None
    classes = token_classes(teacher)
    return tuple(
        TeacherClass(
            name=name,
            tokens=_reach(projection, ones * (classes == number)),
            text=None if used is None else _reach(projection, used * (classes == number)),
            exact=int(exact[classes == number].sum()),
        )
        for number, name in enumerate(CLASSES)
    )


def _occurrences(vocabulary: Vocabulary, texts: Sequence[str]) -> np.ndarray:
    """[V] int64: how often the tokenizer's encoding of ``texts`` has each token."""
    encoded = vocabulary.encode_many([text.encode() for text in texts])
    ids = np.asarray([token for line in encoded for token in line], dtype=np.int64)
    return np.bincount(ids, minlength=vocabulary.size)


def _coverage(kind: np.ndarray, weight: np.ndarray) -> Coverage:
    exact, multi, null = (int(weight[kind == k].sum()) for k in (EXACT, MULTI, NULL))
    return Coverage(exact=exact, multi=multi, null=null)


def _reach(projection: Projection, weight: np.ndarray) -> Reach:
    null = projection.fold == projection.teacher_size
    folded = projection.folded & ~null
    kept, moved, lost = (int(weight[which].sum()) for which in (~(null | folded), folded, null))
    return Reach(kept=kept, folded=moved, null=lost)


def _sum(parts: Sequence[Coverage]) -> Coverage:
    return Coverage(
        exact=sum(part.exact for part in parts),
        multi=sum(part.multi for part in parts),
        null=sum(part.null for part in parts),
    )


def _sum_reach(parts: Sequence[Reach]) -> Reach:
    return Reach(
        kept=sum(part.kept for part in parts),
        folded=sum(part.folded for part in parts),
        null=sum(part.null for part in parts),
    )


def _recommend(
    student: Sequence[StudentClass], teacher: Sequence[TeacherClass]
) -> tuple[Literal["pkl", "hkl"], str]:
    poor: list[str] = []
    for critical, names in CRITICAL.items():
        tokens = _sum([row.tokens for row in student if row.name in names])
        share = tokens.shares()[0]
        if tokens.total and share < MIN_EXACT:
            poor.append(
                f"{critical} ({share:.0%} of {tokens.total} tokens exact{_met(student, names)})"
            )
        theirs = [row for row in teacher if row.name in names]
        total = sum(row.tokens.total for row in theirs)
        share = sum(row.exact for row in theirs) / max(total, 1)
        if total and share < MIN_EXACT:
            poor.append(f"{critical} of the teacher ({share:.0%} of {total} tokens exact)")
    if poor:
        return "pkl", (
            f"{', '.join(poor)}: below {MIN_EXACT:.0%}; a loss on the common vocabulary would not "
            "teach which of these tokens to write"
        )
    return "hkl", (
        f"digits, punctuation, CJK and whitespace are at least {MIN_EXACT:.0%} exact, so the "
        "common vocabulary carries them one to one"
    )


def _met(rows: Sequence[StudentClass], names: Sequence[str]) -> str:
    text = [row.text for row in rows if row.name in names and row.text is not None]
    if not text:
        return ""
    met = _sum(text)
    return (
        f", {met.shares()[0]:.0%} of {met.total} in the text" if met.total else ", none in the text"
    )
