"""NeMo's dense top-k files: weights, the scale trick, strict and relaxed partners."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from mopd.errors import ArtifactError
from mopd.projection import ProjectionStore, build_projection
from mopd.projection.nemo import NEMO_OPTIONS, TopK, import_topk, load_topk
from mopd.projection.store import save_projection
from mopd.types import EXACT, MULTI, NULL, SPECIAL, Projection
from tests.helpers.vocabularies import byte_level, ids_of

# rows of pieces of length 1, 2 and 3 with the scale trick (oracle 40)
SCALED = (
    (0.8333, 0.1667),
    (0.7576, 0.0758, 0.1667),
    (0.7508, 0.0751, 0.0075, 0.1667),
)


def dense(projection: Projection, *, k: int = 4) -> TopK:
    """A projection as NeMo would store it: null rows are empty."""
    indices = np.full((projection.student_size, k), -1, dtype=np.int64)
    weights = np.zeros((projection.student_size, k))
    for token in range(projection.student_size):
        cut = slice(projection.crow[token], projection.crow[token + 1])
        columns = projection.col[cut]
        if columns[0] < projection.teacher_size:
            indices[token, : len(columns)] = columns
            weights[token, : len(columns)] = projection.val[cut]
    return TopK(indices=indices, likelihoods=weights)


def row(projection: Projection, token: int) -> dict[int, float]:
    cut = slice(projection.crow[token], projection.crow[token + 1])
    return dict(zip(projection.col[cut].tolist(), projection.val[cut].tolist(), strict=True))


def test_our_own_rows_come_back_33() -> None:
    student, teacher = byte_level(["13", "201", "the"], specials=("<|t|>",)), byte_level(["the"])
    built = build_projection(student, teacher, NEMO_OPTIONS)
    found = import_topk(dense(built), student=student, teacher=teacher)
    assert len(found.scaled_rows) == 0
    for token in range(student.size):
        assert row(found.projection, token) == pytest.approx(row(built, token), abs=1e-6)
    assert (found.projection.kind == built.kind).all()
    assert found.projection.col.dtype == np.int32
    assert found.projection.val.dtype == np.float32
    (token,) = ids_of(student, "201")
    assert sorted(row(found.projection, token).values(), reverse=True) == pytest.approx(
        [0.9009009, 0.0900901, 0.0090090], abs=1e-6
    )


def test_the_same_tokenizer_stays_the_identity_34() -> None:
    vocabulary = byte_level(["the", "12"])
    built = build_projection(vocabulary, vocabulary, NEMO_OPTIONS)
    found = import_topk(dense(built), student=vocabulary, teacher=vocabulary).projection
    assert (found.col == np.arange(vocabulary.size)).all()
    assert (found.val == 1.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_trick_rows_are_named_40(dtype: torch.dtype) -> None:
    student, teacher = byte_level(["13", "201", "2013"]), byte_level([])
    topk = dense(build_projection(student, teacher, NEMO_OPTIONS))
    tokens = ids_of(student, "13", "201", "2013")
    for token, weights in zip(tokens, SCALED, strict=True):
        topk.indices[token] = -1
        topk.likelihoods[token] = 0
        topk.indices[token, : len(weights)] = np.arange(len(weights)) + 40
        rounded = torch.tensor(weights).to(dtype).to(torch.float64).numpy()
        topk.likelihoods[token, : len(weights)] = rounded
    found = import_topk(topk, student=student, teacher=teacher)
    assert sorted(found.scaled_rows.tolist()) == sorted(tokens)
    sums = np.add.reduceat(found.projection.val.astype(np.float64), found.projection.crow[:-1])
    assert np.abs(sums - 1).max() < 1e-6
    assert row(found.projection, tokens[0]) == pytest.approx({40: 0.8333, 41: 0.1667}, abs=1e-3)


def test_rows_are_folded_summed_normalised_and_never_empty() -> None:
    student, teacher = byte_level(["13"], specials=("<|t|>",)), byte_level(["201"])
    (one, two, folded) = ids_of(teacher, "1", "2", "201")
    (token,) = ids_of(student, "13")
    topk = dense(build_projection(student, teacher, NEMO_OPTIONS))
    topk.indices[token] = [folded, one, two, -1]
    topk.likelihoods[token] = [1.0, 2.0, 1.0, 0.0]
    topk.indices[student.eos_id] = -1
    (letter, exact) = ids_of(student, "a", "b")
    topk.indices[letter] = [two, -1, -1, -1]  # exact for us, not for the file
    topk.indices[exact, 0], topk.likelihoods[exact, 0] = -1, 1.0
    found = import_topk(topk, student=student, teacher=teacher, reapply_exact=False).projection
    assert row(found, token) == pytest.approx({two: 0.5, one: 0.5})
    assert row(found, student.eos_id) == {teacher.eos_id: 1.0}
    assert row(found, exact) == {teacher.size: 1.0}
    kinds = [found.kind[i] for i in (token, student.eos_id, letter, exact, letter + 2)]
    assert kinds == [MULTI, SPECIAL, MULTI, NULL, EXACT]
    assert found.kind[student.token_bytes.index(b"<|t|>")] == NULL


def test_a_converted_file_is_a_projection_like_any_other(tmp_path) -> None:
    student, teacher = byte_level(["13"]), byte_level(["the"])
    topk = dense(build_projection(student, teacher, NEMO_OPTIONS))
    found = import_topk(topk, student=student, teacher=teacher).projection
    path = tmp_path / "converted.safetensors"
    save_projection(path, found, options=NEMO_OPTIONS)
    again = ProjectionStore(tmp_path).get(student, teacher, NEMO_OPTIONS, path=str(path))
    assert (again.val == found.val).all()


def test_exact_tokens_are_one_hot_again_whatever_the_file_says() -> None:
    student, teacher = byte_level(["13"]), byte_level([])
    (one, three, letter) = ids_of(student, "1", "3", "a")
    built = build_projection(student, teacher, NEMO_OPTIONS)
    topk = dense(built)
    topk.indices[letter], topk.likelihoods[letter] = [7, 8, -1, -1], [0.8333, 0.1667, 0, 0]
    topk.indices[one] = -1
    found = import_topk(topk, student=student, teacher=teacher)
    for token in (one, three, letter):
        assert row(found.projection, token) == row(built, token)
        assert found.projection.kind[token] == EXACT
    assert len(found.scaled_rows) == 0  # the noise is gone with the row
    kept = import_topk(topk, student=student, teacher=teacher, reapply_exact=False)
    assert row(kept.projection, letter) == pytest.approx({7: 0.8333, 8: 0.1667}, abs=1e-6)
    assert kept.projection.kind[letter] == MULTI
    assert row(kept.projection, one) == {teacher.size: 1.0}
    assert kept.scaled_rows.tolist() == [letter]


def test_rows_are_sorted_cut_and_normalised() -> None:
    student, teacher = byte_level(["13"]), byte_level([])
    (token,) = ids_of(student, "13")
    topk = dense(build_projection(student, teacher, NEMO_OPTIONS), k=8)
    topk.indices[token] = [10, 11, 12, -1, 13, 14, 15, 16]
    topk.likelihoods[token] = [0.1, 0.4, 0.1, 9.0, 0.0, 0.3, 0.1, 0.2]
    found = import_topk(topk, student=student, teacher=teacher).projection
    # the three entries of 0.1 compete for one place: the file's first one gets it
    assert row(found, token) == pytest.approx({11: 0.4, 14: 0.3, 16: 0.2, 10: 0.1}, abs=1e-6)
    found = import_topk(topk, student=student, teacher=teacher, top=2).projection
    assert row(found, token) == pytest.approx({11: 4 / 7, 14: 3 / 7}, abs=1e-6)


def test_load_reads_tensors_and_nothing_else(tmp_path) -> None:
    path = tmp_path / "map.pt"
    indices = torch.tensor([[1, -1], [0, 1]])
    torch.save({"indices": indices, "likelihoods": torch.ones(2, 2, dtype=torch.bfloat16)}, path)
    topk = load_topk(path)
    assert topk.indices.tolist() == indices.tolist()
    assert topk.likelihoods.dtype == np.float64
    for content in (
        [1],
        {"indices": indices},
        {"indices": indices, "likelihoods": [1.0]},
        {"indices": indices, "likelihoods": torch.ones(2, 3)},
        {"indices": indices.float(), "likelihoods": torch.ones(2, 2)},
        {"indices": indices, "likelihoods": -torch.ones(2, 2)},
        {"indices": indices, "likelihoods": torch.full((2, 2), torch.nan)},
    ):
        torch.save(content, path)
        with pytest.raises(ArtifactError, match=r"map\.pt: "):
            load_topk(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="not a readable"):
        load_topk(path)
    path.write_bytes(b"")
    with pytest.raises(ArtifactError, match="not a readable"):
        load_topk(path)


class Payload:
    """Would run code where a file is unpickled without restriction."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("1 / 0",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_run_code_is_refused(tmp_path, zipped: bool) -> None:
    path = tmp_path / "evil.pt"
    if zipped:
        torch.save({"indices": Payload(), "likelihoods": torch.ones(1, 1)}, path)
    else:
        path.write_bytes(pickle.dumps({"indices": Payload()}, protocol=2))
    with pytest.raises(ArtifactError, match="not a readable"):
        load_topk(path)


def test_files_of_other_tokenizers_are_refused() -> None:
    student, teacher = byte_level(["13"]), byte_level(["the"])
    topk = dense(build_projection(student, teacher, NEMO_OPTIONS))
    with pytest.raises(ArtifactError, match=r"the file has \d+ rows"):
        import_topk(topk, student=byte_level(["13", "14"]), teacher=teacher)
    with pytest.raises(ArtifactError, match=r"the file has \d+ rows"):
        import_topk(topk, student=byte_level([]), teacher=teacher)
    with pytest.raises(ArtifactError, match="names teacher token"):
        import_topk(topk, student=student, teacher=byte_level([]))
    # a model's table is often padded; empty rows past the last token are fine
    padded = TopK(
        indices=np.pad(topk.indices, ((0, 8), (0, 0)), constant_values=-1),
        likelihoods=np.pad(topk.likelihoods, ((0, 8), (0, 0))),
    )
    import_topk(padded, student=student, teacher=teacher)
