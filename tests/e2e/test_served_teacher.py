"""A teacher behind a server trains the student as the same teacher in process does."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from mopd.demo import World
from mopd.serving.hf_scorer import TransformersScorer
from mopd.serving.score_server import ScoreServer
from mopd.tokens.chat import ChatTokenizer
from tests.helpers.dist import run_ranks
from tests.helpers.runs import launch, step_lines, train_here, words
from tests.helpers.stub_scorers import ModelScorer, PrefixScorer
from tests.helpers.stub_server import StubServer
from tests.helpers.vllm_server import VllmServer

pytestmark = pytest.mark.dist

# what the aligner, the loss and the optimizer made of the scores
COMPARED = ("loss", "loss/sort", "loss/upper", "kl/sort", "alignment/sort", "masked")


def two_steps(world: World, directory: Path, name: str, **keys: object) -> list[dict]:
    settings = {"train__steps": 2, "distillation__top_k": 16} | keys
    arguments = words(world, directory, name, **settings)
    run_ranks(train_here, 1, "mopd_ctkd", arguments, timeout=120)
    return step_lines(directory / name)


@pytest.mark.parametrize("shape", ["vllm", "openai", "sglang", "trl"])
def test_the_losses_of_two_steps_are_those_of_the_hf_backend(
    tiny_world: World, tmp_path: Path, shape: str
) -> None:
    near = two_steps(tiny_world, tmp_path, "near")
    tokenizer = ChatTokenizer.load(tiny_world.teachers["sort"])
    scorer = ModelScorer(tiny_world.teachers["sort"], vocab_size=tokenizer.vocabulary.size)
    with StubServer(scorer) as stub:
        far = two_steps(
            tiny_world,
            tmp_path,
            "far",
            teachers__sort__backend__type=shape,
            teachers__sort__backend__urls=f"[{stub.url}]",
        )
        assert len(stub.requests) > 4
    assert len(near) == len(far) == 2
    for one, two in zip(near, far, strict=True):
        for key in COMPARED:
            assert two[key] == pytest.approx(one[key], abs=1e-5), key
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("top_k", [16, "null"])
def test_mopd_serve_teaches_at_other_temperatures_and_with_whole_rows(
    tiny_world: World, tmp_path: Path, top_k: object
) -> None:
    """Log-sum-exps and whole rows come over the wire as they are in process."""
    keys = {"distillation__top_k": top_k, "distillation__temperature": 2.0}
    near = two_steps(tiny_world, tmp_path, "near", **keys)
    engine = TransformersScorer(tiny_world.teachers["sort"], device=torch.device("cpu"))
    with ScoreServer("127.0.0.1", 0, scorer=engine, token=None) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        keys["teachers__sort__backend__type"] = "mopd"
        keys["teachers__sort__backend__urls"] = f"[{url}]"
        far = two_steps(tiny_world, tmp_path, "far", **keys)
        server.shutdown()
        thread.join(10.0)
    for one, two in zip(near, far, strict=True):
        for key in COMPARED:
            assert two[key] == pytest.approx(one[key], abs=1e-5), key
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


@pytest.mark.vllm
def test_a_real_server_teaches_as_the_hf_backend_does(
    tiny_world: World, tmp_path: Path, vllm_server: VllmServer
) -> None:
    """Two steps on the same rollouts."""
    near = two_steps(tiny_world, tmp_path, "near")
    far = two_steps(
        tiny_world,
        tmp_path,
        "far",
        teachers__sort__backend__type="vllm",
        teachers__sort__backend__urls=f"[{vllm_server.url}]",
        rollout__backend__type="replay",
        rollout__backend__path=tmp_path / "near" / "journal",
    )
    for one, two in zip(near, far, strict=True):
        for key in COMPARED:
            assert two[key] == pytest.approx(one[key], abs=1e-3), key


def test_a_wrong_server_ends_the_start(tiny_world: World, tmp_path: Path) -> None:
    """Exit 2, one line with the remedy, no step."""
    with StubServer(PrefixScorer(560)) as stub:
        overrides = words(
            tiny_world,
            tmp_path,
            "wrong",
            teachers__sort__backend__type="vllm",
            teachers__sort__backend__urls=f"[{stub.url}]",
            teachers__sort__backend__served_model="other",
        )
        done = launch("mopd_ctkd", overrides)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "teachers.sort" in line and "set backend.served_model" in line
    assert not (tmp_path / "wrong" / "metrics.jsonl").exists()
