"""A sharded model scores texts as transformers does, in every layout."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from mopd.serving.hf_scorer import TransformersScorer
from mopd.serving.scoring import ScoreRequest
from mopd.serving.wire import RawRows
from mopd.student.scorer import ScoreOptions
from tests.dist.student import worlds
from tests.dist.student.worlds import Layout
from tests.helpers import frozen
from tests.helpers.dist import run_ranks
from tests.helpers.frozen import VOCAB_SIZE

LAYOUTS = {
    "one": Layout(),
    "tp2": Layout(tp=2),
    "pp2": Layout(pp=2),
    "tp2-sp": Layout(tp=2, sequence_parallel=True),
    "tp2-pp2": Layout(tp=2, pp=2),
}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("scored")
    return {f: str(worlds.make_model(f, root / f)) for f in ("llama3", "qwen3", "moe")}


def options(top_k: int | None = 8, *, temperature: float = 2.0, max_tokens: int = 90):
    return ScoreOptions(
        top_k=top_k, temperature=temperature, vocab_size=VOCAB_SIZE, max_tokens=max_tokens
    )


@cache
def reference(
    model_dir: str,
    top_k: int | None,
    temperature: float,
    seed: int = 0,
    vocab_size: int = VOCAB_SIZE,
) -> RawRows:
    """Of all texts behind each other."""
    scorer = TransformersScorer(Path(model_dir), device=torch.device("cpu"))
    return scorer.score(
        ScoreRequest(
            request="r",
            sequences=tuple(frozen.texts(seed, size=vocab_size)),
            top_k=top_k,
            temperature=temperature,
            vocab_size=vocab_size,
            wire="fp32",
        )
    )


def check_same(found: list[RawRows] | None, wanted: RawRows, seed: int = 0) -> None:
    assert found is not None
    counts = [len(text.ids) - text.start for text in frozen.texts(seed)]
    assert [len(rows.logprobs) for rows in found] == counts and counts[-1] == 0
    for name in ("topk_logprobs", "logprobs", "log_tail", "lse"):
        mine = np.concatenate([getattr(rows, name) for rows in found])
        assert mine.dtype == np.float32
        np.testing.assert_allclose(mine, getattr(wanted, name), atol=1e-4, err_msg=name)
    if wanted.topk_ids is None:
        assert all(rows.topk_ids is None for rows in found)
        return
    ids = np.concatenate([rows.topk_ids for rows in found if rows.topk_ids is not None])
    assert ids.dtype == np.int32
    gaps = np.diff(wanted.topk_logprobs, axis=1)
    tied = np.abs(gaps) < 1e-4
    tied = np.pad(tied, ((0, 0), (1, 0))) | np.pad(tied, ((0, 0), (0, 1)))
    tied[:, -1] = True  # the next entry is not known
    assert (ids == wanted.topk_ids)[~tied].all() and (~tied).mean() > 0.7
    assert (ids[:, -1] == wanted.topk_ids[:, -1]).mean() > 0.9


WHOLE = VOCAB_SIZE + 30
CASES = [("llama3", 8), ("qwen3", 8), ("qwen3", None), ("qwen3", WHOLE)]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("family", "top_k"), CASES)
def test_scores_are_those_of_transformers(
    models: dict[str, str], family: str, name: str, top_k: int | None
) -> None:
    layout = LAYOUTS[name]
    ranks = run_ranks(frozen.score, layout.world_size, models[family], layout, options(top_k))
    assert all(rows is None for rows in ranks[1:])
    check_same(ranks[0], reference(models[family], top_k, 2.0))
    if top_k != 8:
        assert all(np.isneginf(rows.log_tail).all() for rows in ranks[0])


@pytest.mark.parametrize("top_k", [8, None])
def test_a_rank_without_a_token_takes_part(models: dict[str, str], top_k: int | None) -> None:
    """34 columns a rank, and 30 tokens."""
    layout = Layout(tp=2)
    asked = replace(options(top_k), vocab_size=30)
    ranks = run_ranks(frozen.score, 2, models["qwen3"], layout, asked)
    check_same(ranks[0], reference(models["qwen3"], top_k, 2.0, vocab_size=30))


def test_micro_batches_change_nothing_but_rounding(models: dict[str, str]) -> None:
    """One text each, and all at once; with temperature 1 both log-sum-exps are one."""
    for max_tokens in (1, 10_000):
        asked = options(temperature=1.0, max_tokens=max_tokens)
        (rows,) = run_ranks(frozen.score, 1, models["qwen3"], Layout(), asked)
        check_same(rows, reference(models["qwen3"], 8, 1.0))
        assert all((each.lse[:, 0] == each.lse[:, 1]).all() for each in rows)


def test_an_interleaved_pipeline_scores_a_number_that_does_not_fill_it(tmp_path: Path) -> None:
    sizes = worlds.SIZES | {"num_hidden_layers": 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worlds, "SIZES", sizes)
        model_dir = str(worlds.make_model("qwen3", tmp_path))
    layout = Layout(pp=2, vp=2)
    for max_tokens in (1, 10_000):  # 7 micro-batches, and 1, where Megatron takes pairs
        asked = options(max_tokens=max_tokens)
        ranks = run_ranks(frozen.score, layout.world_size, model_dir, layout, asked)
        check_same(ranks[0], reference(model_dir, 8, 2.0))


@pytest.mark.parametrize("layout", [Layout(dp=2), Layout(dp=2, ep=2), Layout(cp=2)], ids=str)
@pytest.mark.parametrize("seeds", [(3, 2), (3, None)], ids=str)
def test_replicas_score_their_own_texts(
    models: dict[str, str], layout: Layout, seeds: tuple[int | None, ...]
) -> None:
    """Those of an expert group wait for each other, also where one has nothing to ask."""
    ranks = run_ranks(frozen.score, 2, models["moe"], layout, options(), seeds)
    for rows, seed in zip(ranks[: layout.dp], seeds, strict=False):
        if seed is None:
            assert rows == []
        else:
            check_same(rows, reference(models["moe"], 8, 2.0, seed), seed)


@pytest.mark.parametrize("name", ["one", "tp2-pp2"])
def test_weights_are_in_host_memory_between_uses(models: dict[str, str], name: str) -> None:
    layout = LAYOUTS[name]
    ranks = run_ranks(frozen.score_offloaded, layout.world_size, models["qwen3"], layout, options())
    for sizes, _ in ranks:
        assert sizes[0] == sizes[2] == sizes[4] == 0
        assert sizes[1] == sizes[3] > 0
    always, first, second = ranks[0][1]
    for one, two, three in zip(always, first, second, strict=True):
        for field in ("topk_ids", "topk_logprobs", "logprobs", "log_tail", "lse"):
            assert np.array_equal(getattr(one, field), getattr(two, field))
            assert np.array_equal(getattr(one, field), getattr(three, field))
