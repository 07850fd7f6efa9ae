"""A checkpoint of any layout loads in any other: state bit by bit, training within rounding."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.dist.student import resharding, worlds
from tests.dist.student.resharding import Whole, differences
from tests.dist.student.worlds import Layout, Run
from tests.helpers.dist import RankError, run_ranks

LAYOUTS = {
    "one": (Layout(), False),
    "tp2": (Layout(tp=2), False),
    "pp2": (Layout(pp=2), False),
    "dp2": (Layout(dp=2), False),
    "dp2-split": (Layout(dp=2), True),
    "tp2-pp2": (Layout(tp=2, pp=2), False),
    "tp2-dp2-split": (Layout(tp=2, dp=2), True),
    "pp2-dp2": (Layout(pp=2, dp=2), False),
    "pp2-vp2": (Layout(pp=2, vp=2), False),
    "pp2-vp2-dp2-split": (Layout(pp=2, vp=2, dp=2), True),
}
# Every layout is written once and read at least once by another.
PAIRS = [
    ("one", "tp2-pp2"),
    ("tp2", "one"),
    ("tp2", "dp2-split"),
    ("pp2", "tp2"),
    ("dp2", "pp2-vp2"),
    ("dp2-split", "tp2-dp2-split"),
    ("dp2-split", "dp2"),
    ("tp2-pp2", "pp2-vp2-dp2-split"),
    ("tp2-dp2-split", "pp2"),
    ("pp2-dp2", "dp2-split"),
    ("pp2-vp2", "tp2-dp2-split"),
    ("pp2-vp2-dp2-split", "one"),
]


@dataclass
class Saved:
    """Checkpoints of two steps, by layout, and the run that never stopped."""

    model_dir: str
    directory: Path
    dtype: str
    states: dict[str, Whole] = field(default_factory=dict)
    reference: Whole | None = None

    def run(self, name: str) -> Run:
        layout = LAYOUTS[name][0]
        return Run(model_dir=self.model_dir, layout=layout, student={"dtype": self.dtype})

    def of(self, name: str) -> tuple[str, Whole]:
        directory = str(self.directory / name)
        if name not in self.states:
            layout, split = LAYOUTS[name]
            start = None if layout.vp is None else self.of("one")[0]
            arguments = (self.run(name), directory, split, 2, start)
            found = run_ranks(resharding.save_at, layout.world_size, *arguments)
            self.states[name] = found[0]
        return directory, self.states[name]

    def straight(self) -> Whole:
        if self.reference is None:
            (self.reference,) = run_ranks(resharding.straight, 1, self.run("one"), False, 4, 2)
        return self.reference


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four layers: two stages of two ranks. Tied embeddings: a copy in the last stage."""
    with mock.patch.dict(worlds.SIZES, num_hidden_layers=4):
        return str(worlds.make_model("qwen3", tmp_path_factory.mktemp("reshard") / "qwen3"))


@pytest.fixture(scope="module")
def saved(model_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(model_dir, tmp_path_factory.mktemp("float32"), "float32")


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=["->".join(pair) for pair in PAIRS])
def test_another_layout_goes_on(saved: Saved, source: str, target: str) -> None:
    directory, state = saved.of(source)
    layout, split = LAYOUTS[target]
    steps = range(2, 4) if layout.vp is None else range(2, 2)
    run = saved.run(target)
    found = run_ranks(resharding.load_and_go_on, layout.world_size, run, directory, split, steps)
    reference = saved.straight()
    for loaded, after, reseeded in found:
        assert differences(loaded, state) == []
        # Replicas of one another's ranks have the generators of ranks that are no more.
        assert reseeded == (layout != LAYOUTS[source][0])
        if not steps:
            continue
        assert after.losses == pytest.approx(reference.losses, rel=1e-4)
        for name, tensor in reference.tensors.items():
            torch.testing.assert_close(after.tensors[name], tensor, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["one", "dp2-split", "tp2-pp2", "tp2-dp2-split"])
