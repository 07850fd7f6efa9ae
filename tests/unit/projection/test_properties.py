"""What holds for every pair of vocabularies, on random small ones."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mopd.projection import Projection, ProjectionOptions, build_projection, relaxed_common
from mopd.tokens.vocabulary import Vocabulary
from mopd.types import EXACT, MULTI, SPECIAL
from tests.helpers.vocabularies import byte_level, control_of, metaspace

TOOL = "<|tool|>"
# few letters, so that tokens overlap; one of two bytes, so that some split it
WORDS = st.lists(st.text(alphabet="ab1 \u00e9", min_size=2, max_size=5), unique=True, max_size=8)
SEEDS = st.integers(0, 2**32 - 1)
OPTIONS = st.builds(
    ProjectionOptions,
    max_length=st.integers(1, 5),
    gamma=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    map=st.sampled_from(["pieces", "exact"]),
    roles=st.sampled_from([{}, {TOOL: TOOL}]),
)


@st.composite
def vocabularies(draw: st.DrawFn) -> Vocabulary:
    return byte_level(draw(WORDS), specials=(TOOL,), shuffle=draw(SEEDS))


@st.composite
def teachers(draw: st.DrawFn) -> Vocabulary:
    if draw(st.booleans()):
        return draw(vocabularies())
    vocabulary = metaspace(draw(WORDS), letters="ab1 \u00e9")
    return vocabulary


def dense(projection: Projection) -> np.ndarray:
    """[V_S, V_T + 1] float64."""
    matrix = np.zeros((projection.student_size, projection.teacher_size + 1))
    rows = np.repeat(np.arange(projection.student_size), np.diff(projection.crow))
    np.add.at(matrix, (rows, projection.col), projection.val.astype(np.float64))
    return matrix


def build(student: Vocabulary, teacher: Vocabulary, options: ProjectionOptions) -> Projection:
    if TOOL.encode() not in teacher.token_bytes:
        options = ProjectionOptions(
            max_length=options.max_length, gamma=options.gamma, map=options.map
        )
    return build_projection(student, teacher, options)


def kl(p: np.ndarray, q: np.ndarray) -> float:
    kept = p > 0
    return float((p[kept] * np.log(p[kept] / q[kept])).sum())


@given(vocabularies(), teachers(), OPTIONS)
@settings(max_examples=40)
def test_rows_are_stochastic_33(
    student: Vocabulary, teacher: Vocabulary, options: ProjectionOptions
) -> None:
    projection = build(student, teacher, options)
    assert (projection.val > 0).all()
    assert np.abs(dense(projection).sum(axis=1) - 1.0).max() <= 1e-6
    single = (projection.kind == EXACT) | (projection.kind == SPECIAL)
    assert (np.diff(projection.crow)[single] == 1).all()
    assert (projection.val[projection.crow[:-1][single]] == 1.0).all()
    entries = list(zip(dense(projection).nonzero()[0], projection.col.tolist(), strict=True))
    assert len(set(entries)) == len(entries)  # a repeated column is one entry


@given(vocabularies(), OPTIONS)
@settings(max_examples=20)
def test_the_same_tokenizer_is_the_identity_34(
    vocabulary: Vocabulary, options: ProjectionOptions
) -> None:
    projection = build(vocabulary, vocabulary, options)
    matrix = dense(projection)
    tool = control_of(vocabulary, TOOL)
    known = np.ones(vocabulary.size, dtype=bool)
    known[tool] = bool(options.roles)  # a control token needs a role, also with itself
    assert (matrix[:, :-1] == np.diag(known.astype(np.float64))).all()
    assert matrix[tool, -1] == float(not options.roles)
    assert (projection.fold == np.where(known, np.arange(vocabulary.size), vocabulary.size)).all()
    assert projection.trie.num_nodes == 0
    assert (relaxed_common(projection) == projection.common).all()


@given(WORDS, SEEDS, OPTIONS)
@settings(max_examples=20)
def test_another_order_of_ids_is_a_permutation_34(
    words: list[str], seed: int, options: ProjectionOptions
) -> None:
    student = byte_level(words, specials=(TOOL,))
    teacher = byte_level(words, specials=(TOOL,), shuffle=seed)
    order = [teacher.token_bytes.index(data) for data in student.token_bytes]
    known = np.ones(student.size, dtype=bool)
    known[control_of(student, TOOL)] = bool(options.roles)
    expected = np.zeros((student.size, teacher.size))
    expected[np.arange(student.size)[known], np.asarray(order)[known]] = 1.0
    assert (dense(build(student, teacher, options))[:, :-1] == expected).all()


@given(vocabularies(), teachers(), OPTIONS)
@settings(max_examples=40)
def test_the_fold_rests_on_columns_of_w(
    student: Vocabulary, teacher: Vocabulary, options: ProjectionOptions
) -> None:
    projection = build(student, teacher, options)
    fold, null = projection.fold, projection.teacher_size
    rests = fold[fold < null]
    assert (fold[rests] == rests).all()
    assert np.isin(rests, projection.col).all()
    real = projection.col[projection.col < null]
    assert (fold[real] == real).all()
    for column in range(teacher.size):
        data = teacher.token_bytes[column]
        same = student.by_bytes.get(data) if not teacher.control[column] else None
        if same is not None:
            assert teacher.token_bytes[fold[column]] == data
        elif fold[column] < null and not teacher.control[column]:
            assert options.map == "pieces"
            assert data.startswith(teacher.token_bytes[fold[column]])


@given(vocabularies(), teachers(), OPTIONS, SEEDS)
@settings(max_examples=25)
def test_data_processing_36(
    student: Vocabulary, teacher: Vocabulary, options: ProjectionOptions, seed: int
) -> None:
    matrix = dense(build(student, teacher, options))
    matrix /= matrix.sum(axis=1, keepdims=True)  # float32 weights
    draw = np.random.default_rng(seed)
    p, q = draw.dirichlet(np.full(student.size, 0.3), size=2) + 1e-12
    p, q = p / p.sum(), q / q.sum()
    pushed = kl(p @ matrix, q @ matrix)
    assert -1e-12 <= pushed <= kl(p, q) + 1e-12


@given(vocabularies(), teachers(), OPTIONS, SEEDS)
@settings(max_examples=25)
def test_a_fibre_is_blind_36(
    student: Vocabulary, teacher: Vocabulary, options: ProjectionOptions, seed: int
) -> None:
    matrix = dense(build(student, teacher, options))
    draw = np.random.default_rng(seed)
    q = draw.dirichlet(np.ones(student.size))
    _, index = np.unique(matrix, axis=0, return_inverse=True)
    for group in range(index.max() + 1):
        twins = np.flatnonzero(index.ravel() == group)
        if len(twins) > 1:
            a, b = draw.choice(twins, size=2, replace=False)
            moved = q.copy()
            moved[a], moved[b] = 0.0, q[a] + q[b]
            assert np.abs(moved @ matrix - q @ matrix).max() <= 1e-15


@given(vocabularies(), teachers(), OPTIONS)
@settings(max_examples=40)
def test_members_of_a_group_go_on_with_its_piece(
    student: Vocabulary, teacher: Vocabulary, options: ProjectionOptions
) -> None:
    projection = build(student, teacher, options)
    trie = projection.trie
    seen: set[tuple[int, int]] = set()
    for path, node in trie.paths().items():
        assert 1 <= len(path) < options.max_length
        for group in range(trie.group_ptr[node], trie.group_ptr[node + 1]):
            wanted = [*path, int(trie.group_piece[group])]
            for token in trie.member_token[trie.member_ptr[group] : trie.member_ptr[group + 1]]:
                pieces = teacher.encode(student.token_bytes[token])
                assert pieces[: len(wanted)] == wanted
                assert projection.kind[token] == MULTI
                seen.add((int(token), len(path)))
        if (stop := int(trie.stop_token[node])) >= 0:
            spelled = teacher.decode(path)
            assert spelled.startswith(student.token_bytes[stop])
            assert len(path) == 1 or student.token_bytes[stop] == spelled
    if options.map == "exact":
        assert not seen
        return
    for token in np.flatnonzero(projection.kind == MULTI).tolist():
        pieces = teacher.encode(student.token_bytes[token])
        depths = range(1, min(len(pieces), options.max_length))
        assert {(token, depth) for depth in depths} <= seen


@given(vocabularies(), teachers(), OPTIONS)
@settings(max_examples=40)
def test_partners_are_one_to_one_43(
    student: Vocabulary, teacher: Vocabulary, options: ProjectionOptions
) -> None:
    projection = build(student, teacher, options)
    matrix, common = dense(projection), relaxed_common(projection)
    found = np.flatnonzero(common >= 0)
    assert len(np.unique(common[found])) == len(found)
    kept = projection.common >= 0
    assert (common[kept] == projection.common[kept]).all()
    for column, token in zip(found.tolist(), common[found].tolist(), strict=True):
        assert matrix[token, projection.fold[column]] >= 0.6 - 1e-6
        assert teacher.control[column] or student.token_bytes[token].startswith(
            teacher.token_bytes[column]
        )


def test_pulling_mass_to_a_token_39() -> None:
    student, teacher = byte_level(["abc"]), byte_level([])
    weights = dense(build_projection(student, teacher, ProjectionOptions(max_length=4, gamma=0.1)))
    r = np.zeros(teacher.size + 1)
    for letter, share in (("c", 0.1), ("a", 0.5), ("b", 0.2)):
        r[teacher.by_bytes[letter.encode()]] = share
    # W_sigma has the weights 1, .1, .01, which a row of W divides by their sum
    pulled = weights @ r
    assert abs(1.11 * pulled[student.by_bytes[b"abc"]] - 0.521) < 1e-6
    assert abs(pulled[student.by_bytes[b"a"]] - 0.5) < 1e-12
