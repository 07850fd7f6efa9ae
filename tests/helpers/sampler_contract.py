"""What a sampler on servers promises, as tests over a fixture ``site``.

Imported by the tests on a made-up engine, on transformers, and on a real vLLM server.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mopd.errors import SamplerError, StaleWeightsError
from mopd.rollout.hf import HfSampler
from mopd.rollout.tasks import SamplingOptions
from mopd.rollout.vllm import VllmSampler
from mopd.serving.channel import TrainerChannel, dtype_name
from mopd.serving.http import RefusedError, RetryableError
from mopd.serving.sample_server import SampleServer
from mopd.serving.sampling import (
    Broadcast,
    SampleOptions,
    SampleRequest,
    SampleTask,
    Update,
)
from mopd.serving.weight_files import MANIFEST_FILE, WEIGHTS_FILE, _sha256, write_weights
from mopd.types import Rollout
from tests.helpers.plain_model import prompts_of
from tests.helpers.samplers import HOST, MAX_NEW_TOKENS, PROMPTS, Mode, Site

TOLERANCE = 1e-3
FAR = 1e-2
TEXT = np.arange(5, 45)
MODES: list[Mode] = ["files", "broadcast"]


def ids_of(rollouts: list[Rollout]) -> list[list[int]]:
    return [rollout.token_ids.tolist() for rollout in rollouts]


def held(site: Site, sampler: VllmSampler, seed: int) -> float:
    """How far the engine is from the weights ``seed``."""
    found = sampler.probe(TEXT)
    assert found.shape == (len(site.urls), len(TEXT) - 1)
    return float(np.abs(found - site.model.scores(site.model.weights(seed), TEXT)).max())


@pytest.mark.parametrize("mode", MODES)
def test_the_engine_holds_the_weights_that_were_loaded_last(site: Site, mode: Mode) -> None:
    with site.sampler(mode) as sampler:
        for version in (3, 4, 9):
            sampler.load_weights(site.model.weights(version).items(), version=version)
            assert sampler.version == version
            assert held(site, sampler, version) < TOLERANCE
            assert held(site, sampler, version - 1) > FAR
        with pytest.raises(StaleWeightsError):
            sampler.load_weights(site.model.weights(9).items(), version=9)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_those_of_the_student_at_the_sampling_temperature(
    site: Site, temperature: float
) -> None:
    with site.sampler(temperature=temperature) as sampler:
        sampler.load_weights(site.model.weights(0).items(), version=0)
        rollouts = sampler.generate(PROMPTS, step=0, version=0)
    assert [(r.prompt.id, r.sample_index) for r in rollouts] == [
        (prompt.id, n) for prompt in PROMPTS for n in range(2)
    ]
    for rollout in rollouts:
        ids = [*rollout.prompt_ids.tolist(), *rollout.token_ids.tolist()]
        wanted = site.model.scores(site.model.weights(0), ids, temperature=temperature)
        size = len(rollout.token_ids)
        np.testing.assert_allclose(rollout.logprobs, wanted[-size:], atol=TOLERANCE)
        assert rollout.policy_version == 0
        assert (rollout.finish_reason == "length") == (size == MAX_NEW_TOKENS)


def test_samples_differ_and_are_drawn_again_alike(site: Site) -> None:
    with site.sampler(num_generations=4) as sampler:
        sampler.load_weights(site.model.weights(0).items(), version=0)
        first = ids_of(sampler.generate(PROMPTS, step=0, version=0))
        assert len({tuple(ids) for ids in first}) == len(first)
        assert ids_of(sampler.generate(PROMPTS, step=0, version=0)) == first
        assert ids_of(sampler.generate(PROMPTS, step=1, version=0)) != first
        assert ids_of(sampler.generate(PROMPTS[1:2], step=0, version=0)) == first[4:8]
        with pytest.raises(StaleWeightsError, match="asked for version 1"):
            sampler.generate(PROMPTS, step=1, version=1)
    with site.sampler(num_generations=4, seed=2) as sampler:
        sampler.load_weights(site.model.weights(0).items(), version=0)
        assert ids_of(sampler.generate(PROMPTS, step=0, version=0)) != first


def test_prompts_are_not_remembered_from_older_weights(site: Site) -> None:
    """Greedy answers to a prompt of many cache blocks, as the in-process sampler gives them."""
    prompts = prompts_of("bo ka vi " * 60)
    hf = HfSampler(
        site.model.model_dir,
        tokenizer=site.model.tokenizer,
        device=HOST,
        options=SamplingOptions(
            seed=1, temperature=1.0, max_new_tokens=MAX_NEW_TOKENS, num_generations=1
        ),
        batch_size=4,
    )
    answers = []
    with site.sampler() as sampler:
        for version in range(4):
            for each in (hf, sampler):
                each.load_weights(site.model.weights(version).items(), version=version)
            (own,), (other,) = hf.answer(prompts), sampler.answer(prompts)
            assert len(own.prompt_ids) > 130
            assert own.token_ids.tolist() == other.token_ids.tolist()
            np.testing.assert_allclose(own.logprobs, other.logprobs, atol=TOLERANCE)
            np.testing.assert_allclose(hf.probe(TEXT), sampler.probe(TEXT)[:1], atol=TOLERANCE)
            answers.append(own.token_ids.tolist())
    hf.close()
    assert any(answer != answers[0] for answer in answers)


def test_stop_tokens_cut_and_the_end_of_the_turn_stays(site: Site) -> None:
    with site.sampler() as sampler:
        sampler.load_weights(site.model.weights(0).items(), version=0)
        free = sampler.generate(PROMPTS, step=0, version=0)
    stop = next(int(r.token_ids[3]) for r in free if len(r.token_ids) > 6)
    with site.sampler(stop_token_ids=(stop,)) as sampler:
        sampler.load_weights(site.model.weights(0).items(), version=0)
        cut = sampler.generate(PROMPTS, step=0, version=0)
    assert any(rollout.finish_reason == "cut" for rollout in cut)
    for whole, rollout in zip(free, cut, strict=True):
        ids = whole.token_ids.tolist()
        if stop in ids:
            assert rollout.finish_reason == "cut"
            ids = ids[: ids.index(stop)]
        assert rollout.token_ids.tolist() == ids and len(rollout.logprobs) == len(ids)

    version = f"{secrets.token_hex(8)}/0"
    path = write_weights(site.root, version, site.model.weights(0))
    tasks = tuple(SampleTask(ids=free[0].prompt_ids.tolist(), seed=n) for n in range(16))

    async def talk(server: SampleServer, *, eos_id: int) -> Any:
        await server.update(_update(site, version, path))
        options = SampleOptions(
            max_tokens=MAX_NEW_TOKENS,
            temperature=1.0,
            vocab_size=site.model.tokenizer.vocabulary.size,
            eos_id=eos_id,
        )
        return await server.sample(SampleRequest(version=version, options=options, tasks=tasks))

    _, answers = site.ask(lambda server: talk(server, eos_id=stop))
    # what these seeds are known to sample
    stop = int(max(answers, key=lambda answer: len(answer.ids)).ids[3])
    told, answers = site.ask(lambda server: talk(server, eos_id=stop))
    assert told == version
    ended = [answer for answer in answers if answer.end == "eos"]
    assert ended and all(answer.ids[-1] == stop for answer in ended)
    assert all(stop not in answer.ids[:-1] for answer in answers)
    assert all(len(a.ids) == MAX_NEW_TOKENS for a in answers if a.end == "length")


def test_columns_behind_the_vocabulary_have_no_probability(site: Site) -> None:
    version, size = f"{secrets.token_hex(8)}/0", 40
    path = write_weights(site.root, version, site.model.weights(0))
    options = SampleOptions(max_tokens=8, temperature=1.0, vocab_size=size, eos_id=2)
    tasks = tuple(SampleTask(ids=[5, 6, 7], seed=n) for n in range(8))

    async def talk(server: SampleServer) -> Any:
        await server.update(_update(site, version, path, vocab_size=size))
        return await server.sample(SampleRequest(version=version, options=options, tasks=tasks))

    _, answers = site.ask(talk)
    weights = site.model.weights(0)
    for answer in answers:
        assert answer.ids.max() < size
        full = site.model.scores(weights, [5, 6, 7, *answer.ids.tolist()])
        # of fewer tokens every one is likelier
        assert (answer.logprobs > full[-len(answer.ids) :] + 0.5).all()


def _update(site: Site, version: str, path: Path, **changes: Any) -> Update:
    size = site.model.tokenizer.vocabulary.size
    known: dict[str, Any] = {"version": version, "vocab_size": size, "deadline_s": 30.0}
    return Update(**{**known, "path": str(path), **changes})


def _flip(path: Path) -> None:
    file = path / WEIGHTS_FILE
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def _rewrite(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Whole and consistent, but not the tensors of this model."""
    file = path / WEIGHTS_FILE
    save_file(tensors, file)
    manifest = json.loads((path / MANIFEST_FILE).read_text())
    manifest |= {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    (path / MANIFEST_FILE).write_text(json.dumps(manifest))


def _drop(path: Path) -> None:
    tensors = load_file(path / WEIGHTS_FILE)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    _rewrite(path, tensors)


def _add(path: Path) -> None:
    _rewrite(path, load_file(path / WEIGHTS_FILE) | {"model.more.weight": torch.zeros(2)})


def _reshape(path: Path) -> None:
    tensors = load_file(path / WEIGHTS_FILE)
    _rewrite(path, tensors | {"model.norm.weight": torch.zeros(3)})


def _truncate(path: Path) -> None:
    file = path / WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:-100])


