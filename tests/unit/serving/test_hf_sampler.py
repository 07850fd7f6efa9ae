"""Sampling around transformers: keyed answers, whole versions, and who waits for whom."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mopd.demo import World
from mopd.serving import hf_sampler
from mopd.serving.generation import AbandonedError
from mopd.serving.hf_sampler import TransformersSampler
from mopd.serving.lease import DeviceLease
from mopd.serving.models import load_causal_lm
from mopd.serving.sampling import (
    LOGPROBS_PATH,
    SAMPLE_PATH,
    WEIGHTS_PATH,
    Broadcast,
    Sampled,
    SampleOptions,
    SampleRequest,
    SampleTask,
    Update,
    decode_answer,
    encode_request,
    encode_update,
)
from mopd.serving.scoring import RequestError
from mopd.serving.weight_files import write_weights
from tests.helpers.plain_model import PlainModel
from tests.helpers.upcycle import upcycle

CPU = torch.device("cpu")
LENGTH = 12
TASKS = [
    SampleTask(ids=list(range(5, 5 + size)), seed=seed)
    for seed, size in enumerate([1, 20, 3, 3, 40, 7, 11, 2])
]
WAIT_S = 30.0


def never() -> bool:
    return False


class Desk:
    """An engine with the weights of a `PlainModel`, asked as a server would."""

    def __init__(self, model: PlainModel, root: Path, *, lease: DeviceLease | None = None) -> None:
        self.model, self.root = model, root
        self.engine = TransformersSampler(model.model_dir, device=CPU, lease=lease)
        self.size = model.tokenizer.vocabulary.size

    def update(self, weights: dict[str, Tensor], *, step: int = 0, **changes: Any) -> str:
        """From files; the version."""
        version = f"{secrets.token_hex(8)}/{step}"
        path = write_weights(self.root, version, weights)
        self.post(version=version, path=str(path), **changes)
        return version

    def post(self, *, closing: Callable[[], bool] = never, **changes: Any) -> None:
        known: dict[str, Any] = {"vocab_size": self.size, "deadline_s": WAIT_S} | changes
        body = encode_update(Update(**known))
        self.engine.answer(WEIGHTS_PATH, "POST", body, gone=never, closing=closing)

    def sample(
        self,
        tasks: list[SampleTask],
        *,
        version: str | None = None,
        gone: Callable[[], bool] = never,
        **options: Any,
    ) -> tuple[str | None, list[Sampled]]:
        known = {"max_tokens": LENGTH, "temperature": 1.0, "vocab_size": self.size, "eos_id": 2}
        request = SampleRequest(
            version=version or self.engine.facts().version or "",
            options=SampleOptions(**(known | options)),
            tasks=tuple(tasks),
        )
        body = encode_request(request)
        said = self.engine.answer(SAMPLE_PATH, "POST", body, gone=gone, closing=never)
        return decode_answer(said, request)

    def logprobs(self, ids: list[int]) -> np.ndarray:
        body = json.dumps({"ids": ids}).encode()
        said = self.engine.answer(LOGPROBS_PATH, "POST", body, gone=never, closing=never)
        return np.asarray(json.loads(said)["logprobs"])


@pytest.fixture(scope="module")
def model(tiny_world: World) -> PlainModel:
    return PlainModel(tiny_world.student)


@pytest.fixture
def desk(model: PlainModel, tmp_path: Path) -> Desk:
    desk = Desk(model, tmp_path / "weights")
    desk.update(model.weights(0))
    return desk


def check_alike(found: list[Sampled], wanted: list[Sampled]) -> None:
    assert [a.ids.tolist() for a in found] == [a.ids.tolist() for a in wanted]
    assert [a.end for a in found] == [a.end for a in wanted]
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_an_answer_does_not_depend_on_what_it_is_asked_with(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    _, together = desk.sample(TASKS, temperature=temperature)
    alone = [desk.sample([task], temperature=temperature)[1][0] for task in TASKS]
    check_alike(together, alone)
    _, backwards = desk.sample(TASKS[::-1], temperature=temperature)
    check_alike(backwards[::-1], together)
    passes: list[int] = []
    hook = desk.engine._model.register_forward_hook(lambda *_: passes.append(1))
    three = 3 * (40 + LENGTH) * desk.engine._bytes_per_token
    monkeypatch.setattr(hf_sampler, "CACHE_BYTES", three)
    check_alike(desk.sample(TASKS, temperature=temperature)[1], together)
    hook.remove()
    assert 2 * LENGTH < len(passes) <= 3 * LENGTH  # batches of three, three and two
    other = [SampleTask(ids=task.ids, seed=task.seed + 100) for task in TASKS]
    changed = desk.sample(other, temperature=temperature)[1]
    same = [a.ids.tolist() == b.ids.tolist() for a, b in zip(changed, together, strict=True)]
    assert all(same) if temperature == 0 else not any(same)


def test_an_engine_that_was_restarted_gives_the_same_answers_bit_by_bit(
    desk: Desk, tmp_path: Path
) -> None:
    again = Desk(desk.model, tmp_path / "again")
    again.update(desk.model.weights(0))
    for one, other in zip(desk.sample(TASKS)[1], again.sample(TASKS)[1], strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        assert one.logprobs.tolist() == other.logprobs.tolist()


def test_requests_at_the_same_time_do_not_mix(desk: Desk) -> None:
    alone = [desk.sample([task])[1][0] for task in TASKS]
    with ThreadPoolExecutor(len(TASKS)) as pool:
        found = list(pool.map(lambda task: desk.sample([task])[1][0], TASKS))
    check_alike(found, alone)


def untied(model_dir: Path, target: Path) -> Path:
    """The same model with an output layer of its own."""
    model = load_causal_lm(model_dir, device=CPU)
    model.config.tie_word_embeddings = False
    generator = torch.Generator().manual_seed(0)
    head = model.get_input_embeddings().weight.detach()
    noise = torch.randn(head.shape, generator=generator)
    model.lm_head.weight = torch.nn.Parameter(head + 0.1 * noise)
    model.save_pretrained(target)
    for file in model_dir.glob("*token*"):
        (target / file.name).write_bytes(file.read_bytes())
    for file in model_dir.glob("chat_template*"):
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_a_tied_output_layer_follows_its_embedding(desk: Desk) -> None:
    weights = desk.model.weights(1)
    assert "lm_head.weight" not in weights
    wanted = desk.model.scores(weights, range(5, 30))
    desk.update(weights)
    np.testing.assert_allclose(desk.logprobs(list(range(5, 30))), wanted, atol=1e-4)
    embedding = weights["model.embed_tokens.weight"]
    desk.update(weights | {"lm_head.weight": torch.zeros_like(embedding)})
    np.testing.assert_allclose(desk.logprobs(list(range(5, 30))), wanted, atol=1e-4)


def test_an_output_layer_of_its_own_must_come(model: PlainModel, tmp_path: Path) -> None:
    own = PlainModel(untied(model.model_dir, tmp_path / "untied"))
    desk = Desk(own, tmp_path / "weights")
    weights = own.weights(1)
    version = desk.update(weights)
    wanted = own.scores(weights, range(5, 30))
    np.testing.assert_allclose(desk.logprobs(list(range(5, 30))), wanted, atol=1e-4)
    del weights["lm_head.weight"]
    with pytest.raises(RequestError, match=r"lm_head\.weight") as caught:
        desk.update(weights)
    assert caught.value.status == 422 and desk.engine.facts().version == version


def test_experts_come_one_by_one(model: PlainModel, tmp_path: Path) -> None:
    one, other = (
        upcycle(model.model_dir, tmp_path / str(seed), noise=1.0, router_std=0.5, seed=seed)
        for seed in (0, 1)
    )
    wanted = Desk(PlainModel(other), tmp_path).logprobs(list(range(5, 30)))
    desk = Desk(PlainModel(one), tmp_path / "weights")
    assert np.abs(desk.logprobs(list(range(5, 30))) - wanted).max() > 0.1
    desk.update(load_file(other / "model.safetensors"))
    np.testing.assert_allclose(desk.logprobs(list(range(5, 30))), wanted, atol=1e-5)


class Gate:
    """A client whose request stands still from its third token on, until it is opened."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self._asked = 0

    def __call__(self) -> bool:
        self._asked += 1
        if self._asked == 3:
            self.reached.set()
            assert self.opened.wait(WAIT_S)
        return False


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def wait_in_line(desk: Desk, number: int) -> None:
    deadline = time.monotonic() + WAIT_S
    while len(desk.engine._turns._line) < number:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_an_update_waits_for_what_came_before_and_not_for_what_came_after(
    desk: Desk, pool: ThreadPoolExecutor
) -> None:
    gate, old = Gate(), desk.engine.facts().version
    _, wanted = desk.sample(TASKS)
    before = pool.submit(desk.sample, TASKS, gone=gate)
    assert gate.reached.wait(WAIT_S)
    update: Future[str] = pool.submit(desk.update, desk.model.weights(1), step=1)
    wait_in_line(desk, 2)
    after = pool.submit(desk.sample, TASKS, version=old)
    wait_in_line(desk, 3)
    assert desk.engine.facts().version == old and not update.done()
    gate.opened.set()
    version, answers = before.result(WAIT_S)
    assert version == old
    check_alike(answers, wanted)
    assert after.result(WAIT_S) == (update.result(WAIT_S), [])
    assert desk.engine.facts().version == update.result()


