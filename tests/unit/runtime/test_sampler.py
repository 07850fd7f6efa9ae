"""The sampler that a recipe names."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mopd.config.load import load_config
from mopd.demo import World
from mopd.errors import ConfigError, SamplerError
from mopd.rollout.hf import HfSampler
from mopd.runtime.sampler import build_sampler
from mopd.tokens.chat import ChatTokenizer

TOPOLOGY: Any = SimpleNamespace(device=torch.device("cpu"), dp_rank=0, dp_size=1)


def build(world: World, directory: Path, *words: str) -> Any:
    config = load_config("mopd_ctkd", [f"student.model={world.student}", *words])
    tokenizer = ChatTokenizer.load(world.student)
    return build_sampler(config, tokenizer, TOPOLOGY, directory=directory)


def test_the_default_is_in_process(tiny_world: World, tmp_path: Path) -> None:
    sampler = build(tiny_world, tmp_path)
    assert isinstance(sampler, HfSampler)
    sampler.close()


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
