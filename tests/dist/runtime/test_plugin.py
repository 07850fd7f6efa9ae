"""mopd's losses in another script: with both of Megatron's ways to divide, and as documented."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from mopd.config.schema import StudentSection
from mopd.demo import World
from mopd.device import get_device
from mopd.errors import ConfigError
from mopd.runtime.plugin import Distillation
from mopd.student.model import build_student
from mopd.student.parallel import initialize
from tests.dist.student.worlds import Layout
from tests.helpers.dist import run_ranks
from tests.helpers.runs import ROOT, environment

NAMES = ("sort", "upper")
Gradient = dict[str, torch.Tensor]


def recipe(world: World, cache: str, *more: str) -> list[str]:
    return [
        f"student.tokenizer={world.student}",
        f"cache_dir={cache}",
        "train.micro_batch_size=3",
        *(f"teachers.{name}.model={world.teachers[name]}" for name in NAMES),
        *(f"teachers.{name}.domains=[{name}]" for name in NAMES),
        *more,
    ]


def gradient(
    world: World, cache: str, layout: Layout, per_token: bool, more: tuple[str, ...]
) -> tuple[float, Gradient]:
    """Of one step on eight answers, dealt to the replicas 3 : 5, under a loop of our own."""
    topology = initialize(layout.section, backend=get_device("cpu"), seed=1)
    section = StudentSection(model=str(world.student), parallel=layout.section)
    model = build_student(section, topology=topology)
    (chunk,) = model.chunks
    chunk.config.calculate_per_token_loss = per_token
    chunk.config.finalize_model_grads_func = None
    mopd = Distillation.from_recipe(
        "mopd_ctkd",
        recipe(world, cache, *more),
        padded_vocab_size=model.padded_vocab_size,
        device="cpu",
        domains=NAMES,
    )
    lines = Path(world.data).read_text().splitlines()
    rows = [json.loads(line) for line in (*lines[:4], *lines[-4:])]
    mine = rows if layout.dp == 1 else (rows[:3], rows[3:])[topology.dp_rank]
    batch = mopd.batch([answer(mopd, row) for row in mine])
    assert len(batch.micro_batches) == -(-len(mine) // 3)
    found = get_forward_backward_func()(
        forward_step_func=mopd.forward_step(batch),
        data_iterator=iter(batch.micro_batches),
        model=chunk,
        num_microbatches=len(batch.micro_batches),
        seq_length=batch.micro_batches[0].tokens.shape[1],
        micro_batch_size=len(batch.micro_batches[0].tokens),
        forward_only=False,
    )
    mopd.close()
    gradients = {}
    for name, parameter in chunk.named_parameters():
        # what Megatron's data-parallel wrapper does in the two cases
        total = parameter.main_grad
        dist.all_reduce(total, group=topology.dp_cp_group)
        gradients[name] = total / (batch.num_tokens if per_token else layout.dp)
    loss = sum(float(m["loss/sort"]) for m in found)
    return loss, gradients


def answer(mopd: Distillation, row: dict[str, Any]) -> Any:
    ids = [*mopd.tokenizer.vocabulary.encode(row["answer"].encode()), mopd.tokenizer.eos_id]
    return mopd.rollout(row["messages"], ids, domain=row["domain"])


@pytest.mark.dist
def test_both_ways_to_divide_give_one_gradient(tiny_world: World, tmp_path: Path) -> None:
    cache = str(tmp_path)
    _, expected = run_ranks(gradient, 1, tiny_world, cache, Layout(), True, ())[0]
    assert all(bool(value.any()) for value in expected.values())
    for layout, per_token, more in (
        (Layout(), False, ()),
        (Layout(dp=2), True, ()),
        (Layout(dp=2), False, ()),
        (Layout(), True, ("train.packing=true",)),
    ):
        ranks = run_ranks(gradient, layout.world_size, tiny_world, cache, layout, per_token, more)
        for _, found in ranks:
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    (loss, first), (other, second) = run_ranks(
        gradient, 2, tiny_world, cache, Layout(tp=2), False, ()
    )
    whole = run_ranks(gradient, 1, tiny_world, cache, Layout(), False, ())[0][0]
    assert loss == pytest.approx(whole, rel=1e-5) and other == pytest.approx(whole, rel=1e-5)
    name = next(n for n in expected if n.endswith("linear_fc2.weight"))
    halves = torch.cat([first[name], second[name]], dim=1)
    torch.testing.assert_close(halves, expected[name], rtol=1e-4, atol=1e-6)


def judged_by_default(world: World, cache: str) -> tuple[int, dict[str, float]]:
    initialize(Layout().section, backend=get_device("cpu"), seed=1)
    mopd = Distillation.from_recipe(
        "mopd_ctkd",
        recipe(world, cache, "distillation.default_teacher=sort"),
        padded_vocab_size=json.loads((world.student / "config.json").read_text())["vocab_size"],
        device="cpu",
        domains=("elsewhere",),
    )
    row = json.loads(Path(world.data).read_text().splitlines()[0]) | {"domain": "elsewhere"}
    batch = mopd.batch([answer(mopd, row)])
    mopd.close()
    return batch.num_response_tokens, dict(batch.denominators)


@pytest.mark.dist
def test_a_domain_that_no_teacher_lists_goes_to_the_default(
    tiny_world: World, tmp_path: Path
) -> None:
    ((tokens, denominators),) = run_ranks(judged_by_default, 1, tiny_world, str(tmp_path))
    assert tokens > 0 and denominators["sort"] > 0 and denominators["upper"] == 0


@pytest.mark.dist
@pytest.mark.e2e
def test_the_documented_script_learns(tiny_world: World) -> None:
    root = Path(tiny_world.data).parents[1]
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *words, "docs/plugin_example.py", str(root), "12"],
        cwd=ROOT,
        env=environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 12
    for name in NAMES:
        assert lines[-1]["kl"][name] < 0.7 * lines[0]["kl"][name]


def refused(world: World, cache: str, more: str) -> str:
    initialize(Layout().section, backend=get_device("cpu"), seed=1)
    try:
        Distillation.from_recipe(
            "mopd_ctkd", recipe(world, cache, more), padded_vocab_size=1024, device="cpu"
        )
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.dist
@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("ctkd={gamma: 0.1, learned: {enabled: true}}", "does not support ctkd.learned.enabled"),
        ("teachers.sort.backend.type=megatron", "megatron"),
        ("teachers=null", "teachers"),
    ],
)
def test_what_it_cannot_do_is_refused(
    tiny_world: World, tmp_path: Path, word: str, said: str
) -> None:
    (message,) = run_ranks(refused, 1, tiny_world, str(tmp_path), word)
    assert said in message and "\n" not in message
