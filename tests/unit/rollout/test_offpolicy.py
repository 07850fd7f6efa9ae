"""Answers of others: which prompts get them, and what they are made of."""

from __future__ import annotations

import numpy as np
import pytest

from mopd.demo import World
from mopd.rollout.offpolicy import is_on_policy, written_rollout
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Prompt, Rollout


def prompt(number: int) -> Prompt:
    message = {"role": "user", "content": f"bo {number}"}
    return Prompt(id=str(number), messages=(message,), domain="sort", answer="1 2")


@pytest.mark.parametrize("lmbda", [0.0, 0.3, 0.5, 1.0])
def test_the_share_is_lmbda_and_the_draw_depends_on_seed_prompt_and_step_alone(
    lmbda: float,
) -> None:
    prompts = [prompt(n) for n in range(2000)]
    drawn = [is_on_policy(p, step=3, seed=1, lmbda=lmbda) for p in prompts]
    assert np.mean(drawn) == pytest.approx(lmbda, abs=0.04)
    again = [is_on_policy(p, step=3, seed=1, lmbda=lmbda) for p in reversed(prompts)]
    assert again[::-1] == drawn
    if 0.0 < lmbda < 1.0:
        for other in ({"step": 4, "seed": 1}, {"step": 3, "seed": 2}):
            assert [is_on_policy(p, lmbda=lmbda, **other) for p in prompts] != drawn
        more = [is_on_policy(p, step=3, seed=1, lmbda=0.9) for p in prompts]
        assert all(b for a, b in zip(drawn, more, strict=True) if a)


@pytest.fixture(scope="module")
def student(tiny_world: World) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_world.student)


def write(student: ChatTokenizer, text: bytes, *, stopped: bool = True, limit: int = 50) -> Rollout:
    return written_rollout(
        prompt(0),
        text,
        stopped=stopped,
        source="dataset",
        tokenizer=student,
        sample_index=1,
        max_new_tokens=limit,
        version=7,
    )


def test_a_text_becomes_the_students_own_tokens_and_an_end_of_turn(student: ChatTokenizer) -> None:
    found = write(student, b"1 2")
    assert found.token_ids.tolist() == [*student.vocabulary.encode(b"1 2"), student.eos_id]
    assert (found.response, found.finish_reason, found.reward) == (b"1 2", "stop", 1.0)
    assert found.source == "dataset" and found.policy_version == 7 and found.sample_index == 1
    assert np.isnan(found.logprobs).all() and len(found.logprobs) == len(found.token_ids)
    assert found.loss_mask.all()


def test_a_long_text_is_cut_and_has_no_end(student: ChatTokenizer) -> None:
    whole = write(student, b"12 7 390 bo")
    cut = write(student, b"12 7 390 bo", limit=len(whole.token_ids) - 1)
    assert cut.finish_reason == "length" and student.eos_id not in cut.token_ids
    assert cut.token_ids.tolist() == whole.token_ids[:-1].tolist()
    unfinished = write(student, b"1 2", stopped=False)
    assert unfinished.finish_reason == "length" and unfinished.reward == 0.0


def test_nothing_to_write(student: ChatTokenizer) -> None:
    assert len(write(student, b"", stopped=False).token_ids) == 0
