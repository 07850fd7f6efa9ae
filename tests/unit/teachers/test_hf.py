"""Teachers' scores against a plain forward pass, and what teachers are given to read."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mopd.demo import World
from mopd.rollout.base import make_rollout
from mopd.serving.generation import Generated
from mopd.serving.models import load_causal_lm
from mopd.teachers.base import teacher_input
from mopd.teachers.hf import HfOptions, HfTeacher
from mopd.teachers.pool import TeacherPool
from mopd.teachers.uniform import UniformTeacher
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Prompt, Rollout, TeacherScores

CPU = torch.device("cpu")
TAU = 2.0


@pytest.fixture(scope="module")
def student(tiny_world: World) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_world.student)


@pytest.fixture(scope="module")
def other(tiny_world: World) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_world.teachers["sort"])


def make_teacher(
    tiny_world: World, student: ChatTokenizer, *, top_k: int | None = 16, batch_size: int = 2
) -> HfTeacher:
    path = tiny_world.teachers["sort"]
    return HfTeacher(
        "sort",
        path,
        tokenizer=ChatTokenizer.load(path),
        student=student,
        device=CPU,
        options=HfOptions(top_k=top_k, temperature=TAU, batch_size=batch_size),
    )


def rollout(
    student: ChatTokenizer,
    response: bytes,
    *,
    stopped: bool = True,
    ids: list[int] | None = None,
    teachers: tuple[str, ...] = ("sort",),
    content: str = "bo 12 ka",
) -> Rollout:
    ids = student.vocabulary.encode(response) if ids is None else ids
    token_ids = np.array([*ids, *([student.eos_id] if stopped else [])], dtype=np.int32)
    prompt = Prompt(
        id="p",
        messages=({"role": "user", "content": content},),
        domain="sort",
        teachers=teachers,
    )
    return make_rollout(
        prompt,
        Generated(
            token_ids=token_ids,
            logprobs=np.zeros(len(token_ids), dtype=np.float32),
            stopped=stopped,
        ),
        tokenizer=student,
        prompt_ids=student.prompt_ids(prompt.messages),
        sample_index=0,
        version=0,
    )


def direct(tiny_world: World, scores: TeacherScores, prompt: np.ndarray, size: int) -> torch.Tensor:
    """[T, V] logits that predict the scored tokens, one sequence at a time."""
    model = load_causal_lm(tiny_world.teachers["sort"], device=CPU)
    ids = np.concatenate([prompt, scores.token_ids]).astype(np.int64)
    with torch.no_grad():
        logits = model(input_ids=torch.as_tensor(ids)[None]).logits[0]
    return logits[len(prompt) - 1 : -1, :size].double()


def test_row_t_predicts_token_t(tiny_world: World, student: ChatTokenizer) -> None:
    teacher = make_teacher(tiny_world, student)
    rollouts = [
        rollout(student, b"bo 12", content="a much longer prompt than the others have"),
        rollout(student, b""),
        rollout(student, b"bo ka bo ka vi 1 2 3", stopped=False),
    ]
    found = teacher.score(rollouts)
    for scores, each in zip(found, rollouts, strict=True):
        prompt = teacher.tokenizer.prompt_ids(each.prompt.messages)
        size = teacher.tokenizer.vocabulary.size
        logits = direct(tiny_world, scores, prompt, size)
        logs = torch.log_softmax(logits, dim=-1)
        assert scores.valid.all() and len(scores.valid) == len(scores.token_ids)
        actual = logs.numpy()[np.arange(len(logs)), scores.token_ids]
        assert scores.logprobs == pytest.approx(actual, abs=2e-5)
        assert scores.topk_ids is not None
        listed = np.take_along_axis(logs.numpy(), scores.topk_ids.astype(np.int64), axis=1)
        assert scores.topk_logprobs == pytest.approx(listed, abs=2e-5)
        assert scores.topk_logprobs == pytest.approx(logs.topk(16).values.numpy(), abs=2e-5)
        assert np.exp(scores.log_tail) == pytest.approx(1 - np.exp(listed).sum(1), abs=1e-5)
        assert scores.lse is not None
        lse = torch.stack([torch.logsumexp(logits / t, dim=-1) for t in (1.0, TAU)], dim=1)
        assert scores.lse == pytest.approx(lse.numpy(), abs=2e-5)
    assert found[1].token_ids.tolist() == [teacher.tokenizer.eos_id]


def test_the_batch_and_its_order_change_nothing(tiny_world: World, student: ChatTokenizer) -> None:
    rollouts = [rollout(student, text) for text in (b"bo", b"ka vi 12345", b"x y", b"9 8 7")]
    alone = make_teacher(tiny_world, student, batch_size=1).score(rollouts)
    together = make_teacher(tiny_world, student, batch_size=3).score(rollouts[::-1])[::-1]
    for one, two in zip(alone, together, strict=True):
        assert one.token_ids.tolist() == two.token_ids.tolist()
        assert one.logprobs == pytest.approx(two.logprobs, abs=2e-5)
        assert one.model_fingerprint == two.model_fingerprint


def test_the_whole_vocabulary_leaves_no_tail(tiny_world: World, student: ChatTokenizer) -> None:
    (scores,) = make_teacher(tiny_world, student, top_k=10**6).score([rollout(student, b"bo")])
    assert np.isneginf(scores.log_tail).all()
    assert np.exp(scores.topk_logprobs).sum(1) == pytest.approx(1.0, abs=1e-5)


def test_another_tokenizer_reads_its_own_tokens_of_the_bytes(
    student: ChatTokenizer, other: ChatTokenizer
) -> None:
    each = rollout(student, b"bo ka 1379 vi")
    read = teacher_input(each, other, student=student)
    assert read.token_ids.tolist() == [*other.vocabulary.encode(each.response), other.eos_id]
    assert read.byte_ends[-1] == len(each.response)
    assert read.prompt_ids.tolist() == other.prompt_ids(each.prompt.messages).tolist()
    assert other.vocabulary.fingerprint != student.vocabulary.fingerprint


def test_the_students_own_tokenizer_reads_the_students_ids(student: ChatTokenizer) -> None:
    letters = [student.vocabulary.by_bytes[bytes([b])] for b in b"bo ka"]
    assert letters != student.vocabulary.encode(b"bo ka")
    each = rollout(student, b"", ids=letters)
    read = teacher_input(each, student, student=student)
    assert read.token_ids.tolist() == [*letters, student.eos_id]
    assert read.byte_ends.tolist() == each.byte_ends.tolist()


HALF = "\u00e9".encode()[:1]


def test_a_cut_character_is_dropped_only_where_the_answer_was_cut(
    student: ChatTokenizer, other: ChatTokenizer
) -> None:
    cut = teacher_input(rollout(student, b"bo" + HALF, stopped=False), other, student=student)
    assert other.vocabulary.decode(cut.token_ids) == b"bo"
    only = teacher_input(rollout(student, HALF, stopped=False), other, student=student)
    assert len(only.token_ids) == 0
    ended = teacher_input(rollout(student, b"bo" + HALF), other, student=student)
    assert other.vocabulary.decode(ended.token_ids) == b"bo" + HALF
    assert ended.token_ids[-1] == other.eos_id


@pytest.mark.parametrize("response", [b"bo\xff\xfe ka", b"\x80", HALF + b"x"])
def test_invalid_bytes_are_scored(
    tiny_world: World, student: ChatTokenizer, response: bytes
) -> None:
    each = rollout(student, response)
    assert each.response == response
    (scores,) = make_teacher(tiny_world, student).score([each])
    assert scores.valid.all()
    assert scores.byte_ends[-1] == len(response)
    assert np.isfinite(scores.logprobs).all()


def test_a_batch_of_nothing_to_score(tiny_world: World, student: ChatTokenizer) -> None:
    nothing = rollout(student, HALF, stopped=False)
    found = make_teacher(tiny_world, student).score([nothing, nothing, rollout(student, b"bo")])
    assert [len(scores.valid) for scores in found[:2]] == [0, 0]
    assert found[0].topk_ids is not None and found[0].topk_ids.shape == (0, 16)
    assert len(found[2].valid) > 0


@pytest.mark.parametrize("top_k", [5, 10**6])
def test_the_uniform_teacher(student: ChatTokenizer, other: ChatTokenizer, top_k: int) -> None:
    teacher = UniformTeacher("sort", tokenizer=other, student=student, top_k=top_k)
    (scores,) = teacher.score([rollout(student, b"bo ka")])
    size = other.vocabulary.size
    assert scores.logprobs == pytest.approx(-np.log(size))
    mass = np.exp(scores.topk_logprobs).sum(1) + np.exp(scores.log_tail)
    assert mass == pytest.approx(1.0, abs=1e-5)
    assert scores.topk_ids is not None
    assert scores.topk_ids.shape == (len(scores.token_ids), min(top_k, size))
    assert scores.token_ids.tolist() == [*other.vocabulary.encode(b"bo ka"), other.eos_id]


def test_the_pool_asks_the_teachers_a_prompt_names(student: ChatTokenizer) -> None:
    teachers = {
        name: UniformTeacher(name, tokenizer=student, student=student, top_k=2)
        for name in ("a", "b")
    }
    rollouts = [
        rollout(student, b"1", teachers=("b", "a")),
        rollout(student, b"22", teachers=("b",)),
        rollout(student, b"333", teachers=("a",)),
    ]
    found = TeacherPool(teachers).score(rollouts)
    assert [list(scores) for scores in found] == [["a", "b"], ["b"], ["a"]]
    for scores, each in zip(found, rollouts, strict=True):
        assert all(s.token_ids.tolist() == each.token_ids.tolist() for s in scores.values())
        assert all(s.teacher == name for name, s in scores.items())


def test_without_a_top_k_the_whole_row_is_sent(tiny_world: World, student: ChatTokenizer) -> None:
    rollouts = [rollout(student, b"bo 12"), rollout(student, HALF, stopped=False)]
    whole = make_teacher(tiny_world, student, top_k=None)
    size = whole.tokenizer.vocabulary.size
    found, nothing = whole.score(rollouts)
    assert found.topk_ids is None and nothing.topk_ids is None
    assert nothing.topk_logprobs.shape == (0, size)
    assert found.topk_logprobs.dtype == np.float32
    prompt = whole.tokenizer.prompt_ids(rollouts[0].prompt.messages)
    logits = direct(tiny_world, found, prompt, size)
    expected = torch.log_softmax(logits, dim=-1).numpy()
    assert found.topk_logprobs == pytest.approx(expected, abs=2e-5)
    assert np.isneginf(found.log_tail).all()
    (some,) = make_teacher(tiny_world, student).score(rollouts[:1])
    assert found.lse == pytest.approx(some.lse, abs=2e-5)
    assert found.logprobs == pytest.approx(some.logprobs, abs=2e-5)


def test_the_uniform_teacher_can_send_whole_rows(
    student: ChatTokenizer, other: ChatTokenizer
) -> None:
    teacher = UniformTeacher("sort", tokenizer=other, student=student, top_k=None)
    (scores,) = teacher.score([rollout(student, b"bo ka")])
    assert scores.topk_ids is None
    assert scores.topk_logprobs.shape == (len(scores.token_ids), other.vocabulary.size)
    assert np.isneginf(scores.log_tail).all()
