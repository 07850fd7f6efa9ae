"""The dense student as a mixture of experts, and samplers that take a mixture's weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mopd.config.model_shape import read_model_config
from mopd.demo import World
from mopd.errors import StaleWeightsError
from mopd.rollout.hf import HfSampler
from mopd.rollout.tasks import SamplingOptions
from mopd.serving.models import load_causal_lm
from mopd.tokens.chat import ChatTokenizer
from tests.helpers.upcycle import upcycle

CPU = torch.device("cpu")


def logits(model_dir: Path, ids: torch.Tensor) -> torch.Tensor:
    return load_causal_lm(model_dir, device=CPU)(ids).logits.detach()


def test_without_noise_the_mixture_is_the_dense_model(tiny_world: World, tmp_path: Path) -> None:
    ids = torch.randint(0, 64, (2, 16))
    dense = logits(tiny_world.student, ids)
    same = upcycle(tiny_world.student, tmp_path / "same")
    near = upcycle(tiny_world.student, tmp_path / "near", noise=0.01)
    torch.testing.assert_close(logits(same, ids), dense, atol=1e-5, rtol=0.0)
    difference = (logits(near, ids) - dense).abs().max()
    assert 1e-5 < float(difference) < 0.1 * float(dense.abs().max())
    shape = read_model_config(near)
    assert shape.moe is not None and shape.moe.layers == tuple(range(shape.num_layers))
    assert ChatTokenizer.load(near).vocabulary.size == shape.vocab_size


def test_a_model_without_query_norms_is_refused(tiny_world: World, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only Qwen3ForCausalLM"):
        upcycle(tiny_world.teachers["sort"], tmp_path / "never")


def test_the_sampler_takes_experts_one_by_one(tiny_world: World, tmp_path: Path) -> None:
    one = upcycle(tiny_world.student, tmp_path / "one", noise=0.5)
    other = upcycle(tiny_world.student, tmp_path / "other", noise=0.5, seed=1)
    sampler = HfSampler(
        one,
        tokenizer=ChatTokenizer.load(one),
        device=CPU,
        options=SamplingOptions(
            seed=1, temperature=1.0, max_new_tokens=2, num_generations=1, stop_token_ids=()
        ),
        batch_size=1,
    )
    weights = load_file(other / "model.safetensors")  # the names that `iter_hf_weights` gives
    assert any(name.endswith("mlp.experts.3.up_proj.weight") for name in weights)
    sampler.load_weights(weights.items(), version=0)
    ids = torch.randint(0, 64, (1, 16))
    scores = torch.log_softmax(logits(other, ids)[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(torch.from_numpy(sampler.probe(ids[0].numpy()))[0], scores)
    del weights["model.layers.0.mlp.experts.2.gate_proj.weight"]
    with pytest.raises(StaleWeightsError, match=r"experts\.2\.gate_proj"):
        sampler.load_weights(weights.items(), version=1)
