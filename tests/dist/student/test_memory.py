"""The estimate of a student's memory against the bytes of real Megatron students."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mopd.config.model_shape import read_model_config
from mopd.config.schema import RunConfig
from mopd.runtime.memory_student import (
    StudentJob,
    activations_per_token,
    local_size,
    weight_parts,
)
from tests.dist.student.worlds import Layout, Run, make_model
from tests.helpers import memory
from tests.helpers.dist import run_ranks

BF16 = {"dtype": "bfloat16"}
DISTRIBUTED = {"use_distributed_optimizer": True}
ROWS, LENGTH = 4, 256


@dataclass(frozen=True)
class Case:
    family: str
    layout: Layout = field(default_factory=Layout)
    student: dict[str, Any] = field(default_factory=dict)

    def run(self, directory: Path) -> Run:
        model = make_model(self.family, directory / self.family)
        return Run(model_dir=str(model), layout=self.layout, student=self.student)

    def job(self, run: Run) -> StudentJob:
        config = RunConfig.model_validate(
            {"student": {"parallel": self.layout.section.model_dump(), **self.student}}
        )
        return StudentJob(
            config=config,
            shape=read_model_config(run.model_dir),
            num_ranks=self.layout.world_size,
            device_type="cpu",
        )


EXACT = {
    "qwen3": Case("qwen3"),
    "qwen2 in bfloat16": Case("qwen2", student=BF16),
    "experts": Case("moe-mixed", student=BF16),
    "adapters": Case("qwen3", student={"lora": {"rank": 4}}),
    "frozen": Case("llama", student={"freeze": [r"model\.embed_tokens\..*", r".*\.mlp\..*"]}),
    "tensor parallel": Case("qwen3", Layout(tp=2)),
    "adapters, tensor parallel": Case("llama", Layout(tp=2), {"lora": {"rank": 4}}),
    "pipeline": Case("qwen3", Layout(pp=2), BF16),
}


@pytest.mark.parametrize("name", EXACT)
def test_weights_gradients_and_optimizer_are_exact(name: str, tmp_path: Path) -> None:
    case = EXACT[name]
    run = case.run(tmp_path)
    job, layout = case.job(run), case.layout
    counted = run_ranks(memory.bytes_after_a_step, layout.world_size, run)
    for rank, found in enumerate(counted):
        stage = rank * layout.pp // layout.world_size
        assert found == weight_parts(job, stage=stage), (rank, found)


@pytest.mark.parametrize(
    "case",
    [
        Case("llama", Layout(dp=2), BF16),
        Case("moe", Layout(dp=2, ep=2), BF16),
        Case("qwen3", Layout(dp=2)),
    ],
)
def test_the_distributed_optimizer_up_to_its_padding(case: Case, tmp_path: Path) -> None:
    run = case.run(tmp_path)
    estimate = weight_parts(_split(case.job(run)), stage=0)
    for found in run_ranks(memory.bytes_after_a_step, 2, run, True):
        assert found["weights"] == estimate["weights"]
        assert found["gradients"] == pytest.approx(estimate["gradients"], rel=0.02)
        assert found["optimizer"] == pytest.approx(estimate["optimizer"], rel=0.02)


def _split(job: StudentJob) -> StudentJob:
    values = job.config.model_dump()
    values["student"]["optimizer"] = DISTRIBUTED
    return StudentJob(
        config=RunConfig.model_validate(values),
        shape=job.shape,
        num_ranks=job.num_ranks,
        device_type=job.device_type,
    )


FORWARD = {
    "llama": (Case("llama"), 0.03),
    "qwen3": (Case("qwen3"), 0.03),
    "qwen3 in bfloat16": (Case("qwen3", student=BF16), 0.03),
    "qwen2 in bfloat16": (Case("qwen2", student=BF16), 0.03),
    "selective": (Case("llama", student={"recompute": {"granularity": "selective"}}), 0.03),
    # next to nothing is kept, so that the embeddings' output, kept or not, shows
    "full": (Case("llama", student={"recompute": {"granularity": "full"}}), 0.25),
    "full, one layer": (
        Case("llama", student={"recompute": {"granularity": "full", "method": "block"}}),
        0.03,
    ),
    "adapters": (Case("qwen3", student={"lora": {"rank": 4}}), 0.03),
    "experts": (Case("moe", student=BF16), 0.03),
    "tensor parallel": (Case("qwen3", Layout(tp=2)), 0.05),
    "sequence parallel": (Case("qwen3", Layout(tp=2, sequence_parallel=True)), 0.05),
    "experts, parallel": (
        Case("moe", Layout(tp=2, dp=2, ep=2, sequence_parallel=True), BF16),
        0.1,
    ),
}


@pytest.mark.parametrize("name", FORWARD)
def test_activations_are_what_autograd_keeps(name: str, tmp_path: Path) -> None:
    case, tolerance = FORWARD[name]
    run = case.run(tmp_path)
    found = run_ranks(memory.bytes_of_forward, case.layout.world_size, run, ROWS, LENGTH)
    kept, _ = activations_per_token(case.job(run), stage=0)
    assert kept * ROWS * LENGTH == pytest.approx(sum(found) / len(found), rel=tolerance)


def test_a_vocabulary_is_padded_to_the_ranks(tmp_path: Path) -> None:
    from mopd.config.slots import build_slots

    shape = read_model_config(make_model("qwen3", tmp_path))  # 67 tokens
    slots = {slot.kind: slot for slot in build_slots(shape, pp_size=1)}
    assert local_size(slots["vocab"], 2) == 34 * shape.hidden_size
    assert local_size(slots["whole"], 2) == shape.hidden_size