def test_a_second_update_meanwhile_is_sent_away(desk: Desk, pool: ThreadPoolExecutor) -> None:
    gate = Gate()
    running = pool.submit(desk.sample, TASKS, gone=gate)
    assert gate.reached.wait(WAIT_S)
    first = pool.submit(desk.update, desk.model.weights(1))
    wait_in_line(desk, 2)
    with pytest.raises(RequestError, match="another update is under way") as caught:
        desk.update(desk.model.weights(2))
    assert caught.value.status == 503
    gate.opened.set()
    running.result(WAIT_S)
    assert first.result(WAIT_S) == desk.engine.facts().version


@pytest.mark.parametrize("changes", [{"deadline_s": 0.01}, {"closing": lambda: True}])
def test_an_update_that_waits_too_long_leaves_the_old_weights(
    desk: Desk, pool: ThreadPoolExecutor, changes: dict[str, Any]
) -> None:
    gate, old = Gate(), desk.engine.facts().version
    running = pool.submit(desk.sample, TASKS, gone=gate)
    assert gate.reached.wait(WAIT_S)
    with pytest.raises(RequestError, match="took too long"):
        desk.update(desk.model.weights(1), **changes)
    gate.opened.set()
    assert running.result(WAIT_S)[0] == old == desk.engine.facts().version