def _rename(path: Path) -> None:
    manifest = json.loads((path / MANIFEST_FILE).read_text()) | {"version": "0123456789/7"}
    (path / MANIFEST_FILE).write_text(json.dumps(manifest))


def _remove(path: Path) -> None:
    (path / WEIGHTS_FILE).unlink()


BAD = [_flip, _drop, _add, _reshape, _truncate, _rename, _remove]


def test_a_bad_directory_is_refused_and_the_engine_lives_on(site: Site) -> None:
    with site.sampler() as sampler:
        sampler.load_weights(site.model.weights(0).items(), version=0)
        before = ids_of(sampler.generate(PROMPTS, step=0, version=0))
        for number, spoil in enumerate(BAD):
            version = f"{secrets.token_hex(8)}/{number}"
            path = write_weights(site.root, version, site.model.weights(1))
            spoil(path)
            with pytest.raises(RefusedError, match="answered 422"):
                site.ask(lambda s, v=version, p=path: s.update(_update(site, v, p)))
        with pytest.raises(RefusedError, match=r"rollout\.backend\.sync_dir.*weight_sync=broad"):
            site.ask(lambda s: s.update(_update(site, "0123456789/1", site.root / "nowhere")))
        assert ids_of(sampler.generate(PROMPTS, step=0, version=0)) == before
        assert held(site, sampler, 0) < TOLERANCE
        with pytest.raises(SamplerError, match="tensors are missing"):
            sampler.load_weights([("model.other", torch.zeros(2))], version=1)


