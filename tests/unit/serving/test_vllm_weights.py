"""The worker extension on a worker that is made up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mopd.serving.channel import ChannelError
from mopd.serving.vllm_weights import (
    WeightsExtension,
    forget_packed_experts,
    limited,
    pack_tied,
    whole,
)
from mopd.serving.weight_files import verify_weights, write_weights

NEW = {"a.weight": torch.ones(2, 3), "b.weight": torch.full((4,), 2.0)}
SPECS = [("a.weight", "float32", (2, 3)), ("b.weight", "float32", (4,))]


class Worker(WeightsExtension):
    """Keeps what it is given; ``takes`` tensors, then fails if told to."""

    device, rank = "cpu", 0

    def __init__(self, *, failure: Exception | None = None) -> None:
        self.failure = failure
        self.loaded: dict[str, Tensor] = {}
        self.model_runner: Any = SimpleNamespace(get_model=lambda: torch.nn.Identity())

    def reload_weights(self, *, weights_iterator: Iterator[tuple[str, Tensor]]) -> None:
        for name, tensor in weights_iterator:
            self.loaded[name] = tensor
            if self.failure is not None:
                raise self.failure


def test_a_directory_is_loaded(tmp_path: Path) -> None:
    version = "0123456789/3"
    path = write_weights(tmp_path, version, NEW)
    specs = verify_weights(path, version, {name: shape for name, _, shape in SPECS})
    assert sorted(specs) == sorted(SPECS)
    worker = Worker()
    assert worker.mopd_load_files(str(path), specs) is None
    assert all(torch.equal(worker.loaded[name], tensor) for name, tensor in NEW.items())
    assert worker.mopd_device() == "cpu"


def broken() -> Iterator[tuple[str, Tensor]]:
    yield "a.weight", NEW["a.weight"]
    raise ChannelError("the trainer is gone")


@pytest.mark.parametrize(
    ("source", "trouble"),
    [
        (broken(), "1 of 2 tensors did not come: the trainer is gone"),
        (iter([("a.weight", NEW["a.weight"])]), "1 of 2 tensors did not come"),
        (iter([("a.weight", NEW["b.weight"])]), "a.weight: not the tensor that was announced"),
        (iter([("c.weight", NEW["b.weight"])]), "c.weight: not the tensor that was announced"),
    ],
)
def test_a_reload_that_has_begun_sees_every_tensor_and_the_failure_is_told(
    source: Iterator[tuple[str, Tensor]], trouble: str
) -> None:
    worker = Worker()
    assert worker._mopd_load(source, SPECS) == trouble
    assert {n: tuple(t.shape) for n, t in worker.loaded.items()} == {n: s for n, _, s in SPECS}
    assert not worker.loaded["b.weight"].any()
    assert worker.mopd_load_tensors(NEW) is None  # and the next one is whole again
    assert worker.loaded["b.weight"].all()


def test_a_source_that_brings_nothing_leaves_the_old_weights() -> None:
    worker = Worker()
    assert "nothing came" in str(worker._mopd_load(iter(()), SPECS))
    assert "nothing came" in str(worker.mopd_load_files("/nowhere", SPECS))
    assert not worker.loaded


def test_an_engine_that_fails_itself_is_spoiled_but_alive() -> None:
    worker = Worker(failure=RuntimeError("no room"))
    assert "vLLM cannot load the weights: RuntimeError: no room" in str(
        worker.mopd_load_tensors(NEW)
    )
    worker.failure = None
    assert "restart the server" in str(worker.mopd_load_tensors(NEW))


def test_a_reader_that_stops_early_leaves_the_rest() -> None:
    stream = whole(("a.weight", NEW["a.weight"]), iter(()), SPECS, lambda trouble: None)
    next(stream)
    stream.close()


def test_columns_behind_the_limit_have_no_probability() -> None:
    limit = [3]
    compute = limited(lambda size: torch.zeros(2, size) if size else None, limit)
    assert compute(0) is None
    assert compute(3).isfinite().all()
    assert compute(5)[:, 3:].isneginf().all() and compute(5)[:, :3].isfinite().all()
    limit[0] = 4
    assert compute(5)[:, 4:].isneginf().all() and compute(5)[:, :4].isfinite().all()


def test_the_limit_is_set_once_and_moved() -> None:
    worker = Worker()
    model = torch.nn.Module()
    model.compute_logits = lambda: torch.zeros(1, 8)  # type: ignore[assignment]
    worker.model_runner = SimpleNamespace(get_model=lambda: model)
    for size in (6, 4, 8):
        worker.mopd_limit_vocab(size)
        assert int(model.compute_logits().isfinite().sum()) == size


def test_only_layers_that_share_a_weight_are_packed_again() -> None:
    packed: list[str] = []

    def layer(name: str, weight: Tensor) -> torch.nn.Module:
        module = torch.nn.Module()
        module.weight = torch.nn.Parameter(weight)
        module.quant_method = SimpleNamespace(
            process_weights_after_loading=lambda _: packed.append(name)
        )
        return module

    model = torch.nn.Module()
    model.embed, model.head = layer("embed", torch.ones(2, 2)), layer("head", torch.ones(2, 2))
    model.one, model.two = layer("one", torch.empty(0)), layer("two", torch.empty(0))
    pack_tied(model)
    assert packed == []
    model.head.weight = model.embed.weight
    pack_tied(model)
    assert packed == ["head"]


def test_experts_are_packed_again_by_the_next_reload() -> None:
    """A layer that has a kernel is not packed; the real server is in tests/vllm/test_moe.py."""
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Identity())
    model[0].quant_method = SimpleNamespace(moe_kernel=object())  # type: ignore[assignment]
    model[1].quant_method = SimpleNamespace()  # type: ignore[assignment]
    forget_packed_experts(model)
    assert model[0].quant_method.moe_kernel is None
