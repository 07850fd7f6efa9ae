"""Answers that a run keeps: which ones, and the numbers of their chunks."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mopd.align.payload import kept_chunks
from mopd.align.tokens import TokenText, align_tokens
from mopd.demo import World
from mopd.runtime import samples as module
from mopd.runtime.gather import Gathered
from mopd.runtime.samples import SampleLog, SampleOptions, chosen, chunks_of, spelled
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Prompt, Rollout, TeacherScores


@pytest.fixture(scope="module")
def pair(tiny_world: World) -> tuple[ChatTokenizer, ChatTokenizer]:
    return (
        ChatTokenizer.load(tiny_world.student),
        ChatTokenizer.load(tiny_world.teachers["sort"]),
    )


def rollout(student: ChatTokenizer, data: bytes, *, sample: int = 0, domain: str = "d") -> Rollout:
    ids = np.array([*student.vocabulary.encode(data), student.eos_id], dtype=np.int32)
    return Rollout(
        prompt=Prompt(id="p", messages=({"role": "user", "content": "q"},), domain=domain),
        sample_index=sample,
        prompt_ids=np.zeros(1, dtype=np.int32),
        token_ids=ids,
        loss_mask=np.ones(len(ids), dtype=bool),
        logprobs=np.linspace(-1.0, -2.0, len(ids), dtype=np.float32),
        byte_ends=student.vocabulary.byte_ends(ids),
        response=data,
        policy_version=0,
        finish_reason="stop",
        reward=1.0,
    )


def scores(teacher: ChatTokenizer, data: bytes) -> TeacherScores:
    ids = np.array([*teacher.vocabulary.encode(data), teacher.eos_id], dtype=np.int32)
    return TeacherScores(
        teacher="t",
        model_fingerprint="f",
        token_ids=ids,
        byte_ends=teacher.vocabulary.byte_ends(ids),
        logprobs=np.linspace(-3.0, -5.0, len(ids), dtype=np.float32),
        topk_ids=None,
        topk_logprobs=np.zeros((len(ids), 1), dtype=np.float32),
        log_tail=np.zeros(len(ids), dtype=np.float32),
        lse=None,
        valid=np.ones(len(ids), dtype=bool),
    )


def aligned(pair: tuple[ChatTokenizer, ChatTokenizer], answer: Rollout, said: TeacherScores) -> Any:
    return align_tokens(
        TokenText(
            ids=answer.token_ids[:-1],
            vocabulary=pair[0].vocabulary,
            byte_ends=answer.byte_ends[:-1],
        ),
        TokenText(
            ids=said.token_ids[:-1], vocabulary=pair[1].vocabulary, byte_ends=said.byte_ends[:-1]
        ),
        both_end_turn=True,
    )


def chunks(pair: tuple[ChatTokenizer, ChatTokenizer], answer: Rollout, said: TeacherScores) -> list:
    return list(chunks_of(answer, said, aligned(pair, answer, said)))


def test_chunks_cover_both_sides_and_add_up(pair: tuple[ChatTokenizer, ChatTokenizer]) -> None:
    answer, said = rollout(pair[0], b"12345 67"), scores(pair[1], b"12345 67")
    found = chunks(pair, answer, said)
    assert len({chunk["kind"] for chunk in found}) > 1
    for side, size in (("student", len(answer.token_ids)), ("teacher", len(said.token_ids))):
        edges = [chunk[side] for chunk in found]
        assert edges[0][0] == 0 and edges[-1][1] == size
        assert all(a[1] == b[0] for a, b in pairwise(edges))
    total = sum(chunk["divergence"] for chunk in found)
    assert total == pytest.approx(float(answer.logprobs.sum() - said.logprobs.sum()), rel=1e-4)
    for chunk in found:
        (a, b), (c, d) = chunk["student"], chunk["teacher"]
        alone = float(answer.logprobs[a:b].sum() - said.logprobs[c:d].sum())
        assert chunk["divergence"] == pytest.approx(alone, rel=1e-4)
        one, other = ("1" if b - a == 1 else "n"), ("1" if d - c == 1 else "n")
        assert chunk["kind"] == {"nn": "n-m"}.get(one + other, f"{one}-{other}")


def test_unknown_numbers_are_null_in_their_chunk_alone(
    pair: tuple[ChatTokenizer, ChatTokenizer],
) -> None:
    answer, said = rollout(pair[0], b"12345 67"), scores(pair[1], b"12345 67")
    said.valid[0] = False
    answer.logprobs[-1] = np.nan
    known = [chunk["divergence"] is not None for chunk in chunks(pair, answer, said)]
    assert known[0] is False and known[-1] is False and all(known[1:-1])


def test_untrained_and_unaligned_tokens_are_masked(
    pair: tuple[ChatTokenizer, ChatTokenizer],
) -> None:
    answer = rollout(pair[0], b"12345 67")
    answer.loss_mask[0] = False
    found = chunks(pair, answer, scores(pair[1], b"12345 6"))  # the teacher's text is cut
    assert found[0]["kind"] == "masked" and found[0]["divergence"] is None
    assert found[-1]["kind"] == "masked" and found[-1]["divergence"] is None
    assert found[-1]["student"][1] == len(answer.token_ids)
    assert all(chunk["kind"] != "masked" for chunk in found[1:-1])


def test_tokens_that_are_no_text(pair: tuple[ChatTokenizer, ChatTokenizer]) -> None:
    student = pair[0]
    ids = [*student.vocabulary.encode("é1".encode()), student.eos_id, student.vocabulary.size + 3]
    found = spelled(student, np.array(ids))
    assert found[-3] == "1" and found[-2] == {"special": student.eos_text}
    assert found[-1] == {"special": f"id {student.vocabulary.size + 3}"}
    data = b"".join(
        t.encode() if isinstance(t, str) else bytes.fromhex(t["hex"]) for t in found[:-2]
    )
    assert data == "é1".encode()
    assert any(isinstance(token, dict) and "hex" in token for token in found[:-3])


def test_first_answers_of_prompts_come_before_second_ones(
    pair: tuple[ChatTokenizer, ChatTokenizer],
) -> None:
    keys = [(0, "a"), (1, "a"), (0, "a"), (1, "a"), (0, "b")]
    answers = [rollout(pair[0], b"1", sample=sample, domain=domain) for sample, domain in keys]
    assert chosen(answers, 2) == [0, 2, 4]
    assert chosen(answers, 3) == [0, 1, 2, 4]


def log(
    path: Path, pair: tuple[ChatTokenizer, ChatTokenizer], *, interval: int = 4, steps: int = 10
) -> SampleLog:
    options = SampleOptions(interval=interval, per_domain=1, num_steps=steps)
    return SampleLog(path, student=pair[0], teachers={"t": pair[1]}, options=options)


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def fill(own: SampleLog, pair: tuple[ChatTokenizer, ChatTokenizer], steps: range) -> None:
    answer, said = rollout(pair[0], b"123"), scores(pair[1], b"123")
    for step in steps:
        gathered = Gathered(step=step, rollouts=[answer], scores=[{"t": said}])
        own.log(gathered, lambda a, s: aligned(pair, a, s))
    own.close()


def test_steps_that_are_kept(tmp_path: Path, pair: tuple[ChatTokenizer, ChatTokenizer]) -> None:
    path = tmp_path / "samples.jsonl"
    fill(log(path, pair), pair, range(10))
    assert [record["step"] for record in written(path)] == [0, 4, 8, 9]
    first = written(path)[0]
    assert first["answer"] == "123" and first["correct"] is True and first["domain"] == "d"
    assert first["teachers"]["t"]["chunks"][-1]["kind"] == "1-1"


def test_a_start_from_a_checkpoint_writes_them_again(
    tmp_path: Path, pair: tuple[ChatTokenizer, ChatTokenizer]
) -> None:
    path, whole = tmp_path / "samples.jsonl", tmp_path / "whole.jsonl"
    fill(log(whole, pair), pair, range(10))
    fill(log(path, pair), pair, range(10))
    path.write_text(path.read_text() + '{"step": 9, "torn')
    again = log(path, pair)
    again.truncate_from(6)
    assert [record["step"] for record in written(path)] == [0, 4]
    fill(again, pair, range(6, 10))
    assert path.read_text() == whole.read_text()


def test_no_file_before_there_is_an_answer(
    tmp_path: Path, pair: tuple[ChatTokenizer, ChatTokenizer]
) -> None:
    own = log(tmp_path / "samples.jsonl", pair)
    own.truncate_from(0)
    own.close()
    assert not (tmp_path / "samples.jsonl").exists()


def test_long_answers_are_cut(
    tmp_path: Path,
    pair: tuple[ChatTokenizer, ChatTokenizer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_TOKENS", 4)
    answer, said = rollout(pair[0], b"12345 67 89"), scores(pair[1], b"12345 67 89")
    own = log(tmp_path / "samples.jsonl", pair)
    gathered = Gathered(step=0, rollouts=[answer], scores=[{"t": said}])
    own.log(gathered, lambda a, s: aligned(pair, a, s))
    own.close()
    (record,) = written(tmp_path / "samples.jsonl")
    assert len(record["tokens"]) == 4 and record["omitted"] == len(answer.token_ids) - 4
    judged = record["teachers"]["t"]
    assert all(chunk["student"][1] <= 4 for chunk in judged["chunks"])
    assert len(judged["tokens"]) == judged["chunks"][-1]["teacher"][1] < len(said.token_ids)


def test_answers_without_a_judge_are_kept(
    tmp_path: Path, pair: tuple[ChatTokenizer, ChatTokenizer]
) -> None:
    answer = rollout(pair[0], b"\xff1")
    dropped = replace(answer, loss_mask=np.zeros_like(answer.loss_mask), reward=None)
    own = log(tmp_path / "samples.jsonl", pair)
    own.log(Gathered(step=0, rollouts=[dropped], scores=[{}]), lambda a, s: aligned(pair, a, s))
    own.close()
    (record,) = written(tmp_path / "samples.jsonl")
    assert record["trained"] is False and record["correct"] is None and record["teachers"] == {}
    assert record["answer"] == "\\xff1"


def byte_by_byte(student: ChatTokenizer, data: bytes) -> Rollout:
    ids = [student.vocabulary.by_bytes[bytes([byte])] for byte in data]
    token_ids = np.array([*ids, student.eos_id], dtype=np.int32)
    return replace(
        rollout(student, data),
        token_ids=token_ids,
        loss_mask=np.ones(len(token_ids), dtype=bool),
        logprobs=np.linspace(-1.0, -2.0, len(token_ids), dtype=np.float32),
        byte_ends=student.vocabulary.byte_ends(token_ids),
    )


def test_a_chunk_that_the_loss_drops_is_masked(
    pair: tuple[ChatTokenizer, ChatTokenizer], tmp_path: Path
) -> None:
    """One untrained token or one missing row is enough, and so is what the aligner leaves out."""
    whole = [piece for piece in pair[1].vocabulary.by_bytes if piece.isalnum() and len(piece) > 1]
    answer, said = byte_by_byte(pair[0], whole[0]), scores(pair[1], whole[0])
    every = chunks(pair, answer, said)
    dropped = [c for c in every if c["student"][1] - c["student"][0] > 1]
    assert dropped, "the text needs a chunk of two student tokens"
    answer.loss_mask[dropped[0]["student"][1] - 1] = False
    said.valid[every[-1]["teacher"][0]] = False
    kept = kept_chunks(said, aligned(pair, answer, said).alignment, answer.loss_mask)
    assert kept.sum() == len(every) - 2
    found = chunks(pair, answer, said)
    assert [c["kind"] != "masked" for c in found] == kept.tolist()
    with closing(log(tmp_path / "samples.jsonl", pair)) as own:
        own.log(
            Gathered(step=0, rollouts=[answer], scores=[{"t": said}]),
            lambda one, its: aligned(pair, one, its),
            trained=lambda one: np.zeros(len(one.token_ids), dtype=bool),
        )
    (record,) = written(tmp_path / "samples.jsonl")
    assert not record["trained"]
    assert {c["kind"] for c in record["teachers"]["t"]["chunks"]} == {"masked"}
