"""Teacher rows on the student's axis: which row, which position, which target."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mopd.align.batch import Batching, Sample, make_micro_batches
from mopd.align.boundaries import align_bytes
from mopd.align.fold import fold_rows
from mopd.align.paths import PathOptions
from mopd.align.payload import PayloadOptions, teacher_rows
from mopd.align.temper import temper
from mopd.projection import ProjectionOptions, build_projection
from mopd.tokens.vocabulary import Vocabulary
from mopd.types import Projection, Prompt, Rollout, TeacherRows, TeacherScores
from tests.helpers.vocabularies import byte_level, ids_of

PLAIN = PayloadOptions(temperature=1.0)
FAR = 1000  # listed ids encode their own teacher row: FAR + t and FAR + t + 1
EOS = 7


def scores_of(ends: list[int], *, valid: list[bool] | None = None) -> TeacherScores:
    """Row t lists FAR + t, its actual token has log-probability -2 ** t: sums tell rows apart."""
    size = len(ends)
    rows = np.arange(size)
    return TeacherScores(
        teacher="t",
        model_fingerprint="f",
        token_ids=rows.astype(np.int32),
        byte_ends=np.array(ends, dtype=np.int64),
        logprobs=-(2.0**rows).astype(np.float32),
        topk_ids=(FAR + rows[:, None] + np.arange(2)).astype(np.int32),
        topk_logprobs=np.log(np.tile([0.5, 0.25], (size, 1))).astype(np.float32),
        log_tail=np.log(np.full(size, 0.25)).astype(np.float32),
        lse=None,
        valid=np.ones(size, dtype=bool) if valid is None else np.array(valid),
    )


def rows_of(
    student: list[int],
    scores: TeacherScores,
    *,
    mask: list[bool] | None = None,
    ends_turn: bool = False,
) -> TeacherRows:
    """``student``: byte ends of its text tokens; ids are 50, 51, ..."""
    size = len(student) + ends_turn
    teacher_ends = scores.byte_ends[:-1] if ends_turn else scores.byte_ends
    return teacher_rows(
        scores,
        align_bytes(np.array(student), teacher_ends, both_end_turn=ends_turn),
        student_ids=50 + np.arange(size),
        trainable=np.ones(size, dtype=bool) if mask is None else np.array(mask),
        options=PLAIN,
    )


def listed_row(rows: TeacherRows) -> list[int]:
    """Which teacher row each boundary took."""
    assert rows.topk_ids is not None
    return (rows.topk_ids[:, 0] - FAR).tolist()


# student |a|b |cd|efg|, teacher |a|bcd: chunks 1-1, 1-n (b.. 2 tokens), n-1, n-m, end of turn
STUDENT = [1, 3, 4, 5, 7, 9]
TEACHER = [1, 2, 3, 5, 6, 9, 9]  # the last one is the end of turn


def test_each_boundary_takes_the_teacher_row_at_the_teachers_own_position() -> None:
    rows = rows_of(STUDENT, scores_of(TEACHER), ends_turn=True)
    assert rows.chunk_size.tolist() == [[1, 1], [1, 2], [2, 1], [2, 2], [1, 1]]
    assert rows.position.tolist() == [0, 1, 2, 4, 6]
    assert listed_row(rows) == [0, 1, 3, 4, 6]
    assert rows.chunk_logprob.tolist() == [-1, -2 - 4, -8, -16 - 32, -64]
    assert rows.token_position.tolist() == list(range(7))
    assert rows.token_id.tolist() == list(range(50, 57))
    assert rows.token_chunk.tolist() == [0, 1, 2, 2, 3, 3, 4]


def test_a_missing_teacher_row_masks_exactly_its_chunk() -> None:
    complete = rows_of(STUDENT, scores_of(TEACHER), ends_turn=True)
    chunk_of_row = [0, 1, 1, 2, 3, 3, 4]
    for missing, chunk in enumerate(chunk_of_row):
        valid = [t != missing for t in range(len(TEACHER))]
        rows = rows_of(STUDENT, scores_of(TEACHER, valid=valid), ends_turn=True)
        assert rows.position.tolist() == [p for c, p in enumerate([0, 1, 2, 4, 6]) if c != chunk]
        assert rows.chunk_logprob.tolist() == np.delete(complete.chunk_logprob, chunk).tolist()
        assert set(rows.token_position) == {
            p for p, c in enumerate([0, 1, 2, 2, 3, 3, 4]) if c != chunk
        }
        assert rows.token_chunk.max() == 3  # counts among the rows that are left


def test_values_of_missing_rows_do_not_reach_other_chunks() -> None:
    scores = scores_of(TEACHER, valid=[False] + [True] * 6)
    scores = replace(scores, logprobs=np.where(scores.valid, scores.logprobs, np.nan))
    rows = rows_of(STUDENT, scores, ends_turn=True)
    assert rows.chunk_logprob.tolist() == [-6, -8, -48, -64]


def test_chunks_that_begin_outside_the_loss_mask_are_dropped() -> None:
    mask = [False, True, True, True, False, True, True]
    rows = rows_of(STUDENT, scores_of(TEACHER), mask=mask, ends_turn=True)
    assert rows.position.tolist() == [1, 2, 6]
    assert listed_row(rows) == [1, 3, 6]


def test_a_response_nobody_can_spell_has_no_rows() -> None:
    rows = rows_of([2, 4], scores_of([]))
    assert len(rows.position) == len(rows.token_id) == len(rows.path_target) == 0
    assert rows.path_offsets.tolist() == [0]


@pytest.mark.parametrize("prompt", [1, 5])
def test_the_shift_happens_once_at_collate(prompt: int) -> None:
    rollout = Rollout(
        prompt=Prompt(id="p", messages=(), domain="d"),
        sample_index=0,
        prompt_ids=np.arange(prompt, dtype=np.int32),
        token_ids=np.arange(50, 57, dtype=np.int32),
        loss_mask=np.ones(7, dtype=bool),
        logprobs=np.zeros(7, dtype=np.float32),
        byte_ends=np.array([*STUDENT, 9]),
        response=b"abcdefghi",
        policy_version=0,
        finish_reason="stop",
    )
    rows = rows_of(STUDENT, scores_of(TEACHER), ends_turn=True)
    (micro,) = make_micro_batches(
        [Sample(rollout=rollout, rows={"t": rows})], batching=Batching(size=1), pad_id=0
    )
    moved = micro.rows["t"]
    # row i predicts token i + 1: the token behind a prediction row is the one it is about
    assert micro.tokens[0, moved.token_position + 1].tolist() == list(range(50, 57))
    assert micro.tokens[0, moved.position + 1].tolist() == [50, 51, 52, 54, 56]
    assert (moved.position == prompt - 1 + rows.position).all()
    assert np.flatnonzero(micro.response_mask[0]).tolist() == list(
        range(prompt - 1, prompt - 1 + 7)
    )


def test_folding_keeps_the_mass_adds_duplicates_and_sends_null_to_the_tail() -> None:
    fold = np.array([0, 0, 5, 3, 3])  # 1 -> 0, 4 -> 3, 2 -> null
    ids = np.array([[1, 2, 0, 4], [3, -1, -1, -1], [2, -1, -1, -1]], dtype=np.int32)
    probs = np.array([[0.4, 0.2, 0.1, 0.05], [0.5, 0, 0, 0], [1.0, 0, 0, 0]])
    tail = np.array([0.25, 0.5, 0.0])
    with np.errstate(divide="ignore"):
        out_ids, out, out_tail = fold_rows(ids, np.log(probs), np.log(tail), fold)
    found = [
        {int(i): float(np.exp(p)) for i, p in zip(*row, strict=True) if i >= 0}
        for row in zip(out_ids, out, strict=True)
    ]
    assert found[0] == pytest.approx({0: 0.5, 3: 0.05})
    assert found[1:] == [pytest.approx({3: 0.5}), {}]
    assert np.exp(out_tail) == pytest.approx([0.45, 0.5, 1.0])
    total = np.exp(out.astype(float)).sum(1) + np.exp(out_tail.astype(float))
    assert total == pytest.approx(1.0, abs=1e-6)


def test_folding_random_rows_conserves_mass() -> None:
    generator = np.random.default_rng(1)
    fold = generator.integers(0, 31, size=30)  # 30 is null
    ids = np.stack([generator.permutation(30)[:12] for _ in range(50)]).astype(np.int32)
    probs = np.stack([generator.dirichlet(np.full(13, 0.3)) for _ in range(50)])
    logs = np.log(probs)
    out_ids, out, tail = fold_rows(ids, logs[:, :12], logs[:, 12], fold)
    assert np.exp(out.astype(float)).sum(1) + np.exp(tail.astype(float)) == pytest.approx(1.0)
    for row in out_ids:
        kept = row[row >= 0]
        assert len(set(kept)) == len(kept)


@pytest.mark.parametrize("temperature", [0.5, 2.0, 3.0])
def test_tempering_from_log_sum_exps_equals_direct_tempering_15(temperature: float) -> None:
    logits = np.random.default_rng(0).normal(size=(6, 40)) * 3
    lse = np.stack([np.logaddexp.reduce(logits / t, axis=1) for t in (1.0, temperature)], axis=1)
    ids = np.argsort(-logits, axis=1)[:, :8]
    top = np.take_along_axis(logits, ids, axis=1)
    scores = replace(
        scores_of([1, 2, 3, 4, 5, 6]),
        topk_ids=ids.astype(np.int32),
        topk_logprobs=(top - lse[:, :1]).astype(np.float32),
        lse=lse.astype(np.float32),
    )
    tempered = temper(scores, temperature)
    listed, tail = tempered.topk, tempered.log_tail
    direct = np.exp(logits / temperature - lse[:, 1:])
    expected = np.take_along_axis(direct, ids, axis=1)
    assert np.exp(listed) == pytest.approx(expected, abs=1e-6)
    assert np.exp(tail) == pytest.approx(1 - expected.sum(1), abs=1e-6)


def test_tempering_without_log_sum_exps_is_refused() -> None:
    scores = scores_of([1])
    assert temper(scores, 1.0).topk is scores.topk_logprobs
    with pytest.raises(ValueError, match="set temperature to 1"):
        temper(scores, 2.0)


class Paths:
    """Path targets of one text, by the words of the slots."""

    def __init__(self, student: list[str], teacher: list[str]) -> None:
        self.student, self.teacher = byte_level(student), byte_level(teacher)
        self.projection: Projection = build_projection(
            self.student, self.teacher, ProjectionOptions(max_length=4, gamma=0.0)
        )

    def targets(
        self,
        written: list[str],
        heard: list[str],
        rows: list[dict[str, float]],
        **changes: Any,
    ) -> dict[int, dict[frozenset[str], float]]:
        """Student position -> {words of the slot: R}. "" is the end of turn."""
        student_ids, teacher_ids = _ids(self.student, written), _ids(self.teacher, heard)
        ids, logs = _listed(self.teacher, rows)
        with np.errstate(divide="ignore"):
            actual = [np.log(row.get(word, 0.0)) for row, word in zip(rows, heard, strict=True)]
        temperature = changes.pop("temperature", 1.0)
        scores = replace(
            scores_of([0] * len(heard)),
            token_ids=np.array(teacher_ids, dtype=np.int32),
            byte_ends=self.teacher.byte_ends(teacher_ids),
            logprobs=np.array(actual, dtype=np.float32),
            topk_ids=ids,
            topk_logprobs=logs,
            log_tail=np.full(len(heard), -np.inf, dtype=np.float32),
            **changes,
        )
        stops = written[-1] == heard[-1] == ""
        ends = [self.student.byte_ends(student_ids), scores.byte_ends]
        alignment = align_bytes(*(e[:-1] if stops else e for e in ends), both_end_turn=stops)
        result = teacher_rows(
            scores,
            alignment,
            student_ids=np.array(student_ids),
            trainable=np.ones(len(student_ids), dtype=bool),
            options=PayloadOptions(
                temperature=temperature,
                fold=self.projection.fold,
                path=PathOptions(
                    trie=self.projection.trie,
                    fold=self.projection.fold,
                    max_length=4,
                ),
            ),
        )
        found = {}
        for q, position in enumerate(result.path_position.tolist()):
            cut = slice(result.path_offsets[q], result.path_offsets[q + 1])
            found[position] = {
                self._words(result.path_entry[result.path_entry_slot == slot]): float(
                    result.path_target[slot]
                )
                for slot in range(cut.start, cut.stop)
            }
            assert sum(found[position].values()) == pytest.approx(1.0, abs=1e-6)
        return found

    def _words(self, keys: np.ndarray) -> frozenset[str]:
        trie = self.projection.trie
        ptr = trie.member_ptr
        tokens: list[int] = []
        for key in keys.tolist():
            tokens += [-1 - key] if key < 0 else trie.member_token[ptr[key] : ptr[key + 1]].tolist()
        return frozenset(self.student.token_bytes[t].decode() for t in tokens)


def _ids(vocabulary: Vocabulary, words: list[str]) -> list[int]:
    return [vocabulary.eos_id if not w else ids_of(vocabulary, w)[0] for w in words]


def _listed(vocabulary: Vocabulary, rows: list[dict[str, float]]) -> tuple[np.ndarray, np.ndarray]:
    width = max(len(row) for row in rows)
    ids = np.full((len(rows), width), -1, dtype=np.int32)
    logs = np.full((len(rows), width), -np.inf, dtype=np.float32)
    for r, row in enumerate(rows):
        ids[r, : len(row)] = _ids(vocabulary, list(row))
        logs[r, : len(row)] = np.log(list(row.values()))
    return ids, logs


class Slots(dict):
    """Compares {frozenset: float} within 1e-6."""

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, dict)
        return self.keys() == other.keys() and all(
            other[k] == pytest.approx(v, abs=1e-6) for k, v in self.items()
        )


def slots(*pairs: tuple[str, float]) -> Slots:
    """("12 123", 0.3): the words of a slot and its target."""
    return Slots({frozenset(names.split()): value for names, value in pairs})


ONE = {"1": 0.8, "3": 0.2}


def test_digits_52() -> None:
    paths = Paths(["13"], [])
    rows = [ONE, {"1": 0.02, "3": 0.9, "2": 0.08}, {"": 1.0}]
    expected = slots(("13", 0.9), ("1", 0.1))
    assert paths.targets(["13", ""], ["1", "3", ""], rows) == {0: expected}
    # the same when the student wrote the two pieces: the target is about the text
    assert paths.targets(["1", "3", ""], ["1", "3", ""], rows)[0] == expected


def test_the_end_of_turn_behind_a_path_is_a_stop() -> None:
    paths = Paths(["13"], [])
    found = paths.targets(["1", ""], ["1", ""], [ONE, {"": 0.7, "3": 0.3}])
    assert found == {0: slots(("13", 0.3), ("1", 0.7))}


def test_two_levels_along_the_text() -> None:
    paths = Paths(["12", "123"], [])
    rows = [ONE, {"2": 0.9, "1": 0.1}, {"3": 0.6, "1": 0.4}, {"": 1.0}]
    found = paths.targets(["123", ""], ["1", "2", "3", ""], rows)
    assert found == {0: slots(("123", 0.54), ("12", 0.36), ("1", 0.1))}
    # the text leaves the trie after one piece: what begins with 12 stays one slot
    aside = [ONE, {"2": 0.9, "1": 0.1}, {"": 1.0}]
    found = paths.targets(["1", "1", ""], ["1", "1", ""], aside)
    assert found[0] == slots(("12 123", 0.9), ("1", 0.1))


def test_a_level_without_a_stop_of_its_own_stops_at_the_shorter_one() -> None:
    # 123 is merged from 1 and 23, so the student writes "12" as 1, 2
    paths = Paths(["23", "123"], [])
    assert (paths.projection.trie.stop_token == -1).sum() == 1
    rows = [ONE, {"2": 0.9, "1": 0.1}, {"3": 0.6, "1": 0.4}, {"": 1.0}]
    found = paths.targets(["123", ""], ["1", "2", "3", ""], rows)
    assert found[0] == slots(("123", 0.54), ("1", 0.46))


def test_the_walk_looks_beyond_the_chunk() -> None:
    # chunk (1, 1) ends before the 3 that tells "1" from "13"
    paths = Paths(["13", "32"], [])
    rows = [ONE, {"3": 0.5, "2": 0.5}, {"2": 1.0}, {"": 1.0}]
    found = paths.targets(["1", "32", ""], ["1", "3", "2", ""], rows)
    assert found[0] == slots(("13", 0.5), ("1", 0.5))
    assert found[1] == slots(("32", 1.0), ("3", 0.0))


def test_the_walk_ends_with_the_response_and_at_a_missing_row() -> None:
    paths = Paths(["12", "123"], [])
    rows = [ONE, {"2": 0.9, "1": 0.1}, {"3": 0.6, "1": 0.4}]
    cut = paths.targets(["1", "2"], ["1", "2"], rows[:2])
    assert cut == {0: slots(("12 123", 0.9), ("1", 0.1))}  # no row behind "12": not told apart
    assert paths.targets(["1"], ["1"], rows[:1]) == {}
    valid = np.array([True, True, False])
    found = paths.targets(["1", "2", "3"], ["1", "2", "3"], rows, valid=valid)
    assert found[0] == slots(("12 123", 0.9), ("1", 0.1))
    valid = np.array([True, False, True])
    assert 0 not in paths.targets(["1", "2", "3"], ["1", "2", "3"], rows, valid=valid)


def test_a_column_of_several_teacher_tokens_is_shared_out() -> None:
    # " vi" folds onto " ": of that column's 0.6 the actual token has 0.45
    paths = Paths(["vi", "vibi", " vibi"], [" vi", "bi"])
    rows = [{" vi": 0.45, " ": 0.15, "v": 0.4}, {"bi": 0.8, "v": 0.2}, {"": 1.0}]
    found = paths.targets([" vibi", ""], [" vi", "bi", ""], rows)
    assert found[0][frozenset([" vibi"])] == pytest.approx(0.75 * 0.8, abs=1e-6)
    assert found[0][frozenset([" "])] == pytest.approx(1 - 0.75 * 0.8, abs=1e-6)


def test_shares_of_a_column_are_tempered_on_both_sides() -> None:
    paths = Paths(["vi", "vibi", " vibi"], [" vi", "bi"])
    rows = [{" vi": 0.45, " ": 0.15, "v": 0.4}, {"bi": 0.8, "v": 0.2}, {"": 1.0}]
    tau = 2.0
    lse = np.array([[0.0, np.log(sum(p ** (1 / tau) for p in row.values()))] for row in rows])
    found = paths.targets([" vibi", ""], [" vi", "bi", ""], rows, lse=lse, temperature=tau)
    share = 0.45**0.5 / (0.45**0.5 + 0.15**0.5)
    onward = 0.8**0.5 / (0.8**0.5 + 0.2**0.5)
    assert found[0][frozenset([" vibi"])] == pytest.approx(share * onward, abs=1e-5)


def test_the_same_tokenizer_has_no_paths_53() -> None:
    paths = Paths(["13"], ["13"])
    assert paths.targets(["13", ""], ["13", ""], [{"13": 0.7, "1": 0.3}, {"": 1.0}]) == {}
