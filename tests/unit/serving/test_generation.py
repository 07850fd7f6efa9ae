"""Decoding against transformers itself: greedy, keyed sampling, log-probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mopd.demo import World
from mopd.serving.generation import Generated, _choose, generate, sampling_stream
from mopd.serving.models import load_causal_lm
from mopd.tokens.chat import ChatTokenizer

CPU = torch.device("cpu")
LENGTH = 10


@pytest.fixture(scope="module")
def tokenizer(tiny_world: World) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_world.student)


@pytest.fixture(scope="module")
def model(tiny_world: World) -> Any:
    return load_causal_lm(tiny_world.student, device=CPU)


@pytest.fixture(scope="module")
def prompts(tokenizer: ChatTokenizer) -> list[np.ndarray]:
    texts = ("sort: bo 3 1", "x", "upper: ka ru vi vi bi", "1 2 3 4 5 6 7 8 9", "bo")
    return [tokenizer.prompt_ids([{"role": "user", "content": text}]) for text in texts]


def decode(
    model: Any,
    prompts: list[np.ndarray],
    tokenizer: ChatTokenizer,
    *,
    streams: list[np.ndarray] | None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> list[Generated]:
    return generate(
        model,
        prompts,
        eos_id=tokenizer.eos_id,
        vocab_size=vocab_size or tokenizer.vocabulary.size,
        max_new_tokens=LENGTH,
        temperature=temperature,
        streams=streams,
    )


def streams(names: list[int]) -> list[np.ndarray]:
    return [sampling_stream(f"key|{name}", LENGTH) for name in names]


def forward(model: Any, prompt: np.ndarray, answer: Generated) -> torch.Tensor:
    """[S, V] logits of the rows that predict the answer, from one full pass."""
    ids = np.concatenate([prompt, answer.token_ids]).astype(np.int64)
    with torch.no_grad():
        logits = model(input_ids=torch.as_tensor(ids)[None]).logits[0]
    return logits[len(prompt) - 1 : -1]


def test_greedy_is_what_transformers_generates(
    model: Any, tokenizer: ChatTokenizer, prompts: list[np.ndarray]
) -> None:
    answers = decode(model, prompts, tokenizer, streams=None)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.as_tensor(prompt.astype(np.int64))[None]
        expected = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=LENGTH,
            do_sample=False,
            eos_token_id=tokenizer.eos_id,
            pad_token_id=tokenizer.eos_id,
        )[0, len(prompt) :]
        assert answer.token_ids.tolist() == expected.tolist()
        assert answer.stopped == (tokenizer.eos_id in expected.tolist())


def test_sampling_depends_on_the_key_alone(
    model: Any, tokenizer: ChatTokenizer, prompts: list[np.ndarray]
) -> None:
    order = [3, 0, 4, 1, 2]
    together = decode(model, prompts, tokenizer, streams=streams([0, 1, 2, 3, 4]))
    shuffled = decode(model, [prompts[i] for i in order], tokenizer, streams=streams(order))
    for i, answer in zip(order, shuffled, strict=True):
        (alone,) = decode(model, [prompts[i]], tokenizer, streams=streams([i]))
        assert together[i].token_ids.tolist() == answer.token_ids.tolist()
        assert together[i].token_ids.tolist() == alone.token_ids.tolist()
        assert together[i].logprobs == pytest.approx(alone.logprobs, abs=1e-5)
    other = decode(model, prompts, tokenizer, streams=streams([10, 11, 12, 13, 14]))
    assert [a.token_ids.tolist() for a in other] != [a.token_ids.tolist() for a in together]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_a_full_forward(
    model: Any, tokenizer: ChatTokenizer, prompts: list[np.ndarray], temperature: float
) -> None:
    answers = decode(
        model, prompts, tokenizer, streams=streams([0, 1, 2, 3, 4]), temperature=temperature
    )
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = forward(model, prompt, answer)[:, : tokenizer.vocabulary.size] / temperature
        ids = torch.as_tensor(answer.token_ids.astype(np.int64))
        expected = torch.log_softmax(logits, dim=-1).gather(1, ids[:, None])[:, 0]
        assert answer.logprobs == pytest.approx(expected.numpy(), abs=2e-5)


def test_padded_columns_are_never_sampled(
    model: Any, tokenizer: ChatTokenizer, prompts: list[np.ndarray]
) -> None:
    size = 40  # as if all other columns were padding
    for chosen in (None, streams([0, 1, 2, 3, 4]), [np.full(LENGTH, 1 - 1e-12)] * 5):
        answers = decode(model, prompts, tokenizer, streams=chosen, vocab_size=size)
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer.token_ids.max() < size
            expected = torch.log_softmax(forward(model, prompt, answer)[:, :size], dim=-1)
            ids = torch.as_tensor(answer.token_ids.astype(np.int64))
            assert answer.logprobs == pytest.approx(
                expected.gather(1, ids[:, None])[:, 0].numpy(), abs=2e-5
            )


def test_answers_end_with_the_first_end_of_turn(
    model: Any, tokenizer: ChatTokenizer, prompts: list[np.ndarray]
) -> None:
    # a hot student stops now and then
    many = [prompts[i % 5] for i in range(64)]
    keys = streams(list(range(64)))
    answers = decode(model, many, tokenizer, streams=keys, temperature=4.0)
    for answer in answers:
        ends = np.flatnonzero(answer.token_ids == tokenizer.eos_id)
        assert ends.tolist() == ([len(answer.token_ids) - 1] if answer.stopped else [])
        assert answer.stopped or len(answer.token_ids) == LENGTH
        assert len(answer.logprobs) == len(answer.token_ids)


def test_sampled_tokens_follow_the_models_distribution(
    model: Any, tokenizer: ChatTokenizer, prompts: list[np.ndarray]
) -> None:
    count, temperature = 20_000, 0.5
    with torch.no_grad():
        logits = model(input_ids=torch.as_tensor(prompts[0].astype(np.int64))[None]).logits[0, -1]
    size = tokenizer.vocabulary.size
    probs = torch.softmax(logits[:size].double() / temperature, dim=-1)
    uniforms = torch.as_tensor(sampling_stream("distribution", count))
    scores = torch.log_softmax(logits[:size] / temperature, dim=-1).expand(count, -1)
    found = torch.bincount(_choose(scores, uniforms), minlength=size).double()
    expected = probs * count
    big = expected >= 5
    chi2 = ((found - expected)[big] ** 2 / expected[big]).sum()
    degrees = int(big.sum())
    assert degrees > 20
    assert abs(float(chi2) - degrees) < 5 * (2 * degrees) ** 0.5


def test_streams_are_uniform_and_apart() -> None:
    one, two = sampling_stream("a", 4096), sampling_stream("b", 4096)
    assert (one == sampling_stream("a", 4096)).all()
    assert (one[:16] == sampling_stream("a", 16)).all()  # a longer limit changes nothing
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.06
    assert abs(one.mean() - 0.5) < 0.02
