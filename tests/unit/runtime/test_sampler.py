"""The sampler that a recipe names."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mopd.config.load import load_config
from mopd.demo import World
from mopd.errors import ConfigError, SamplerError
from mopd.rollout.hf import HfSampler
from mopd.runtime import sampler
from mopd.runtime.sampler import build_sampler
from mopd.serving.sampling import Update, encode_update, read_update
from mopd.serving.vllm_command import OFFLINE
from mopd.tokens.chat import ChatTokenizer

TOPOLOGY: Any = SimpleNamespace(device=torch.device("cpu"), dp_rank=0, dp_size=1)


def build(world: World, directory: Path, *words: str) -> Any:
    config = load_config("mopd_ctkd", [f"student.model={world.student}", *words])
    tokenizer = ChatTokenizer.load(world.student)
    return build_sampler(config, tokenizer, TOPOLOGY, directory=directory)


def test_the_default_is_in_process(tiny_world: World, tmp_path: Path) -> None:
    built = build(tiny_world, tmp_path)
    assert isinstance(built, HfSampler)
    built.close()


def test_tokens_that_cannot_stop_are_refused(tiny_world: World, tmp_path: Path) -> None:
    tokenizer = ChatTokenizer.load(tiny_world.student)
    with pytest.raises(ConfigError, match="is the end of the turn"):
        build(tiny_world, tmp_path, f"rollout.stop_token_ids=[{tokenizer.eos_id}]")
    with pytest.raises(ConfigError, match="is beyond its"):
        build(tiny_world, tmp_path, f"rollout.stop_token_ids=[{tokenizer.vocabulary.size}]")


def test_servers_that_are_not_there_end_the_start_in_one_line(
    tiny_world: World, tmp_path: Path
) -> None:
    left_over = tmp_path / "weights" / "0123456789" / "4"
    left_over.mkdir(parents=True)
    words = ["type=vllm", "urls=[http://127.0.0.1:9]", "start_s=0"]
    with pytest.raises(SamplerError, match=r"rollout.backend: http://127.0.0.1:9: cannot connect"):
        build(tiny_world, tmp_path, *(f"rollout.backend.{word}" for word in words))
    assert not left_over.exists()  # of a run that was killed


def test_an_engine_in_process_needs_vllm(tiny_world: World, tmp_path: Path) -> None:
    words = ["rollout.backend.type=vllm", "rollout.backend.mode=colocate"]
    with pytest.raises(ConfigError, match="vllm is not installed here"):
        build(tiny_world, tmp_path, *words)


@pytest.mark.parametrize(("start_s", "wanted"), [(7200, 3600.0), (200, 200.0), (1, 60.0)])
def test_an_update_asks_for_no_longer_than_servers_allow(
    tiny_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start_s: int, wanted: float
) -> None:
    made: dict[str, Any] = {}
    monkeypatch.setattr(sampler, "VllmSampler", lambda urls, **words: made.update(words))
    words = ["type=vllm", "urls=[http://127.0.0.1:9]", f"start_s={start_s}"]
    build(tiny_world, tmp_path, *(f"rollout.backend.{word}" for word in words))
    assert made["server"].update_s == made["fleet"].patience_s == wanted
    update = Update(version="0123456789/0", vocab_size=4, deadline_s=wanted, path="/weights")
    assert read_update(encode_update(update), columns=4).deadline_s == wanted


def test_an_engine_that_does_not_start_is_told_in_one_line(
    tiny_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**words: Any) -> None:
        raise ValueError("Free memory on device\nis less than desired")

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=refuse))
    with monkeypatch.context() as patch:
        for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", *OFFLINE):
            patch.setenv(name, "")  # what the engine sets is taken back
        words = ["rollout.backend.type=vllm", "rollout.backend.mode=colocate"]
        with pytest.raises(SamplerError, match=r"device is less than .*memory_fraction") as caught:
            build(tiny_world, tmp_path, *words)
    assert "\n" not in str(caught.value)
