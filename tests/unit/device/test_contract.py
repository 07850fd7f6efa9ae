"""The contract of device backends: on this CPU, on CUDA, and for NPUs against a stand-in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mopd.device import DeviceBackend, get_device
from tests.helpers.runs import ROOT
from tests.unit.device.contract import CONTRACT, Check

HELPERS = ROOT / "tests" / "helpers"
STAND_IN, MINDSPEED = HELPERS / "torch_npu_stand_in", HELPERS / "mindspeed_stand_in"
METHODS = {name for name, value in vars(DeviceBackend).items() if callable(value)} - {
    name for name in vars(DeviceBackend) if name.startswith("_")
}

# Every function of torch.cuda raises for whoever in mopd calls it; transfer_to_npu replaces them.
WITHOUT_CUDA = """
import functools, sys, types
import torch

def guarded(name, function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("mopd."):
            raise AssertionError(f"{caller} calls torch.cuda.{name}")
        return function(*args, **kwargs)
    return call

for name, value in list(vars(torch.cuda).items()):
    if isinstance(value, types.FunctionType):
        setattr(torch.cuda, name, guarded(name, value))
"""


def on_npu(script: str, *paths: Path, **variables: str) -> str:
    """What ``script`` prints in a process that has the stand-in, and ``paths``."""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:mopd", "-c", WITHOUT_CUDA + script],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables}
        | {"PYTHONPATH": os.pathsep.join(str(path) for path in (STAND_IN, *paths, ROOT))},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="megatron-core uses the CUDA device here")
@pytest.mark.parametrize("check", CONTRACT)
def test_cpu(check: Check) -> None:
    check(get_device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("check", CONTRACT)
def test_cuda(check: Check) -> None:
    check(get_device("cuda"))


def test_npu() -> None:
    said = on_npu("""
import mopd.student
from mopd.device import get_device
from tests.unit.device.contract import CONTRACT
assert get_device("auto").name == "npu"
for check in CONTRACT:
    check(get_device("npu"))
    print("kept", check.__name__)
""")
    assert [line[5:] for line in said.splitlines() if line.startswith("kept ")] == [
        check.__name__ for check in CONTRACT
    ]


def test_npu_without_bfloat16() -> None:
    said = on_npu(
        """
from mopd.device import get_device
from tests.unit.device.contract import knows_whether_it_has_bfloat16
assert not get_device("npu").supports_bf16()
knows_whether_it_has_bfloat16(get_device("npu"))
print("kept")
""",
        STAND_IN_BF16="0",
    )
    assert "kept" in said


def test_the_contract_names_every_method() -> None:
    text = (ROOT / "tests" / "unit" / "device" / "contract.py").read_text()
    assert {name for name in METHODS if f".{name}(" not in text} == set()


def test_student_starts_on_the_stand_in() -> None:
    """Groups, generators and weights of a process whose accelerator is an NPU."""
    said = on_npu("""
import torch
from mopd.config.schema import ParallelSection
from mopd.device import get_device
from mopd.student.parallel import initialize, shutdown
from mopd.student.rng import capture_rng, restore_rng
from mopd.student.spec import _norm_weight
from types import SimpleNamespace

topology = initialize(ParallelSection(), backend=get_device("npu"), seed=1)
assert (topology.device.type, topology.device.index) == ("npu", 0)
assert torch.distributed.get_backend() == "hccl"
tensors, values = capture_rng()
assert "npu" in tensors and "cuda" not in tensors
torch.npu.manual_seed(99)
assert not torch.equal(torch.npu.get_rng_state(), tensors["npu"])
restore_rng(tensors, values)
assert torch.equal(torch.npu.get_rng_state(), tensors["npu"])
_norm_weight(SimpleNamespace(params_dtype=torch.float32, sequence_parallel=False), 4)
shutdown()
print("done")
""")
    assert "done" in said


CUDA_CALL = """
import types, sys
source = types.ModuleType("mopd.bad")
exec(compile("import torch\\ntorch.cuda.is_available()", "bad", "exec"), vars(source))
"""


def test_the_guard_sees_a_call_of_cuda() -> None:
    with pytest.raises(AssertionError, match=r"mopd\.bad calls torch\.cuda\.is_available"):
        on_npu(CUDA_CALL)


LOADED: dict[str, tuple[tuple[Path, ...], dict[str, str], bool]] = {
    "without MindSpeed": ((), {}, False),
    "with MindSpeed": ((MINDSPEED,), {}, True),
    "MindSpeed left out": ((MINDSPEED,), {"MOPD_MINDSPEED": "no"}, False),
}


@pytest.mark.parametrize("case", LOADED)
def test_adaptors_come_before_megatron(case: str) -> None:
    paths, variables, expected = LOADED[case]
    said = on_npu(
        """
import sys
sys.argv = ["train.py", "--tensor-model-parallel-size", "2"]
import mopd.student
assert "torch_npu.contrib.transfer_to_npu" in sys.modules
adaptor = sys.modules.get("mindspeed.megatron_adaptor")
print("adaptor", adaptor is not None)
if adaptor is not None:
    assert adaptor.BEFORE_MEGATRON and adaptor.READ == ()
assert sys.argv[1:] == ["--tensor-model-parallel-size", "2"]
""",
        *paths,
        **variables,
    )
    assert f"adaptor {expected}" in said
    assert ("MOPD_MINDSPEED=0 leaves it out" in said) is expected


REFUSED: dict[str, tuple[str, dict[str, str]]] = {
    "megatron-core was imported before": ("import megatron.core\nimport mopd.student", {}),
    "sees no NPU; check the driver and ASCEND_RT_VISIBLE_DEVICES": (
        "from mopd.device import get_device\nget_device('npu')",
        {"STAND_IN_NPUS": "0"},
    ),
    "MOPD_MINDSPEED: the environment has 'perhaps'": (
        "import mopd.student",
        {"MOPD_MINDSPEED": "perhaps"},
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_run_on_npus_is_told(message: str) -> None:
    script, variables = REFUSED[message]
    with pytest.raises(AssertionError, match="ConfigError") as caught:
        on_npu(script, MINDSPEED, **variables)
    assert message in str(caught.value)


def test_auto_without_an_npu_is_the_cpu() -> None:
    said = on_npu(
        """
from mopd.device import get_device
import mopd.device.base as base
base.torch.cuda.is_available = lambda: False
print(get_device("auto").name)
""",
        STAND_IN_NPUS="0",
    )
    assert said.split()[-1] == "cpu"