def test_a_broadcast_that_breaks_off_leaves_no_version_and_the_next_one_is_whole(
    site: Site,
) -> None:
    with site.sampler("broadcast") as sampler:
        sampler.load_weights(site.model.weights(0).items(), version=0)
        version = f"{secrets.token_hex(8)}/1"
        with pytest.raises(RetryableError, match="did not come"):
            site.ask(lambda server: _broken(site, server, version))
        facts = site.ask(lambda server: server.facts())
        assert facts.version is None
        options = SampleOptions(max_tokens=4, temperature=1.0, vocab_size=40, eos_id=2)
        task = SampleTask(ids=[5], seed=0)
        request = SampleRequest(version=version, options=options, tasks=(task,))
        assert site.ask(lambda server: server.sample(request)) == (None, [])
        # the sampler notices by itself and sends its own again
        assert held(site, sampler, 0) < TOLERANCE
        sampler.load_weights(site.model.weights(1).items(), version=1)
        assert held(site, sampler, 1) < TOLERANCE


async def _broken(site: Site, server: SampleServer, version: str) -> None:
    """The trainer goes away after a third of the tensors."""
    weights = site.model.weights(5)
    facts = await server.facts()
    size = 1 + facts.workers
    specs = tuple((name, dtype_name(t), tuple(t.shape)) for name, t in weights.items())
    channel = TrainerChannel(host="127.0.0.1", world_size=size, device=HOST, deadline_s=20.0)
    meeting = Broadcast(
        host="127.0.0.1",
        port=channel.port,
        first_rank=1,
        world_size=size,
        backend="gloo",
        tensors=specs,
    )
    vocab_size = site.model.tokenizer.vocabulary.size
    update = Update(version=version, vocab_size=vocab_size, deadline_s=20.0, broadcast=meeting)
    answer = asyncio.create_task(server.update(update))
    some = list(weights.values())[: len(weights) // 3]
    await asyncio.to_thread(channel.send, some, give_up=lambda: False)
    channel.__exit__()
    await answer


@pytest.mark.parametrize("mode", MODES)
def test_weights_of_another_run_are_replaced_before_anything_is_sampled(
    site: Site, mode: Mode
) -> None:
    with site.sampler(mode) as mine, site.sampler(mode) as other:
        mine.load_weights(site.model.weights(0).items(), version=7)
        first = ids_of(mine.generate(PROMPTS, step=7, version=7))
        other.load_weights(site.model.weights(1).items(), version=7)  # the same step of another run
        assert ids_of(mine.generate(PROMPTS, step=7, version=7)) == first
        assert held(site, mine, 0) < TOLERANCE
        assert mine.events["version"] >= 1
