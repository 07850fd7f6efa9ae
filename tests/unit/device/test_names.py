"""Names of accelerators in mopd's code: CUDA's in few places, torch_npu's only published ones."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator

import pytest
import torch

from tests.helpers.source import ROOT, Source, read_source, shipped
from tests.helpers.wheels import LINUX, Wheel, fetch

# Who may name CUDA or NCCL, and why.
NAMES_CUDA = {
    "mopd.config.schema": "the values of run.device",
    "mopd.config.cluster": "the kinds of devices, by the values of run.device",
    "mopd.environment": "the variables, by the values of run.device",
    "mopd.device.base": "the backends, by the values of run.device",
    "mopd.device.cuda": "the CUDA backend",
    "mopd.device.cpu": "what megatron-core calls CUDA is the host's",
    "mopd.serving.channel": "NCCL from CUDA to CUDA; other devices broadcast with gloo",
    "mopd.serving.hf_sampler": "the same, for a server's own thread",
    "mopd.serving.sampling": "the same, in what a server says and is told",
    "mopd.rollout.push": "the same, on the trainer's side",
}
CUDA_TEXT = re.compile(r"(cuda|nccl)(:\d+)?")


def cuda_names(source: Source) -> Iterator[str]:
    for name in {*source.imports(), *source.dotted_names()}:
        if re.match(r"torch\.(cuda|backends\.cudnn)\b|.*\bProcessGroupNCCL\b", name):
            yield f"{source.module}: names {name}"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if CUDA_TEXT.fullmatch(node.value):
                yield f"{source.module}: says {node.value!r}"
        elif isinstance(node, ast.Attribute) and node.attr in ("cuda", "is_cuda"):
            yield f"{source.module}: takes .{node.attr}"


def test_cuda_is_named_where_it_must_be() -> None:
    found = [name for s in shipped() if s.module not in NAMES_CUDA for name in cuda_names(s)]
    assert found == []


def test_no_permission_is_left_over() -> None:
    sources = {source.module: source for source in shipped()}
    assert [module for module in NAMES_CUDA if not any(cuda_names(sources[module]))] == []


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.cuda.synchronize()",
        "from torch import cuda\ncuda.is_available()",
        "from torch.cuda import Stream",
        "model.cuda()",
        "if tensor.is_cuda: ...",
        "torch.zeros(2, device='cuda')",
        "torch.device('cuda:0')",
        "dist.new_group(backend='nccl')",
    ],
)
def test_a_module_that_names_cuda_is_caught(text: str) -> None:
    assert list(cuda_names(Source("mopd.student.bad", text)))


def torch_npu_names(source: Source) -> set[str]:
    """Dotted torch_npu names in ``source``; `_npu()` in it is torch_npu.npu."""
    found = {
        n for n in {*source.imports(), *source.dotted_names()} if n.split(".")[0] == "torch_npu"
    }
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Call):
            if isinstance(node.value.func, ast.Name) and node.value.func.id == "_npu":
                found.add(f"torch_npu.npu.{node.attr}")
        elif isinstance(node, ast.Constant) and _is_dotted(node.value):
            found.add(str(node.value))
    return found - {"torch_npu"}


def _is_dotted(value: object) -> bool:
    return isinstance(value, str) and bool(re.fullmatch(r"torch_npu(\.\w+)+", value))


@functools.cache
def used_names() -> frozenset[str]:
    return frozenset(name for source in shipped() for name in torch_npu_names(source))


@pytest.fixture(scope="module")
def wheel() -> Wheel:
    """torch_npu's release of this torch's minor version, 44 MB."""
    minor = ".".join(torch.__version__.split(".")[:2])
    name = f"torch_npu-{minor}.*-cp311-*x86_64.whl"
    return Wheel(fetch(f"torch_npu=={minor}.*", pattern=name, options=LINUX))


def test_every_torch_npu_name_is_published(wheel: Wheel) -> None:
    used = used_names()
    assert {"torch_npu.npu.set_device", "torch_npu.contrib.transfer_to_npu"} <= used
    assert sorted(name for name in used if not wheel.has(name)) == []


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("torch_npu.npu", True),
        ("torch_npu.npu.memory_allocated", True),  # by a star import
        ("torch_npu.npu.get_rng_state", True),
        ("torch_npu.npu.no_such_function", False),
        ("torch_npu.contrib.transfer_to_gpu", False),
        ("torch_npu.no_such_module.set_device", False),
    ],
)
def test_a_made_up_name_is_not_published(wheel: Wheel, name: str, published: bool) -> None:
    assert wheel.has(name) is published


def test_a_made_up_call_is_found() -> None:
    text = "def f():\n    _npu().no_such_function()\nR = 'torch_npu.contrib.made_up'"
    assert torch_npu_names(Source("mopd.device.npu", text)) == {
        "torch_npu.npu.no_such_function",
        "torch_npu.contrib.made_up",
    }


def test_the_stand_in_has_published_names_alone(wheel: Wheel) -> None:
    folder = ROOT / "tests" / "helpers" / "torch_npu_stand_in" / "torch_npu"
    tree = read_source(folder / "npu.py").tree
    names = {
        f"torch_npu.npu.{node.name}" for node in tree.body if isinstance(node, ast.FunctionDef)
    }
    assert len(names) > 10
    assert sorted(name for name in names if not wheel.has(name)) == []
    assert {name for name in used_names() if name.count(".") == 2} <= names | {
        "torch_npu.contrib.transfer_to_npu"
    }


def test_the_docs_list_every_torch_npu_name() -> None:
    text = (ROOT / "docs" / "devices.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `(torch_npu[\w.]+)` \|", text, flags=re.MULTILINE))
    assert listed == {name for name in used_names() if name != "torch_npu.npu"}
    assert "not yet run on hardware" in text