def test_what_nobody_waits_for_is_dropped(desk: Desk, pool: ThreadPoolExecutor) -> None:
    _, wanted = desk.sample(TASKS)
    passes: list[int] = []
    hook = desk.engine._model.register_forward_hook(lambda *_: passes.append(1))
    with pytest.raises(AbandonedError):
        desk.sample(TASKS, gone=lambda: len(passes) == 3)
    hook.remove()
    assert len(passes) == 3
    gate = Gate()
    running = pool.submit(desk.sample, TASKS, gone=gate)
    assert gate.reached.wait(WAIT_S)
    with pytest.raises(AbandonedError):  # still in the line
        desk.sample(TASKS, gone=lambda: True)
    gate.opened.set()
    check_alike(running.result(WAIT_S)[1], wanted)
    check_alike(desk.sample(TASKS)[1], wanted)


def test_a_broadcast_that_never_begins_leaves_the_old_weights(desk: Desk) -> None:
    old = desk.engine.facts().version
    _, wanted = desk.sample(TASKS)
    specs = tuple((n, "float32", tuple(t.shape)) for n, t in desk.model.weights(0).items())
    meeting = Broadcast(
        host="127.0.0.1", port=9, first_rank=1, world_size=2, backend="gloo", tensors=specs
    )
    with pytest.raises(RequestError, match="no way to the trainer") as caught:
        desk.post(version="0123456789/1", broadcast=meeting, deadline_s=1.0)
    assert caught.value.status == 503
    version, answers = desk.sample(TASKS)
    assert version == old
    check_alike(answers, wanted)


def test_files_that_change_after_they_were_checked_leave_no_version(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the tensors are new: these weights are nobody's."""

    def some(path: Path) -> Iterator[tuple[str, Tensor]]:
        yield from list(desk.model.weights(1).items())[:3]
        raise OSError("the directory has gone")

    monkeypatch.setattr(hf_sampler, "read_weights", some)
    with pytest.raises(RequestError, match="tensors did not come"):
        desk.update(desk.model.weights(1))
    assert desk.engine.facts().version is None
    assert desk.sample(TASKS, version="0123456789/0") == (None, [])


def test_weights_that_are_no_numbers_give_an_error_and_no_answer(desk: Desk) -> None:
    weights = desk.model.weights(0)
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], float("nan"))
    desk.update(weights)
    for ask in (lambda: desk.sample(TASKS), lambda: desk.logprobs([5, 6])):
        with pytest.raises(RequestError, match="not finite") as caught:
            ask()
        assert caught.value.status == 500


def test_texts_beyond_the_model_are_refused(desk: Desk) -> None:
    longest = desk.engine.facts().max_length
    with pytest.raises(RequestError, match="there is room for 1 to"):
        desk.sample([SampleTask(ids=[5] * (longest - LENGTH + 1), seed=0)])
    desk.sample([SampleTask(ids=[5] * (longest - LENGTH), seed=0)])
    with pytest.raises(RequestError, match="ids are 0 to"):
        desk.logprobs([desk.size])
    assert len(desk.logprobs([5] * longest)) == longest - 1
