"""The in-process sampler and its replay."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mopd.demo import World
from mopd.errors import ArtifactError, StaleWeightsError
from mopd.rollout.base import exact_match, is_canonical, make_rollout
from mopd.rollout.hf import HfSampler
from mopd.rollout.replay import ReplaySampler
from mopd.rollout.tasks import SamplingOptions
from mopd.serving.generation import Generated
from mopd.serving.journal import Journal
from mopd.serving.models import load_causal_lm
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Prompt, Rollout

PROMPTS = [
    Prompt(id=str(n), messages=({"role": "user", "content": f"sort {n} bo"},), domain="d")
    for n in range(3)
]


@pytest.fixture(scope="module")
def tokenizer(tiny_world: World) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_world.student)


@pytest.fixture(scope="module")
def weights(tiny_world: World) -> dict[str, Tensor]:
    model = load_causal_lm(tiny_world.student, device=torch.device("cpu"))
    return {name: value.detach() for name, value in model.named_parameters()}


@pytest.fixture
def sampler(tiny_world: World, tokenizer: ChatTokenizer) -> Iterator[HfSampler]:
    built = make_sampler(tiny_world.student, tokenizer)
    yield built
    built.close()


def make_sampler(
    path: Path,
    tokenizer: ChatTokenizer,
    *,
    batch_size: int = 4,
    stop_token_ids: tuple[int, ...] = (),
) -> HfSampler:
    return HfSampler(
        path,
        tokenizer=tokenizer,
        device=torch.device("cpu"),
        options=SamplingOptions(
            seed=1,
            temperature=1.0,
            max_new_tokens=8,
            num_generations=2,
            stop_token_ids=stop_token_ids,
        ),
        batch_size=batch_size,
    )


def same(one: list[Rollout], other: list[Rollout]) -> bool:
    return all(
        a.prompt == b.prompt
        and (a.sample_index, a.policy_version, a.finish_reason, a.response, a.reward)
        == (b.sample_index, b.policy_version, b.finish_reason, b.response, b.reward)
        and all(
            np.array_equal(getattr(a, name), getattr(b, name))
            for name in ("prompt_ids", "token_ids", "loss_mask", "byte_ends", "logprobs")
        )
        for a, b in zip(one, other, strict=True)
    )


def test_a_version_that_is_not_newer_is_refused(
    sampler: HfSampler, weights: dict[str, Tensor]
) -> None:
    sampler.load_weights(weights.items(), version=3)
    for version in (3, 2):
        with pytest.raises(StaleWeightsError, match="not newer"):
            sampler.load_weights(weights.items(), version=version)
        assert sampler.version == 3
    with pytest.raises(StaleWeightsError, match="asked for version 4"):
        sampler.generate(PROMPTS, step=4, version=4)


def test_a_missing_parameter_is_refused_and_named(
    sampler: HfSampler, weights: dict[str, Tensor]
) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    assert name in weights
    rest = {key: value for key, value in weights.items() if key != name}
    with pytest.raises(StaleWeightsError, match=name):
        sampler.load_weights(rest.items(), version=0)
    assert sampler.version == -1


def test_new_weights_take_effect(sampler: HfSampler, weights: dict[str, Tensor]) -> None:
    sampler.load_weights(weights.items(), version=0)
    before = sampler.answer(PROMPTS)
    generator = torch.Generator().manual_seed(0)
    other = {k: torch.randn(v.shape, generator=generator) * 0.3 for k, v in weights.items()}
    sampler.load_weights(other.items(), version=1)
    after = sampler.answer(PROMPTS)
    assert [r.token_ids.tolist() for r in before] != [r.token_ids.tolist() for r in after]
    assert {r.policy_version for r in after} == {1}


def test_samples_are_ordered_and_do_not_depend_on_the_batch(
    tiny_world: World, tokenizer: ChatTokenizer, sampler: HfSampler, weights: dict[str, Tensor]
) -> None:
    other = make_sampler(tiny_world.student, tokenizer, batch_size=1)
    for each in (sampler, other):
        each.load_weights(weights.items(), version=0)
    rollouts = sampler.generate(PROMPTS, step=0, version=0)
    names = [(r.prompt.id, r.sample_index) for r in rollouts]
    assert names == [(p.id, n) for p in PROMPTS for n in range(2)]
    alone = other.generate(PROMPTS[::-1], step=0, version=0)
    found = {(r.prompt.id, r.sample_index): r.token_ids.tolist() for r in alone}
    assert found == {(r.prompt.id, r.sample_index): r.token_ids.tolist() for r in rollouts}
    assert rollouts[0].token_ids.tolist() != rollouts[1].token_ids.tolist()
    other.load_weights(weights.items(), version=1)  # the version is part of the key
    assert found != {
        (r.prompt.id, r.sample_index): r.token_ids.tolist()
        for r in other.generate(PROMPTS, step=1, version=1)
    }


def test_bytes_and_masks_of_rollouts(
    tokenizer: ChatTokenizer, sampler: HfSampler, weights: dict[str, Tensor]
) -> None:
    sampler.load_weights(weights.items(), version=0)
    for rollout in sampler.generate(PROMPTS, step=0, version=0):
        assert rollout.response == tokenizer.vocabulary.decode(rollout.token_ids)
        assert rollout.byte_ends[-1] == len(rollout.response)
        assert rollout.loss_mask.all()
        assert (rollout.token_ids[-1] == tokenizer.eos_id) == (rollout.finish_reason == "stop")
        assert rollout.prompt_ids.tolist() == tokenizer.prompt_ids(rollout.prompt.messages).tolist()


def test_replay_gives_the_same_rollouts(
    tmp_path: Path, tokenizer: ChatTokenizer, sampler: HfSampler, weights: dict[str, Tensor]
) -> None:
    journal = Journal(tmp_path / "journal" / "rollouts-0.jsonl")
    written = []
    for version in range(2):
        sampler.load_weights(weights.items(), version=version)
        written.append(sampler.generate(PROMPTS, step=version, version=version))
        journal.append(version, written[-1])
    journal.close()
    replay = ReplaySampler(tmp_path, tokenizer=tokenizer, num_generations=2, live=sampler)
    for version, rollouts in enumerate(written):
        assert same(replay.generate(PROMPTS, step=version, version=version), rollouts)
    assert same(replay.generate(PROMPTS[1:2], step=1, version=1), written[1][2:4])
    with pytest.raises(ArtifactError, match="step 2, prompt 0"):
        replay.generate(PROMPTS, step=2, version=2)
    replay.load_weights(weights.items(), version=7)
    assert replay.version == sampler.version == 7


def spelled(tokenizer: ChatTokenizer, ids: list[int], *, stopped: bool = True) -> Rollout:
    eos = [tokenizer.eos_id] if stopped else []
    generated = Generated(
        token_ids=np.array([*ids, *eos], dtype=np.int32),
        logprobs=np.zeros(len(ids) + stopped, dtype=np.float32),
        stopped=stopped,
    )
    return make_rollout(
        replace(PROMPTS[0], answer="bo ka"),
        generated,
        tokenizer=tokenizer,
        prompt_ids=np.zeros(1, dtype=np.int32),
        sample_index=0,
        version=0,
    )


def test_canonical_means_the_tokenizers_own_encoding(tokenizer: ChatTokenizer) -> None:
    vocabulary = tokenizer.vocabulary
    own = vocabulary.encode(b"bo ka")
    letters = [vocabulary.by_bytes[bytes([b])] for b in b"bo ka"]
    assert own != letters
    for stopped in (True, False):
        assert is_canonical(spelled(tokenizer, own, stopped=stopped), tokenizer)
        assert not is_canonical(spelled(tokenizer, letters, stopped=stopped), tokenizer)
    assert is_canonical(spelled(tokenizer, []), tokenizer)


def test_an_answer_is_right_when_its_text_is_and_its_turn_ended(tokenizer: ChatTokenizer) -> None:
    own = tokenizer.vocabulary.encode(b" bo ka\n")
    assert spelled(tokenizer, own).reward == 1.0
    assert spelled(tokenizer, own, stopped=False).reward == 0.0
    assert spelled(tokenizer, tokenizer.vocabulary.encode(b"ka bo")).reward == 0.0
    assert exact_match(PROMPTS[0], b"x", stopped=True) is None


def test_stop_tokens_end_an_answer_and_are_left_out(
    tiny_world: World, tokenizer: ChatTokenizer, sampler: HfSampler, weights: dict[str, Tensor]
) -> None:
    sampler.load_weights(weights.items(), version=0)
    free = sampler.generate(PROMPTS, step=0, version=0)
    stop = next(int(r.token_ids[2]) for r in free if len(r.token_ids) > 4)
    stopping = make_sampler(tiny_world.student, tokenizer, stop_token_ids=(stop,))
    stopping.load_weights(weights.items(), version=0)
    cut = stopping.generate(PROMPTS, step=0, version=0)
    assert any(rollout.finish_reason == "cut" for rollout in cut)
    for whole, rollout in zip(free, cut, strict=True):
        ids = whole.token_ids.tolist()
        end = ids.index(stop) if stop in ids else len(ids)
        assert rollout.token_ids.tolist() == ids[:end]
        assert np.array_equal(rollout.logprobs, whole.logprobs[:end])
        assert (rollout.finish_reason == "cut") == (stop in ids)
    assert all(rollout.finish_reason != "cut" for rollout in free)
    stopping.close()


def test_the_probe_is_the_copys_own_score(
    tokenizer: ChatTokenizer, sampler: HfSampler, weights: dict[str, Tensor]
) -> None:
    sampler.load_weights(weights.items(), version=0)
    ids = np.arange(5, 20, dtype=np.int32)
    before = sampler.probe(ids)
    assert before.shape == (1, 14) and (before < 0).all()
    sampler.load_weights({name: 2.0 * t for name, t in weights.items()}.items(), version=1)
    assert np.abs(sampler.probe(ids) - before).max() > 1e-3
