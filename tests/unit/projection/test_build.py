"""Projection, fold and trie on vocabularies small enough to work out by hand."""

import numpy as np
import pytest

from mopd.errors import ArtifactError
from mopd.projection import ProjectionOptions, ProjectionStore, build_projection
from mopd.projection.store import load_projection, save_projection
from tests.helpers.vocabularies import byte_level, ids_of, metaspace, spell

SHARP = ProjectionOptions(max_length=4, gamma=0.0)
SMEARED = ProjectionOptions(max_length=4, gamma=0.1)


def row(projection, token):
    cut = slice(projection.crow[token], projection.crow[token + 1])
    return dict(zip(projection.col[cut].tolist(), projection.val[cut].tolist(), strict=True))


def test_rows_are_stochastic_and_the_end_of_turn_maps_to_itself():
    student = byte_level(["13", "the", " the"], specials=("<|tool|>",))
    teacher = metaspace(["th", " the"])
    for options in (SHARP, SMEARED):
        projection = build_projection(student, teacher, options)
        sums = np.add.reduceat(projection.val.astype(np.float64), projection.crow[:-1])
        assert np.abs(sums - 1).max() < 1e-6
        assert row(projection, student.eos_id) == {teacher.eos_id: 1.0}
        tool = student.token_bytes.index(b"<|tool|>")
        assert row(projection, tool) == {teacher.size: 1.0}


def test_gamma_spreads_over_the_pieces_33():
    student, teacher = byte_level(["201"]), byte_level([])
    (token,) = ids_of(student, "201")
    pieces = ids_of(teacher, "2", "0", "1")
    weights = row(build_projection(student, teacher, SMEARED), token)
    assert weights == pytest.approx(
        dict(zip(pieces, (0.9009009, 0.0900901, 0.0090090), strict=True)), abs=1e-6
    )
    assert row(build_projection(student, teacher, SHARP), token) == {pieces[0]: 1.0}
    repeated = byte_level(["aaa"])
    (token,) = ids_of(repeated, "aaa")
    assert row(build_projection(repeated, teacher, SMEARED), token) == {
        ids_of(teacher, "a")[0]: pytest.approx(1.0)
    }


def test_the_same_tokenizer_gives_the_identity_34():
    vocabulary = byte_level(["the", "12"])
    projection = build_projection(vocabulary, vocabulary, SHARP)
    assert (projection.col == np.arange(vocabulary.size)).all()
    assert (projection.fold == np.arange(vocabulary.size)).all()
    assert projection.trie.num_nodes == 0


def test_every_teacher_token_folds_onto_what_the_student_writes_first():
    student, teacher = byte_level(["ab"]), byte_level(["ab", "abc", "cd"])
    projection = build_projection(student, teacher, SHARP)
    ab, abc, cd, c = ids_of(teacher, "ab", "abc", "cd", "c")
    assert projection.fold[ab] == ab
    assert projection.fold[abc] == ab
    assert projection.fold[cd] == c


def test_a_fold_is_followed_until_it_rests():
    # abcd is written abc, d; the teacher spells abc as ab, c; the student writes ab as a, b
    student, teacher = byte_level(["bc", "abc"]), byte_level(["ab", "cd", "abcd"])
    projection = build_projection(student, teacher, SHARP)
    a, ab, abcd = ids_of(teacher, "a", "ab", "abcd")
    assert spell(student, student.encode(b"abcd")) == ["abc", "d"]
    assert spell(teacher, teacher.encode(b"abc")) == ["ab", "c"]
    assert projection.fold[[a, ab, abcd]].tolist() == [a, a, a]
    assert row(projection, ids_of(student, "abc")[0]) == {a: 1.0}


def test_a_column_is_not_left_to_the_longer_tokens_that_begin_with_it():
    # the student writes " vi" as " ", "vi" but has " vibi", whose first teacher piece is " vi"
    student, teacher = byte_level(["vi", "vibi", " vibi"]), byte_level([" vi", "bi"])
    projection = build_projection(student, teacher, SHARP)
    (space, column) = ids_of(teacher, " ", " vi")
    (longer,) = ids_of(student, " vibi")
    assert projection.fold[column] == space
    assert row(projection, longer) == {space: 1.0}
    # in the trie, " " is what is written when " vi" does not go on to " vibi"
    node = projection.trie.paths()[(column,)]
    assert projection.trie.stop_token[node] == ids_of(student, " ")[0]


def test_rows_use_folded_columns_only():
    student = byte_level(["vi", " vibi", "13", "the"])
    teacher = byte_level([" vi", "bi", "th"])
    projection = build_projection(student, teacher, SMEARED)
    real = projection.col[projection.col < projection.teacher_size]
    assert (projection.fold[real] == real).all()


def test_trie_groups_students_by_their_next_piece():
    student, teacher = byte_level(["13", "12", "123"]), byte_level([])
    trie = build_projection(student, teacher, SHARP).trie
    one, two, three = ids_of(teacher, "1", "2", "3")
    paths = trie.paths()
    assert set(paths) == {(one,), (one, two)}
    node = paths[(one,)]
    groups = range(trie.group_ptr[node], trie.group_ptr[node + 1])
    found = {
        int(trie.group_piece[g]): set(
            trie.member_token[trie.member_ptr[g] : trie.member_ptr[g + 1]].tolist()
        )
        for g in groups
    }
    assert found == {three: set(ids_of(student, "13")), two: set(ids_of(student, "12", "123"))}
    assert trie.stop_token[node] == ids_of(student, "1")[0]
    assert trie.stop_token[paths[(one, two)]] == ids_of(student, "12")[0]


def test_whitespace_is_part_of_the_bytes_31():
    student, teacher = byte_level(["_init", " init"]), metaspace(["init", " init"])
    projection = build_projection(student, teacher, SHARP)
    spaced, underscored = ids_of(student, " init", "_init")
    assert row(projection, spaced) == {ids_of(teacher, " init")[0]: 1.0}
    assert row(projection, underscored) == {0x5F: 1.0}  # the byte token of "_"


def test_store_builds_once_keeps_it_and_refuses_strangers(tmp_path):
    student, teacher = byte_level(["13"]), byte_level(["the"])
    store = ProjectionStore(tmp_path)
    first = store.get(student, teacher, SHARP)
    assert store.get(student, teacher, SHARP) is first
    again = ProjectionStore(tmp_path).get(student, teacher, SHARP)
    for name in ("crow", "col", "val", "fold", "common", "kind"):
        assert (getattr(first, name) == getattr(again, name)).all()
    assert (again.trie.member_token == first.trie.member_token).all()
    with pytest.raises(ValueError, match="read-only"):
        again.val[0] = 0.0
    path = tmp_path / "mine.safetensors"
    save_projection(path, first, options=SHARP)
    with pytest.raises(ArtifactError, match="another teacher tokenizer"):
        load_projection(path, student=student, teacher=byte_level(["thx"]), options=SHARP)
    with pytest.raises(ArtifactError, match="the recipe says"):
        load_projection(path, student=student, teacher=teacher, options=SMEARED)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ArtifactError, match="delete it"):
        load_projection(path, student=student, teacher=teacher, options=SHARP)