def test_the_same_layout_goes_on_bitwise(saved: Saved, name: str) -> None:
    directory, _ = saved.of(name)
    layout, split = LAYOUTS[name]
    run = saved.run(name)
    arguments = (run, directory, split, range(2, 4))
    found = run_ranks(resharding.load_and_go_on, layout.world_size, *arguments)
    straight = run_ranks(resharding.straight, layout.world_size, run, split, 4, 2)
    for (_, after, reseeded), want in zip(found, straight, strict=True):
        assert differences(after, want) == []
        assert not reseeded


@pytest.mark.parametrize(("source", "target"), [("dp2-split", "tp2-pp2"), ("tp2", "dp2-split")])
def test_main_weights_of_bfloat16_reshard(
    model_dir: str, tmp_path: Path, source: str, target: str
) -> None:
    saved = Saved(model_dir, tmp_path, "bfloat16")
    directory, state = saved.of(source)
    assert any(name.startswith("optimizer.param.") for name in state.tensors)
    layout, split = LAYOUTS[target]
    arguments = (saved.run(target), directory, split, range(2, 3))
    for loaded, _, _ in run_ranks(resharding.load_and_go_on, layout.world_size, *arguments):
        assert differences(loaded, state) == []


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_untied_heads_and_biases_reshard(tmp_path: Path, family: str) -> None:
    saved = Saved(str(worlds.make_model(family, tmp_path / family)), tmp_path, "float32")
    directory, state = saved.of("tp2")
    arguments = (saved.run("pp2"), directory, False, range(2, 2))
    for loaded, _, _ in run_ranks(resharding.load_and_go_on, 2, *arguments):
        assert differences(loaded, state) == []


def test_a_split_optimizer_trains_as_a_whole_one(saved: Saved) -> None:
    """dp = 2 with and without the distributed optimizer, against one process."""
    reference = saved.straight()
    for name in ("dp2", "dp2-split"):
        layout, split = LAYOUTS[name]
        run = saved.run(name)
        found, _ = run_ranks(resharding.straight, layout.world_size, run, split, 4, 2)
        assert found.losses == pytest.approx(reference.losses, rel=1e-4)
        for key, tensor in reference.tensors.items():
            torch.testing.assert_close(found.tensors[key], tensor, rtol=0, atol=1e-4)


def test_the_generators_of_another_layout_follow_from_seed_and_step(
    saved: Saved, tmp_path: Path
) -> None:
    """RNG policy: other layout, other draws; the same ones every time, per stage."""
    directory, _ = saved.of("one")
    draws = [
        run_ranks(resharding.draws_after_load, 4, saved.run("tp2-pp2"), directory) for _ in range(2)
    ]
    assert draws[0] == draws[1]
    by_stage = [found["torch"] for found in draws[0]]
    assert by_stage[0] == by_stage[1] != by_stage[2] == by_stage[3]  # tp ranks draw alike
    trackers = [found["tracker"] for found in draws[0]]
    assert len(set(trackers)) == 4  # but Megatron's stream is a rank's own


@pytest.mark.parametrize(("source", "target"), [("one", "pp2"), ("dp2-split", "pp2-dp2")])
def test_what_is_frozen_is_saved_once(
    saved: Saved, tmp_path: Path, source: str, target: str
) -> None:
    """A stage where nothing learns has no optimizer; its weights are in the checkpoint."""
    (layout, split), directory = LAYOUTS[source], str(tmp_path)
    run = saved.run(source)
    state, *_ = run_ranks(resharding.save_frozen, layout.world_size, run, directory, split)
    learned = {key for key in state.tensors if key.startswith("optimizer.")}
    assert learned and all("layers.3.mlp." in key for key in learned)
    assert "model.decoder.layers.0.mlp.linear_fc1.weight" in state.tensors
    layout, split = LAYOUTS[target]
    arguments = (saved.run(target), directory, split)
    for found in run_ranks(resharding.load_frozen, layout.world_size, *arguments):
        assert differences(found, state) == []


def test_a_split_that_nobody_describes_is_refused(saved: Saved) -> None:
    with pytest.raises(RankError, match="leaves out the split"):
        run_ranks(resharding.describe_a_silent_split, 2, saved.run("tp2"))
