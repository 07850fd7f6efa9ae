"""A real vLLM server takes the weights of a mixture of experts under the names mopd gives them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mopd.demo import World
from mopd.serving.models import load_causal_lm
from tests.helpers.plain_model import PlainModel
from tests.helpers.samplers import Site
from tests.helpers.upcycle import upcycle
from tests.helpers.vllm_server import run_vllm_server, vllm_python

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def scores(model_dir: Path, ids: np.ndarray) -> np.ndarray:
    model = load_causal_lm(model_dir, device=torch.device("cpu"))
    logits = model(torch.from_numpy(ids)[None]).logits[0, :-1].detach()
    chosen = torch.log_softmax(logits, -1).gather(1, torch.from_numpy(ids[1:])[:, None])
    return chosen[:, 0].numpy()


def test_experts_are_reloaded(tiny_world: World, tmp_path: Path) -> None:
    vllm_python()
    one, other = (
        upcycle(tiny_world.student, tmp_path / str(seed), noise=1.0, router_std=0.5, seed=seed)
        for seed in (0, 1)
    )
    ids = np.random.default_rng(0).integers(3, 60, 24)
    wanted = scores(one, ids), scores(other, ids)
    assert np.abs(wanted[0] - wanted[1]).max() > 0.1
    with run_vllm_server(one, log=tmp_path / "log", sampling=True) as server:
        site = Site(urls=(server.url,), model=PlainModel(one), root=tmp_path / "weights")
        for mode in ("files", "broadcast"):
            with site.sampler(mode) as sampler:
                for version, model_dir in enumerate((one, other, one)):
                    weights = load_file(model_dir / "model.safetensors")
                    sampler.load_weights(weights.items(), version=version)
                    found = sampler.probe(ids)
                    np.testing.assert_allclose(found[0], wanted[version % 2], atol=1e-3)
