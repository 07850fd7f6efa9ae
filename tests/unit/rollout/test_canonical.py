"""Sampling restricted to the tokenizer's own segmentation, and what is recorded of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mopd.config.check import check_config
from mopd.config.load import load_config
from mopd.demo import World
from mopd.errors import ConfigError
from mopd.rollout.base import is_canonical
from mopd.rollout.hf import HfSampler
from mopd.rollout.tasks import SamplingOptions
from mopd.serving.models import load_causal_lm
from mopd.tokens.canonical import CanonicalNext
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Prompt, Rollout

PROMPTS = [
    Prompt(id=str(n), messages=({"role": "user", "content": f"sort {n} bo"},), domain="d")
    for n in range(3)
]


def answers(
    world: World, tokenizer: ChatTokenizer, *, canonical: bool, length: int = 6
) -> list[Rollout]:
    """Two samples of every prompt, then a greedy answer to each."""
    options = SamplingOptions(
        seed=1, temperature=0.9, max_new_tokens=length, num_generations=2, canonical=canonical
    )
    device = torch.device("cpu")
    built = HfSampler(
        world.student, tokenizer=tokenizer, device=device, options=options, batch_size=4
    )
    model = load_causal_lm(world.student, device=torch.device("cpu"))
    built.load_weights(((n, v.detach()) for n, v in model.named_parameters()), version=0)
    return [*built.generate(PROMPTS, step=0, version=0), *built.answer(PROMPTS)]


def test_samples_are_canonical_and_evaluations_are_the_student_itself(tiny_world: World) -> None:
    tokenizer = ChatTokenizer.load(tiny_world.student)
    free = answers(tiny_world, tokenizer, canonical=False)
    bound = answers(tiny_world, tokenizer, canonical=True)
    size = 2 * len(PROMPTS)
    assert all(is_canonical(one, tokenizer) for one in bound[:size])
    long = answers(tiny_world, tokenizer, canonical=False, length=48)[:size]
    assert not all(is_canonical(one, tokenizer) for one in long)  # else nothing is shown
    for one, other in zip(free[size:], bound[size:], strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert one.logprobs.tolist() == other.logprobs.tolist()


def test_recorded_logprobs_are_those_of_the_restricted_policy(tiny_world: World) -> None:
    tokenizer = ChatTokenizer.load(tiny_world.student)
    model = load_causal_lm(tiny_world.student, device=torch.device("cpu"))
    following = CanonicalNext(tokenizer.vocabulary)
    for one in answers(tiny_world, tokenizer, canonical=True)[: 2 * len(PROMPTS)]:
        ids = torch.tensor([*one.prompt_ids.tolist(), *one.token_ids.tolist()])[None]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(one.prompt_ids) - 1 : -1].double()
        for t, token in enumerate(one.token_ids.tolist()):
            mask = following.allowed(one.token_ids[:t].tolist())
            row = (logits[t, : len(mask)] / 0.9).numpy()
            expected = row[token] - np.logaddexp.reduce(row[mask])
            assert one.logprobs[t] == pytest.approx(expected, abs=1e-4)


def test_a_stop_token_ends_a_restricted_answer_too(tiny_world: World) -> None:
    """One that no canonical answer begins with."""
    tokenizer = ChatTokenizer.load(tiny_world.student)
    mask = CanonicalNext(tokenizer.vocabulary).allowed([])
    stop = int(np.flatnonzero(~mask)[0])
    model = load_causal_lm(tiny_world.student, device=torch.device("cpu"))
    options = SamplingOptions(
        seed=1,
        temperature=1e9,  # every token that may follow is equally likely
        max_new_tokens=1,
        num_generations=1 << 11,
        stop_token_ids=(stop,),
        canonical=True,
    )
    built = HfSampler(
        tiny_world.student,
        tokenizer=tokenizer,
        device=torch.device("cpu"),
        options=options,
        batch_size=1 << 11,
    )
    built.load_weights(((n, v.detach()) for n, v in model.named_parameters()), version=0)
    found = built.generate(PROMPTS[:1], step=0, version=0)
    assert any(one.finish_reason == "cut" for one in found)


@pytest.mark.parametrize("kind", ["vllm", "dataset"])
def test_other_samplers_are_refused(kind: str) -> None:
    words = ["rollout.segmentation=canonical", f"rollout.backend.type={kind}"]
    words += ["student.model=s", "data.path=d", "teachers.a.model=t"]
    with pytest.raises(ConfigError, match=r"rollout\.segmentation=canonical: .*set type=hf"):
        check_config(load_config("mopd_ctkd", words), world_size=1)


def test_canonical_paths_need_path_terms() -> None:
    words = ["ctkd.canonical_paths=true", "ctkd.path_terms=false"]
    words += ["student.model=s", "data.path=d", "teachers.a.model=t"]
    with pytest.raises(ConfigError, match=r"ctkd\.canonical_paths: .*path_terms=true"):
        check_config(load_config("mopd_ctkd", words), world_size=1)
