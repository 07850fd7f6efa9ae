"""The same rollouts give the same first step in every layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from mopd.demo import World
from tests.helpers.dist import run_ranks
from tests.helpers.runs import step_lines, train_here, words

OBSERVED = {
    *("kl_domain", "topk_overlap", "topk_mass", "teacher_topk_mass", "top1", "top1_projected"),
    *("entropy", "token_share", "first_kl", "alignment_1-1", "alignment_1-n"),
}
LAYOUTS = {
    "tp2": (2, {"student__parallel__tensor_model_parallel_size": 2}),
    "pp2": (2, {"student__parallel__pipeline_model_parallel_size": 2}),
    "tp2-sp-packed": (
        2,
        {
            "student__parallel__tensor_model_parallel_size": 2,
            "student__parallel__sequence_parallel": "true",
            "train__packing": "true",
            "train__max_tokens_per_micro_batch": 100,
        },
    ),
    "cp2": (2, {"student__parallel__context_parallel_size": 2}),
    "dp2": (2, {}),
    "tp2-pp2": (
        4,
        {
            "student__parallel__tensor_model_parallel_size": 2,
            "student__parallel__pipeline_model_parallel_size": 2,
        },
    ),
}


@pytest.fixture(scope="module")
def reference(tiny_world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, with the journal that the layouts replay."""
    directory = tmp_path_factory.mktemp("runs")
    run_ranks(train_here, 1, "mopd_ctkd", words(tiny_world, directory, "one"), timeout=120)
    return directory / "one"


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
def test_first_step_equals_one_process(layout: str, reference: Path, tiny_world: World) -> None:
    size, parallel = LAYOUTS[layout]
    overrides = words(
        tiny_world,
        reference.parent,
        layout,
        rollout__backend__type="replay",
        rollout__backend__path=reference,
        **parallel,
    )
    run_ranks(train_here, size, "mopd_ctkd", overrides, timeout=120)
    ours, theirs = step_lines(reference.parent / layout), step_lines(reference)
    assert len(ours) == len(theirs) == 4
    assert {key.split("/")[0] for key in theirs[0]} >= OBSERVED
    for key in ("loss", "grad_norm", "loss/sort", "loss/upper", "kl/sort", "kl/upper"):
        assert ours[0][key] == pytest.approx(theirs[0][key], rel=1e-4), key
    for key in theirs[0]:  # each over its own denominator
        if key.split("/")[0] in OBSERVED:
            assert ours[0][key] == pytest.approx(theirs[0][key], rel=1e-4, abs=1e-6), key
    for key in ("masked", "canonical", "alignment/sort", "truncated", "response_length_p95"):
        assert ours[0][key] == pytest.approx(theirs[0][key], abs=1e-12), key
    # later steps start from weights that differ by rounding only
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-3)


@pytest.mark.dist
def test_keyed_sampling_draws_the_same_rollouts_without_a_journal(
    reference: Path, tiny_world: World
) -> None:
    overrides = words(tiny_world, reference.parent, "own-samples", train__steps=1)
    run_ranks(train_here, 2, "mopd_ctkd", overrides, timeout=120)
    ours, theirs = step_lines(reference.parent / "own-samples"), step_lines(reference)
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=1e-4)
