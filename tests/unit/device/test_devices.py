"""Choosing a device, and exactly what the Megatron host shim touches."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from mopd.device import get_device
from mopd.device.cpu import REPLACED_SYMBOLS
from mopd.errors import ConfigError

needs_no_cuda = pytest.mark.skipif(
    torch.cuda.is_available(), reason="what the CPU backend does without a CUDA device"
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

EXPECTED_SYMBOLS = {
    # `torch` as these modules see it: "cuda" devices, generators and queues are the host's
    "megatron.core.distributed.param_and_grad_buffer.torch",
    "megatron.core.models.common.embeddings.rotary_pos_embedding.torch",
    "megatron.core.optimizer.clip_grads.torch",
    "megatron.core.optimizer.optimizer.torch",
    "megatron.core.pipeline_parallel.p2p_communication.torch",
    "megatron.core.pipeline_parallel.schedules.torch",
    "megatron.core.tensor_parallel.layers.torch",
    "megatron.core.tensor_parallel.mappings.torch",
    "megatron.core.tensor_parallel.random.torch",
    "megatron.core.transformer.utils.torch",
    "megatron.core.utils.torch",
    # the generator
    "megatron.core.tensor_parallel.random._get_cuda_rng_state",
    "megatron.core.tensor_parallel.random._set_cuda_rng_state",
    # run while host tensors pass for CUDA tensors
    "megatron.core.models.common.language_module.language_module."
    "LanguageModule.setup_embeddings_and_output_layer",
    "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.__init__",
    "megatron.core.optimizer.optimizer.Float16OptimizerWithFloat16Params.__init__",
    "megatron.core.optimizer.optimizer.clip_grad_by_total_norm_fp32",
}

# Every global of every megatron module, every attribute of their classes, and torch's own names,
# before and after; twice, because the second call must change nothing.
PROBE = """
import inspect, json, sys
import mopd.student.model, mopd.student.optim, mopd.student.step
import torch
from mopd.device import get_device

def names():
    found = {}
    owners = [m for n, m in sys.modules.items() if n.startswith("megatron")]
    for module in owners + [torch, torch.cuda, torch.Tensor, torch.distributed]:
        path = module.__name__ if inspect.ismodule(module) else "torch.Tensor"
        for name, value in list(vars(module).items()):
            found[f"{path}.{name}"] = id(value)
            if inspect.isclass(value) and value.__module__.startswith("megatron"):
                for key, member in vars(value).items():
                    found[f"{value.__module__}.{value.__qualname__}.{key}"] = id(member)
    return found

def changed(before, after):
    return sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))

snapshots = [names()]
for _ in range(2):
    get_device("cpu").prepare_megatron()
    snapshots.append(names())
print(json.dumps([changed(a, b) for a, b in zip(snapshots, snapshots[1:])]))
"""


def test_the_table_names_every_symbol() -> None:
    assert set(REPLACED_SYMBOLS) == EXPECTED_SYMBOLS
    assert len(REPLACED_SYMBOLS) == len(EXPECTED_SYMBOLS)


@needs_no_cuda
def test_the_shim_replaces_exactly_the_table() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    first, second = json.loads(done.stdout)
    assert set(first) == EXPECTED_SYMBOLS
    assert second == []


@needs_no_cuda
def test_auto_is_the_cpu_here() -> None:
    backend = get_device("auto")
    assert (backend.name, backend.dist_backend) == ("cpu", "gloo")
    assert backend.device(3) == torch.device("cpu")
    backend.set_device(3)
    backend.synchronize()
    assert backend.memory_stats()["peak"] > 2**20


@needs_no_cuda
def test_cuda_that_is_absent_names_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"run\.device=cpu"):
        get_device("cuda")


def test_npu_that_is_absent_names_the_remedy() -> None:
    with pytest.raises(ConfigError, match="torch_npu, which is not installed"):
        get_device("npu")


def test_an_unknown_device_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="auto, cpu, cuda, npu"):
        get_device("tpu")


@pytest.mark.gpu
@needs_cuda
def test_the_shim_refuses_a_machine_with_cuda() -> None:
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES="):
        get_device("cpu").prepare_megatron()


@pytest.mark.gpu
@needs_cuda
def test_cuda_backend() -> None:
    backend = get_device("cuda")
    backend.set_device(0)
    torch.zeros(2**20, device=backend.device(0))
    backend.synchronize()
    assert backend.memory_stats()["peak"] >= 2**22
    with pytest.raises(ConfigError, match="processes per host"):
        backend.set_device(torch.cuda.device_count())
