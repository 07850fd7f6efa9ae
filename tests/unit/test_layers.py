"""The architecture as a test: which package may import which, and what nobody may call.

Every rule has a mutation test below it: a module that breaks the rule is caught.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

import pytest

from tests.helpers.source import Source, shipped

# From the top down. A package imports from the groups below its own, and from itself.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("launch",),
    ("mopd.cli",),
    ("mopd.demo", "mopd.study"),
    ("mopd.api",),
    ("mopd.runtime",),
    ("mopd.student", "mopd.rollout", "mopd.teachers", "mopd.report"),
    ("mopd.align", "mopd.projection", "mopd.losses", "mopd.serving"),
    ("mopd.tokens", "mopd.config", "mopd.device", "mopd.metrics", "mopd.storage"),
    ("mopd.environment",),
    ("mopd.types", "mopd.errors", "mopd.fault_points"),
    ("mopd",),
)
DEPTH = {package: depth for depth, group in enumerate(LAYERS) for package in group}

# The root is below everything, and hands on the library's names when they are first used.
HANDED_ON = ("mopd", "mopd.api")

# Who may import a library: module prefixes.
LIBRARIES = {
    "megatron": ("mopd.student", "mopd.device"),
    "ray": ("mopd.runtime.ray", "mopd.teachers.ray", "mopd.rollout.ray", "launch"),
    "vllm": ("mopd.serving",),
    "torch_npu": ("mopd.device.npu",),
    "mindspeed": ("mopd.device.npu",),
}

# What runs code or reads formats that run code, and what to use instead.
FORBIDDEN = {
    "pickle.load": "safetensors or JSON",
    "pickle.loads": "safetensors or JSON",
    "pickle.Unpickler": "safetensors or JSON",
    "torch.load": "safetensors",
    "torch.save": "safetensors",
    "yaml.load": "OmegaConf.load",
    "yaml.full_load": "OmegaConf.load",
    "yaml.unsafe_load": "OmegaConf.load",
    "eval": "a parser",
    "exec": "a function",
    "os.system": "subprocess.run with a list",
    "os.popen": "subprocess.run with a list",
}
# Who may do it all the same, with the reason.
ALLOWED = {
    ("mopd.projection.nemo", "torch.load"): "NeMo-RL's own format, read with weights_only=True",
}


def layer_of(name: str) -> str | None:
    """The package of LAYERS that a dotted name belongs to; None for other libraries."""
    if name.split(".")[0] not in ("mopd", "launch"):
        return None
    found = [package for package in DEPTH if _inside(name, package)]
    longest = max(found, key=len)
    is_root = longest == "mopd" and name.count(".") and not name.rpartition(".")[2].startswith("__")
    return name if is_root else longest


def _inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def upward_imports(source: Source) -> Iterator[str]:
    own = layer_of(source.module)
    if own not in DEPTH:
        yield f"{source.module}: has no place in LAYERS"
        return
    for name in source.imports():
        other = layer_of(name)
        if other is None or other == own or (source.module, other) == HANDED_ON:
            continue
        if other not in DEPTH:
            yield f"{source.module}: {name} has no place in LAYERS"
        elif DEPTH[other] <= DEPTH[own]:
            yield f"{source.module}: imports {name}, which is not below it"


def demo_outside_its_users(source: Source) -> Iterator[str]:
    if source.package in ("mopd.demo", "mopd.cli") or source.module.startswith("launch"):
        return
    names = {name for name in source.imports() if _inside(name, "mopd.demo")}
    texts = {node.value for node in ast.walk(source.tree) if isinstance(node, ast.Constant)}
    names |= {text for text in texts if isinstance(text, str) and _names_demo(text)}
    yield from (f"{source.module}: names {name}" for name in sorted(names))


def _names_demo(text: str) -> bool:
    return text == "mopd.demo" or text.startswith(("mopd.demo.", "mopd.demo:"))


def misplaced_libraries(source: Source) -> Iterator[str]:
    for name in source.imports():
        allowed = LIBRARIES.get(name.split(".")[0])
        if allowed and not any(_inside(source.module, place) for place in allowed):
            yield f"{source.module}: imports {name}; only {', '.join(allowed)} may"


def torch_in_config(source: Source) -> Iterator[str]:
    if source.package == "mopd.config":
        for name in source.imports():
            if _inside(name, "torch"):
                yield f"{source.module}: imports {name}; reading a recipe costs no torch"


def collectives_in_losses(source: Source) -> Iterator[str]:
    if source.package == "mopd.losses" and source.module != "mopd.losses.vocab":
        for name in {*source.imports(), *source.dotted_names()}:
            if _inside(name, "torch.distributed"):
                yield f"{source.module}: uses {name}; only mopd.losses.vocab may"


def forbidden_calls(source: Source) -> Iterator[str]:
    for name in {*source.imports(), *source.dotted_names()}:
        if (source.module, name) in ALLOWED:
            continue
        if remedy := FORBIDDEN.get(name.removeprefix("builtins.")):
            yield f"{source.module}: uses {name}; use {remedy}"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.keyword) and node.arg == "shell":
            is_off = isinstance(node.value, ast.Constant) and not node.value.value
            if not is_off:
                yield f"{source.module}: passes shell=; pass a list of words instead"


RULES: tuple[Callable[[Source], Iterator[str]], ...] = (
    upward_imports,
    demo_outside_its_users,
    misplaced_libraries,
    torch_in_config,
    collectives_in_losses,
    forbidden_calls,
)


@pytest.mark.parametrize("rule", RULES)
def test_shipped_code_keeps_the_rule(rule: Callable[[Source], Iterator[str]]) -> None:
    assert [problem for source in shipped() for problem in rule(source)] == []


def test_every_rule_sees_the_whole_package() -> None:
    modules = {source.module for source in shipped()}
    assert {"mopd", "mopd.types", "mopd.config.schema", "mopd.cli.main"} <= modules


def test_no_permission_is_left_over() -> None:
    used = {(source.module, name) for source in shipped() for name in source.dotted_names()}
    assert set(ALLOWED) <= used


MUTATIONS = [
    (upward_imports, "mopd.losses.bad", "from mopd.runtime import loop"),
    (upward_imports, "mopd.losses.bad", "from mopd.align.batch import pack"),
    (upward_imports, "mopd.losses.bad", "from ..align import batch"),
    (upward_imports, "mopd.losses.bad", "from .. import align"),
    (upward_imports, "mopd.losses.bad", "from mopd import align"),
    (upward_imports, "mopd.losses.bad", "def late():\n    import mopd.student.step"),
    (
        upward_imports,
        "mopd.losses.bad",
        "import importlib\nimportlib.import_module('mopd.student')",
    ),
    (upward_imports, "mopd.losses.bad", "importlib.import_module(f'mopd.student.{name}')"),
    (upward_imports, "mopd.teachers.bad", "from mopd.rollout import base"),
    (upward_imports, "mopd.types", "from mopd.errors import MopdError"),
    (upward_imports, "mopd.types", "from mopd.config import RunConfig"),
    (upward_imports, "mopd.runtime.bad", "import mopd.cli.main"),
    (upward_imports, "mopd.demo.bad", "import mopd.cli.main"),
    (upward_imports, "mopd.cli.bad", "from launch import train"),
    (upward_imports, "mopd", "import importlib\nimportlib.import_module('mopd.runtime')"),
    (upward_imports, "mopd.runtime.bad", "from mopd.api import ctkd_loss"),
    (upward_imports, "mopd.utils", ""),
    (upward_imports, "mopd.losses.bad", "from mopd.utils import helper"),
    (demo_outside_its_users, "mopd.runtime.bad", "from mopd.demo import ensure_world"),
    (demo_outside_its_users, "mopd.runtime.bad", "from mopd import demo"),
    (demo_outside_its_users, "mopd.runtime.bad", "target = 'mopd.demo:ensure_world'"),
    (misplaced_libraries, "mopd.runtime.bad", "from megatron.core import mpu"),
    (misplaced_libraries, "mopd.losses.bad", "import megatron.core as core"),
    (misplaced_libraries, "mopd.runtime.loop", "import ray"),
    (misplaced_libraries, "mopd.teachers.vllm", "def late():\n    from vllm import LLM"),
    (misplaced_libraries, "mopd.teachers.rays", "import ray"),
    (misplaced_libraries, "mopd.student.bad", "def late():\n    import torch_npu"),
    (misplaced_libraries, "mopd.device.base", "from mindspeed import megatron_adaptor"),
    (torch_in_config, "mopd.config.bad", "import torch"),
    (torch_in_config, "mopd.config.bad", "def late():\n    from torch import nn"),
    (collectives_in_losses, "mopd.losses.bad", "import torch.distributed as dist"),
    (collectives_in_losses, "mopd.losses.bad", "from torch import distributed"),
    (collectives_in_losses, "mopd.losses.bad", "from torch.distributed import all_reduce"),
    (collectives_in_losses, "mopd.losses.bad", "import torch\ntorch.distributed.all_reduce(x)"),
    (collectives_in_losses, "mopd.losses.bad", "import torch as t\nt.distributed.barrier()"),
    (forbidden_calls, "mopd.runtime.bad", "import pickle\npickle.load(f)"),
    (forbidden_calls, "mopd.runtime.bad", "import pickle as p\np.loads(b)"),
    (forbidden_calls, "mopd.runtime.bad", "from pickle import load"),
    (forbidden_calls, "mopd.runtime.bad", "import torch\ntorch.load(f, weights_only=True)"),
    (forbidden_calls, "mopd.projection.nemo", "import torch\ntorch.save(x, f)"),
    (forbidden_calls, "mopd.runtime.bad", "from torch import save as keep\nkeep(x, f)"),
    (forbidden_calls, "mopd.runtime.bad", "import yaml\nyaml.load(f, yaml.SafeLoader)"),
    (forbidden_calls, "mopd.runtime.bad", "eval('1')"),
    (forbidden_calls, "mopd.runtime.bad", "import builtins\nbuiltins.exec('1')"),
    (forbidden_calls, "mopd.runtime.bad", "run = exec"),
    (forbidden_calls, "mopd.runtime.bad", "subprocess.run('ls', shell=True)"),
    (forbidden_calls, "mopd.runtime.bad", "subprocess.run('ls', shell=wanted)"),
    (forbidden_calls, "mopd.runtime.bad", "import os\nos.system('ls')"),
]


@pytest.mark.parametrize(("rule", "module", "text"), MUTATIONS)
def test_a_module_that_breaks_the_rule_is_caught(
    rule: Callable[[Source], Iterator[str]], module: str, text: str
) -> None:
    assert list(rule(Source(module, text)))


def test_every_rule_has_a_mutation() -> None:
    assert {rule for rule, _, _ in MUTATIONS} == set(RULES)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("mopd.losses.good", "from . import vocab\nfrom mopd.types import Prompt\nimport torch"),
        ("mopd.losses.vocab", "import torch.distributed as dist\ndist.all_reduce(x)"),
        ("mopd.runtime.good", "model.eval()\nstate.load()\nfrom mopd import __version__"),
        ("mopd.runtime.ray", "import ray\nsubprocess.run(['ls'], shell=False)"),
        ("mopd.teachers.ray", "import ray"),
        ("mopd.student.model", "from megatron.core import mpu"),
        ("mopd.cli.world", "from mopd.demo import ensure_world"),
        ("launch.train", "import ray\nfrom mopd.demo import ensure_world"),
    ],
)
def test_a_module_that_keeps_the_rules_is_left_alone(module: str, text: str) -> None:
    assert [problem for rule in RULES for problem in rule(Source(module, text))] == []
