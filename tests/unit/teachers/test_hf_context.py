"""A transformers teacher whose context ends before the answer does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mopd.demo import World
from mopd.teachers.base import Bounded, Counting
from mopd.teachers.hf import HfOptions, HfTeacher
from mopd.tokens.chat import ChatTokenizer
from tests.helpers.stub_scorers import PrefixScorer
from tests.helpers.stub_server import StubOptions, StubServer
from tests.helpers.teachers import make_rollout_of, remote_teacher

CONTEXT = 24


@pytest.fixture(scope="module")
def student(tiny_world: World) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_world.student)


@pytest.fixture(scope="module")
def model(student: ChatTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Learned positions: there is nothing behind the last one."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("gpt2")
    size = student.vocabulary.size
    config = GPT2Config(
        vocab_size=size, n_positions=CONTEXT, n_embd=16, n_layer=1, n_head=2, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(path)
    text = (path / "config.json").read_text()
    (path / "config.json").write_text(
        text.replace("{", f'{{"max_position_embeddings": {CONTEXT},', 1)
    )
    return path


@pytest.fixture(params=[8, None])
def teacher(request: pytest.FixtureRequest, model: Path, student: ChatTokenizer) -> HfTeacher:
    return HfTeacher(
        "sort",
        model,
        tokenizer=student,
        student=student,
        device=torch.device("cpu"),
        options=HfOptions(top_k=request.param, temperature=1.0, batch_size=2),
    )


def test_what_is_beyond_the_context_is_missing_and_counted(
    teacher: HfTeacher, student: ChatTokenizer
) -> None:
    assert isinstance(teacher, Counting) and isinstance(teacher, Bounded)
    short = make_rollout_of(student, b"bo", content="a")
    long = make_rollout_of(student, b"1 2 3 4 5 6 7 8 9 10 11 12 13 14 15", content="a")
    full = make_rollout_of(student, b"bo", content="1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16")
    prompt, total = len(long.prompt_ids), len(long.token_ids)
    room = CONTEXT - prompt
    assert 0 < room < total and len(full.prompt_ids) > CONTEXT
    whole, part, none = teacher.score([short, long, full])
    assert whole.valid.all()
    assert part.valid.tolist() == [True] * room + [False] * (total - room)
    assert np.isnan(part.logprobs[room:]).all() and np.isfinite(part.logprobs[:room]).all()
    assert part.topk_logprobs.shape[0] == total and np.isnan(part.topk_logprobs[room:]).all()
    assert part.token_ids.tolist() == long.token_ids.tolist()
    assert part.lse is not None and part.lse.shape == (total, 2)
    if part.topk_ids is not None:
        assert (part.topk_ids[room:] == -1).all()
    assert not none.valid.any() and len(none.valid) == len(full.token_ids)
    missing = total - room + len(full.token_ids)
    assert teacher.drain() == {"missing": {"context": missing}}
    assert teacher.drain() == {"missing": {}}
    (alone,) = teacher.score([replace(long, token_ids=long.token_ids[:room])])
    assert alone.logprobs == pytest.approx(part.logprobs[:room], abs=1e-5)


def test_answers_end_with_the_context(teacher: HfTeacher, student: ChatTokenizer) -> None:
    prompts = [
        make_rollout_of(student, b"", content=content).prompt
        for content in ("a", "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16", "1 2 3")
    ]
    keys = ["k0", "k1", "k2"]
    found = teacher.write(prompts, keys, max_new_tokens=64, temperature=1.0)
    assert found[1] == (b"", False)
    for prompt, key, one in zip(prompts, keys, found, strict=True):
        assert teacher.write([prompt], [key], max_new_tokens=64, temperature=1.0) == [one]
    checkable = [replace(prompt, answer="no") for prompt in prompts]
    assert teacher.accuracy(checkable, max_new_tokens=64) == 0.0


def test_servers_are_not_asked_to_write_more_than_they_take(student: ChatTokenizer) -> None:
    options = StubOptions(max_model_len=130)
    with StubServer(PrefixScorer(student.vocabulary.size), options) as stub:
        teacher = remote_teacher([stub.url], tokenizer=student, student=student)
        assert teacher.max_length == 129
        prompts = [
            make_rollout_of(student, b"", content=content).prompt for content in ("a", "1 " * 150)
        ]
        began = len(stub.requests)
        texts = teacher.write(prompts, ["a", "b"], max_new_tokens=200, temperature=1.0)  # type: ignore
        sent = [request for request in stub.requests[began:] if "max_tokens" in request]
        own = [request for request in sent if request.get("stop_token_ids")]
        room = 129 - len(student.prompt_ids(prompts[0].messages))
        assert [request["max_tokens"] for request in own] == [room]
        assert texts[1] == (b"", False)
        teacher.close()
