"""Replies on disk: read back bit by bit, bounded, compared, and refused when damaged."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mopd.errors import ArtifactError
from mopd.serving import replies as replies_module
from mopd.serving.replies import Replies, ReplyJournal
from mopd.types import Rollout, TeacherScores
from tests.unit.serving.test_journal import rollout

ARRAYS = ("token_ids", "byte_ends", "logprobs", "topk_ids", "topk_logprobs", "log_tail", "valid")


def scores(
    name: str, size: int, *, k: int = 3, listed: bool = True, lse: bool = True, seed: int = 0
) -> TeacherScores:
    random = np.random.default_rng([seed, size, k])
    floats = random.normal(size=(4, size)).astype(np.float32)
    return TeacherScores(
        teacher=name,
        model_fingerprint=f"model of {name}",
        token_ids=random.integers(0, 99, size).astype(np.int32),
        byte_ends=np.arange(size, dtype=np.int64),
        logprobs=floats[0],
        topk_ids=random.integers(0, 99, (size, k)).astype(np.int32) if listed else None,
        topk_logprobs=np.where(random.random((size, k)) < 0.1, -np.inf, 0.5).astype(np.float32),
        log_tail=floats[1],
        lse=np.stack([floats[2], floats[3]], axis=1) if lse else None,
        valid=random.random(size) < 0.7,
    )


STEP = [
    {"a": scores("a", 4), "b": scores("b", 2, k=5, listed=False, lse=False)},
    {},
    {"b": scores("b", 0, k=5, listed=False, lse=False)},
    {"a": scores("a", 1, k=2)},
]


ANSWERS = [rollout(name) for name in "pqrs"]
MISSING = {"missing/a/mass": 3}


def replies(scores: list[dict[str, TeacherScores]]) -> Replies:
    return Replies(scores=scores, missing=MISSING)


def journal(folder: Path, *, level: str = "full", max_bytes: float = 1e9) -> ReplyJournal:
    return ReplyJournal(folder, 0, level=level, max_bytes=max_bytes)  # type: ignore[arg-type]


def same(one: TeacherScores, two: TeacherScores) -> bool:
    pairs = [(getattr(one, key), getattr(two, key)) for key in (*ARRAYS, "lse")]
    return one.model_fingerprint == two.model_fingerprint and all(
        (a is None and b is None) or (a.dtype == b.dtype and a.tobytes() == b.tobytes())
        for a, b in pairs
    )


def test_a_step_is_read_back_bit_by_bit_after_a_restart(tmp_path: Path) -> None:
    journal(tmp_path).append(7, ANSWERS, replies(STEP))
    found = journal(tmp_path).read(7, ANSWERS)
    assert found is not None and found.missing == MISSING
    assert [set(one) for one in found.scores] == [set(one) for one in STEP]
    for before, after in zip(STEP, found.scores, strict=True):
        assert all(same(before[name], after[name]) for name in before)
    assert journal(tmp_path).read(8, ANSWERS) is None


def test_a_step_without_any_reply_is_read_back(tmp_path: Path) -> None:
    journal(tmp_path).append(0, ANSWERS[:2], replies([{}, {}]))
    found = journal(tmp_path).read(0, ANSWERS[:2])
    assert found is not None and found.scores == [{}, {}]


@pytest.mark.parametrize("level", ["full", "digest"])
def test_replies_to_other_answers_are_not_taken(tmp_path: Path, level: str) -> None:
    journal(tmp_path, level=level).append(0, ANSWERS, replies(STEP))
    again = journal(tmp_path, level=level)
    changed = replace(ANSWERS[3], token_ids=ANSWERS[3].token_ids + 1)
    others: list[list[Rollout]] = [ANSWERS[:2], ANSWERS[::-1], [*ANSWERS[:3], changed]]
    for answers in others:
        assert again.read(0, answers) is None
        assert again.compare(0, answers, STEP[: len(answers)]) is None
    assert again.compare(0, ANSWERS, STEP) is not None


def test_what_one_thread_appends_while_another_prunes_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = journal(tmp_path, level="digest")
    written.append(0, ANSWERS[:1], replies([{}]))
    appender = threading.Thread(target=written.append, args=(1, ANSWERS[:1], replies([{}])))
    write = replies_module._write

    def slow(path: Path, content: bytes) -> None:
        appender.start()
        appender.join(timeout=0.3)  # with a lock it waits for us
        write(path, content)

    monkeypatch.setattr(replies_module, "_write", slow)
    written.prune(0)
    appender.join(timeout=10.0)
    again = journal(tmp_path, level="digest")
    assert all(again.compare(step, ANSWERS[:1], [{}]) is not None for step in (0, 1))


@pytest.mark.parametrize("place", [3, 40, -1])
def test_a_changed_byte_is_seen(tmp_path: Path, place: int) -> None:
    journal(tmp_path).append(0, ANSWERS, replies(STEP))
    (path,) = (tmp_path / "replies-0").iterdir()
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="damaged; delete it"):
        journal(tmp_path).read(0, ANSWERS)
    path.unlink()  # the remedy
    assert journal(tmp_path).read(0, ANSWERS) is None


def test_digests_tell_how_far_a_new_score_is(tmp_path: Path) -> None:
    journal(tmp_path, level="digest").append(0, ANSWERS, replies(STEP))
    again = journal(tmp_path, level="digest")
    assert again.read(0, ANSWERS) is None and again.num_bytes == 0
    equal = again.compare(0, ANSWERS, STEP)
    assert equal is not None and (equal.other_tokens, equal.nats) == (0, 0.0)
    moved = [dict(one) for one in STEP]
    for rows in (moved[0]["a"], moved[3]["a"]):
        rows.valid[:] = True
    other = journal(tmp_path, level="digest")
    other.append(0, ANSWERS, replies(moved))
    moved[0]["a"].logprobs[0] += 0.25
    found = other.compare(0, ANSWERS, moved)
    assert found is not None and found.nats == pytest.approx(0.25, abs=1e-3)
    moved[0]["a"].token_ids[0] += 1
    found = other.compare(0, ANSWERS, moved)
    assert found is not None and found.other_tokens == 1
    assert again.compare(5, ANSWERS, STEP) is None


def test_the_disk_bound_leaves_digests(tmp_path: Path) -> None:
    journal(tmp_path / "one").append(0, ANSWERS, replies(STEP))
    size = journal(tmp_path / "one").num_bytes
    bounded = journal(tmp_path, max_bytes=2.5 * size)
    for step in range(4):
        bounded.append(step, ANSWERS, replies(STEP))
    assert bounded.num_bytes == 2 * size
    assert [bounded.read(step, ANSWERS) is not None for step in range(4)] == [
        True,
        True,
        False,
        False,
    ]
    assert bounded.compare(3, ANSWERS, STEP) is not None
    bounded.prune(1)
    assert bounded.num_bytes == size and bounded.read(0, ANSWERS) is None
    bounded.append(4, ANSWERS, replies(STEP))
    again = journal(tmp_path, max_bytes=2.5 * size)
    assert again.read(4, ANSWERS) is not None and again.compare(0, ANSWERS, STEP) is None


def test_nothing_is_written_when_off(tmp_path: Path) -> None:
    off = journal(tmp_path, level="off")
    off.append(0, ANSWERS, replies(STEP))
    off.prune(0)
    assert off.read(0, ANSWERS) is None and off.compare(0, ANSWERS, STEP) is None
    assert list(tmp_path.iterdir()) == []


def test_a_note_that_a_crash_cut_is_dropped(tmp_path: Path) -> None:
    journal(tmp_path).append(0, ANSWERS, replies(STEP))
    path = tmp_path / "replies-0.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:20])
    again = journal(tmp_path)
    again.append(1, ANSWERS, replies(STEP))
    assert (
        journal(tmp_path).read(1, ANSWERS) is not None
        and journal(tmp_path).read(0, ANSWERS) is not None
    )


def test_a_step_that_no_teacher_was_asked_about(tmp_path: Path) -> None:
    nobody: list[dict[str, TeacherScores]] = [{} for _ in ANSWERS]
    journal(tmp_path).append(3, ANSWERS, Replies(scores=nobody, missing={}))
    found = journal(tmp_path).read(3, ANSWERS)
    assert found is not None and found.scores == nobody
