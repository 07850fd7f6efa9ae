"""A whole short run that trains adapters: what it leaves behind, and that it continues."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mopd.demo import World
from tests.helpers.dist import run_ranks
from tests.helpers.runs import step_lines, train_here, words

pytestmark = [pytest.mark.dist, pytest.mark.e2e]

TARGETS = ("q_proj", "v_proj", "down_proj")
KEYS: dict[str, Any] = {
    "student__lora__rank": 8,
    "student__lora__target_modules": f"[{','.join(TARGETS)}]",
    "student__optimizer__lr": 1e-2,
    "train__steps": 4,
    "checkpoint__save_interval": 2,
    "evaluate__max_prompts_per_domain": 2,
    "student__parallel__tensor_model_parallel_size": 2,
}


def run(world: World, directory: Path, **keys: Any) -> Path:
    overrides = words(world, directory, "run", **(KEYS | keys))
    run_ranks(train_here, 2, "mopd_ctkd", overrides, timeout=120)
    return directory / "run"


def test_a_run_leaves_an_adapter_and_a_merged_model(tiny_world: World, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    done = run(tiny_world, tmp_path)
    lines = step_lines(done)
    assert len(lines) == 4 and all(line["grad_norm"] > 0 for line in lines)
    assert all(line["sync/probe"] < 1e-4 for line in lines)  # the sampler has merged weights

    base = AutoModelForCausalLM.from_pretrained(tiny_world.student, dtype=torch.float32)
    source = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = PeftModel.from_pretrained(base, str(done / "adapter"))
    merged = model.merge_and_unload().state_dict()
    saved = load_file(done / "hf" / "model.safetensors")
    for name, tensor in saved.items():
        torch.testing.assert_close(tensor, merged[name], atol=1e-6, rtol=1e-5)
        learned = name.split(".")[-2] in TARGETS
        assert torch.equal(tensor, source[name]) != learned, name
    described = json.loads((done / "adapter" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(tiny_world.student)

    # from the checkpoint at step 2 the run ends in the same adapter, bit by bit
    adapter = (done / "adapter" / "adapter_model.safetensors").read_bytes()
    (done / "checkpoints" / "latest").write_text("step-000002")
    (done / "summary.json").unlink()
    run(tiny_world, tmp_path)
    assert (done / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    assert step_lines(done) == lines

    # another run starts from it, and with next to no learning rate ends there
    keys = {"student__lora__path": done / "adapter", "train__steps": 1}
    more = run(tiny_world, tmp_path / "more", student__optimizer__lr=1e-12, **keys)
    other = load_file(more / "adapter" / "adapter_model.safetensors")
    for name, tensor in load_file(done / "adapter" / "adapter_model.safetensors").items():
        torch.testing.assert_close(other[name], tensor, atol=1e-9, rtol=1e-6)
