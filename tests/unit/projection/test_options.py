"""The exact map, roles, and rows from embeddings of the tokens' strings."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mopd.errors import ArtifactError, ConfigError
from mopd.projection import (
    Projection,
    ProjectionOptions,
    ProjectionStore,
    Similarity,
    build_projection,
)
from mopd.projection import similarity as similarity_module
from mopd.projection.audit import Coverage, audit
from mopd.tokens.vocabulary import Vocabulary
from mopd.types import EXACT, MULTI, NULL, SIMILAR, SPECIAL
from tests.helpers.vocabularies import byte_level, control_of, ids_of, metaspace

SHARP = ProjectionOptions(max_length=4, gamma=0.0)
EXACT_MAP = dataclasses.replace(SHARP, map="exact")
TOOLS = ("<tool>", "</tool>")


def row(projection: Projection, token: int) -> dict[int, float]:
    cut = slice(projection.crow[token], projection.crow[token + 1])
    return dict(zip(projection.col[cut].tolist(), projection.val[cut].tolist(), strict=True))


def test_the_exact_map_keeps_equal_bytes_and_the_end_of_turn() -> None:
    student = byte_level(["13", "the"], specials=TOOLS)
    teacher = byte_level(["the", "201", "they"], specials=TOOLS)
    projection = build_projection(student, teacher, EXACT_MAP)
    (the, pair), (same, longer, number) = (
        ids_of(student, "the", "13"),
        ids_of(teacher, "the", "they", "201"),
    )
    assert row(projection, the) == {same: 1.0}
    assert row(projection, pair) == {teacher.size: 1.0}
    assert row(projection, student.eos_id) == {teacher.eos_id: 1.0}
    assert projection.fold[same] == same
    assert projection.fold[teacher.eos_id] == teacher.eos_id
    assert projection.fold[[longer, number]].tolist() == [teacher.size] * 2
    assert projection.trie.num_nodes == 0
    assert set(projection.kind.tolist()) == {NULL, EXACT, SPECIAL}
    pieces = build_projection(student, teacher, SHARP)
    assert (projection.common == pieces.common).all()
    assert pieces.fold[longer] == same


def test_a_second_token_of_the_same_bytes_is_no_loss_for_the_exact_map() -> None:
    teacher = metaspace([])  # <0x61> and "a"
    projection = build_projection(byte_level([]), teacher, EXACT_MAP)
    (letter,) = ids_of(teacher, "a")
    assert letter != 0x61
    assert projection.fold[0x61] == letter


def test_roles_pair_control_tokens() -> None:
    student = byte_level(["13"], specials=TOOLS)
    teacher = byte_level([], specials=("[TOOL]", "[/TOOL]"))
    options = dataclasses.replace(SHARP, roles={"<tool>": "[TOOL]"})
    projection = build_projection(student, teacher, options)
    mine, theirs = control_of(student, "<tool>"), control_of(teacher, "[TOOL]")
    assert row(projection, mine) == {theirs: 1.0}
    assert projection.kind[mine] == SPECIAL
    assert projection.fold[theirs] == theirs
    assert projection.common[theirs] == mine
    other, lost = control_of(student, "</tool>"), control_of(teacher, "[/TOOL]")
    assert row(projection, other) == {teacher.size: 1.0}
    assert projection.fold[lost] == teacher.size


def test_a_role_of_an_ordinary_token_moves_what_the_teacher_writes_for_it() -> None:
    # some tokenizers do not mark tool tags as control tokens
    student, teacher = byte_level(["<t>"]), byte_level(["<t>", "<t>x"], specials=("[TOOL]",))
    options = dataclasses.replace(SHARP, roles={"<t>": "[TOOL]"})
    projection = build_projection(student, teacher, options)
    (token,), (plain, longer) = ids_of(student, "<t>"), ids_of(teacher, "<t>", "<t>x")
    column = control_of(teacher, "[TOOL]")
    assert row(projection, token) == {column: 1.0}
    assert projection.fold[[plain, longer, column]].tolist() == [column] * 3
    assert projection.common[column] == token
    assert projection.common[plain] == -1


def test_the_lowest_of_two_tokens_of_one_role_is_its_partner() -> None:
    student, teacher = byte_level([], specials=TOOLS), byte_level([], specials=("[TOOL]",))
    first, second = (control_of(student, text) for text in TOOLS)
    column = control_of(teacher, "[TOOL]")
    for names in (TOOLS, TOOLS[::-1]):
        options = dataclasses.replace(SHARP, roles=dict.fromkeys(names, "[TOOL]"))
        projection = build_projection(student, teacher, options)
        assert row(projection, first) == row(projection, second) == {column: 1.0}
        assert projection.common[column] == first


@pytest.mark.parametrize(
    ("role", "wanted"),
    [
        (("<none>", "[TOOL]"), "the student of role <none>=[TOOL] has no token '<none>'"),
        (("<tool>", "[NONE]"), "the teacher of role <tool>=[NONE] has no token '[NONE]'"),
        (("<|end|>", "[TOOL]"), "the end of turn needs no role"),
    ],
)
def test_a_role_names_tokens_of_both_sides(role: tuple[str, str], wanted: str) -> None:
    student, teacher = byte_level([], specials=TOOLS), byte_level([], specials=("[TOOL]",))
    with pytest.raises(ConfigError) as caught:
        build_projection(student, teacher, dataclasses.replace(SHARP, roles=dict([role])))
    assert wanted in str(caught.value)


class Embedded:
    """Two vocabularies with control tokens, and random embeddings of their strings."""

    def __init__(self, folder: Path) -> None:
        self.student = byte_level(["13"], specials=TOOLS)
        self.teacher = byte_level(["the"], specials=("[TOOL]", "[/TOOL]", "[X]"))
        draw = np.random.default_rng(0)
        self.sides = {
            "student": draw.normal(size=(self.student.size, 16)).astype(np.float32),
            "teacher": draw.normal(size=(self.teacher.size + 3, 16)).astype(np.float32),
        }
        self.path = folder / "strings.safetensors"
        self.save()

    def save(self) -> None:
        save_file(self.sides, self.path)

    def options(self, **changes: object) -> ProjectionOptions:
        given = dataclasses.replace(Similarity.of(self.path), **changes)  # type: ignore[arg-type]
        return dataclasses.replace(SHARP, similarity=given)

    def expected(self, token: int, *, power: float, top: int) -> dict[int, float]:
        """From the dense row of cosines."""
        a, b = self.sides["student"][token], self.sides["teacher"][: self.teacher.size]
        cosine = (b @ a) / np.linalg.norm(b, axis=1) / np.linalg.norm(a)
        cosine[self.teacher.eos_id] = 0.0
        best = np.argsort(-cosine)[:top]
        weights = np.maximum(cosine[best], 0.0) ** power
        return {int(t): float(w) for t, w in zip(best, weights / weights.sum(), strict=True) if w}


@pytest.fixture
def embedded(tmp_path: Path) -> Embedded:
    return Embedded(tmp_path)


@pytest.mark.parametrize("block", [1, 700, 1 << 22])
def test_null_rows_go_to_tokens_of_similar_strings(
    block: int, embedded: Embedded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(similarity_module, "_BLOCK_ENTRIES", block)
    student, teacher = embedded.student, embedded.teacher
    built = build_projection(student, teacher, SHARP)
    given = build_projection(student, teacher, embedded.options(power=3.0, top=4))
    for token in range(student.size):
        if built.kind[token] == NULL:
            expected: dict[int, float] = {}
            for t, weight in embedded.expected(token, power=3.0, top=4).items():
                column = int(given.fold[t])
                expected[column] = expected.get(column, 0.0) + weight
            assert row(given, token) == pytest.approx(expected, abs=1e-5)
            assert given.kind[token] == SIMILAR
        else:
            assert row(given, token) == row(built, token)
            assert given.kind[token] == built.kind[token]
    assert (given.common == built.common).all()
    # what only a similar token stands for has a column of its own; nothing else has moved
    moved = np.flatnonzero(given.fold != built.fold)
    assert (given.fold[moved] == moved).all()
    assert (built.fold[moved] == teacher.size).all()
    assert np.isin(moved, given.col).all()
    real = given.col[given.col < teacher.size]
    assert (given.fold[real] == real).all()


def test_the_similar_string_of_a_role_is_found(embedded: Embedded) -> None:
    mine = control_of(embedded.student, "<tool>")
    theirs = control_of(embedded.teacher, "[TOOL]")
    embedded.sides["teacher"][theirs] = 2.5 * embedded.sides["student"][mine]
    embedded.save()
    given = build_projection(embedded.student, embedded.teacher, embedded.options())
    weights = row(given, mine)
    assert weights[theirs] > 0.9
    assert sum(weights.values()) == pytest.approx(1.0, abs=1e-6)
    assert given.fold[theirs] == theirs


def test_nothing_similar_stays_null(embedded: Embedded) -> None:
    mine, other = (control_of(embedded.student, text) for text in TOOLS)
    embedded.sides["student"][mine] = 0.0
    embedded.sides["teacher"][:] = np.abs(embedded.sides["teacher"])
    embedded.sides["student"][other] = -1.0
    embedded.save()
    given = build_projection(embedded.student, embedded.teacher, embedded.options())
    for token in (mine, other):
        assert row(given, token) == {embedded.teacher.size: 1.0}
        assert given.kind[token] == NULL


def test_ties_are_cut_by_the_lowest_id(embedded: Embedded) -> None:
    mine = control_of(embedded.student, "<tool>")
    embedded.sides["teacher"][:] = embedded.sides["student"][mine]
    embedded.save()
    options = embedded.options(top=3)
    given = build_projection(embedded.student, embedded.teacher, options)
    assert row(given, mine) == pytest.approx(dict.fromkeys(range(3), 1 / 3))


def test_with_the_exact_map_pieces_are_similar_instead(embedded: Embedded) -> None:
    options = dataclasses.replace(embedded.options(top=1), map="exact")
    given = build_projection(embedded.student, embedded.teacher, options)
    (pair,) = ids_of(embedded.student, "13")
    assert given.kind[pair] == SIMILAR
    assert MULTI not in given.kind
    rows = {row.name: row for row in audit(embedded.student, embedded.teacher, given).student}
    assert rows["digits 2"].tokens == Coverage(exact=0, multi=1, null=0)


@pytest.mark.parametrize(
    ("sides", "wanted"),
    [
        ({"student": (400, 4)}, "wanted `student`"),
        ({"student": (400, 4), "teacher": (400, 5)}, "of one d"),
        ({"student": (9, 4), "teacher": (400, 4)}, "`student` has 9 rows, its tokenizer"),
        ({"student": (400, 4), "teacher": (400,)}, "wanted `student`"),
    ],
)
def test_embeddings_of_something_else_are_refused(
    sides: dict[str, tuple[int, ...]], wanted: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    save_file({name: np.ones(shape, dtype=np.float32) for name, shape in sides.items()}, path)
    options = dataclasses.replace(SHARP, similarity=Similarity.of(path))
    with pytest.raises(ArtifactError, match=wanted):
        build_projection(byte_level([]), byte_level([]), options)


def test_a_changed_or_missing_file_of_embeddings_is_refused(embedded: Embedded) -> None:
    options = embedded.options()
    embedded.sides["student"][0] = np.nan
    embedded.save()
    with pytest.raises(ArtifactError, match="have changed"):
        build_projection(embedded.student, embedded.teacher, options)
    with pytest.raises(ArtifactError, match="`student` is not finite"):
        build_projection(embedded.student, embedded.teacher, embedded.options())
    embedded.path.write_bytes(b"junk")
    with pytest.raises(ArtifactError, match="not readable as safetensors"):
        build_projection(embedded.student, embedded.teacher, embedded.options())
    with pytest.raises(ArtifactError, match="not readable"):
        Similarity.of(embedded.path.parent / "none")


def changed(embedded: Embedded) -> list[tuple[ProjectionOptions, str]]:
    """Options that differ from `SHARP`, and the keys that a refusal names."""
    return [
        (EXACT_MAP, "ctkd.map"),
        (dataclasses.replace(SHARP, roles={"<tool>": "[TOOL]"}), "ctkd.roles"),
        (embedded.options(), "ctkd.similarity"),
        (dataclasses.replace(SHARP, max_length=3, gamma=0.1), "ctkd.gamma, ctkd.max_length"),
    ]


def test_a_store_keeps_options_apart_and_a_file_is_refused_for_others(
    embedded: Embedded, tmp_path: Path
) -> None:
    pair: tuple[Vocabulary, Vocabulary] = embedded.student, embedded.teacher
    store = ProjectionStore(tmp_path / "store")
    sharp = store.get(*pair, SHARP)
    (path,) = (tmp_path / "store").iterdir()
    for number, (options, key) in enumerate(changed(embedded), start=2):
        assert store.get(*pair, options) is not sharp
        assert len(list((tmp_path / "store").iterdir())) == number
        with pytest.raises(ArtifactError) as caught:
            ProjectionStore(tmp_path).get(*pair, options, path=str(path))
        assert str(caught.value).endswith(f"delete it or change {key}")


def test_the_content_of_the_embeddings_is_an_option_their_place_is_not(
    embedded: Embedded, tmp_path: Path
) -> None:
    here = embedded.options()
    moved = embedded.path.rename(tmp_path / "moved.safetensors")
    there = dataclasses.replace(SHARP, similarity=Similarity.of(moved))
    embedded.sides["student"][0] += 1.0
    embedded.save()
    assert here.text() == there.text()
    assert embedded.options().text() != here.text()
    assert embedded.options(top=3).text() != embedded.options().text()
    assert embedded.options(power=3.0).text() != embedded.options().text()
    roles = [{"a": "x", "b": "y"}, {"b": "y", "a": "x"}]
    assert len({dataclasses.replace(SHARP, roles=given).text() for given in roles}) == 1
