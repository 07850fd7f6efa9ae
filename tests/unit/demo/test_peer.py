"""The teacher with the student's tokenizer: built on request, reproducible, recovered, reused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from mopd.demo import World, WorldSpec, ensure_peer, ensure_world
from mopd.demo.decode import encode_tasks
from mopd.demo.tasks import make_splits


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return ensure_world(tmp_path_factory.mktemp("worlds"), spec=WorldSpec.tiny(), progress=False)


def _digests(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.iterdir())
    }


def test_peer_is_built_on_request_and_reused(
    world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    assert not world.peer.exists()
    assert world.peer not in world.teachers.values()
    assert ensure_peer(world, progress=False) == world.peer
    assert capfd.readouterr().err == ""
    report = json.loads((world.peer / "report.json").read_text())
    for split in ("selection", "heldout"):
        assert set(report[split]) == {"sort", "upper"}
    before = (world.peer / "report.json").stat().st_mtime_ns
    ensure_peer(world)
    assert (world.peer / "report.json").stat().st_mtime_ns == before
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("world: reusing")


def test_peer_has_the_tokenizer_of_the_student(world: World) -> None:
    peer = ensure_peer(world, progress=False)
    model = AutoModelForCausalLM.from_pretrained(peer)
    student = AutoModelForCausalLM.from_pretrained(world.student)
    assert model.config.model_type == "qwen3"
    assert model.config.to_diff_dict() == student.config.to_diff_dict()
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (peer, world.student)]
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
    tasks = make_splits(WorldSpec.tiny())["heldout"]
    encoded = [encode_tasks(tokenizer, tasks=tasks) for tokenizer in tokenizers]
    assert encoded[0] == encoded[1]


def test_crashed_peer_gives_the_same_bytes(world: World) -> None:
    first = _digests(ensure_peer(world, progress=False))
    (world.peer / "report.json").unlink()
    leftover = world.path.parent / f".{world.path.name}.peer.building"
    leftover.mkdir()
    (leftover / "config.json").write_text("{")
    again = _digests(ensure_peer(world, progress=False))
    assert again == first
    assert not leftover.exists()
