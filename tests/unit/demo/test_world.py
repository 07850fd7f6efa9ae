"""The embedded world as files: reproducible, disjoint splits, cached, recovered after a crash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import mopd.demo
from mopd.demo import World, WorldSpec, ensure_world, load_world
from mopd.demo.decode import encode_tasks
from mopd.demo.tasks import make_splits, solve
from mopd.demo.tokenizers import KINDS, make_tokenizer, token_bytes
from mopd.errors import ArtifactError

MODELS = ("student", "sort", "upper")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return ensure_world(tmp_path_factory.mktemp("worlds"), spec=WorldSpec.tiny(), progress=False)


def _digests(world: World) -> dict[str, str]:
    """Every file except the one that holds times."""
    return {
        str(path.relative_to(world.path)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(world.path.rglob("*"))
        if path.is_file() and path.name != "timing.json"
    }


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _directories(world: World) -> dict[str, Path]:
    return {"student": world.student, **world.teachers}


def test_two_builds_give_identical_bytes(world: World, tmp_path: Path) -> None:
    again = ensure_world(tmp_path, spec=WorldSpec.tiny(), progress=False)
    assert again.path != world.path
    assert _digests(again) == _digests(world)


def test_splits_never_overlap(world: World) -> None:
    rows = {path: _lines(path) for path in (world.data, world.selection, world.heldout)}
    everything = [row for lines in rows.values() for row in lines]
    assert len({row["messages"][0]["content"] for row in everything}) == len(everything)
    assert len({row["id"] for row in everything}) == len(everything)
    for lines in rows.values():
        assert {row["domain"] for row in lines} == {"sort", "upper"}


def test_lines_carry_the_right_answer(world: World) -> None:
    row = _lines(world.data)[0]
    assert set(row) == {"id", "domain", "messages", "answer"}
    assert row["answer"] == solve(row["messages"][0]["content"])
    assert solve("sort 7 3 9 1 4") == "13479"
    assert solve("up gapi demon") == "GAPI DEMON"


def test_default_splits_have_their_sizes() -> None:
    spec = WorldSpec()
    splits = make_splits(spec)
    for domain in ("sort", "upper"):
        sizes = {name: sum(t.domain == domain for t in tasks) for name, tasks in splits.items()}
        assert sizes["selection"] == 256
        assert sizes["heldout"] == 512
        assert sizes["train"] > 2000


def test_tokenizers_and_templates_differ(world: World) -> None:
    tokenizers = {
        name: AutoTokenizer.from_pretrained(path) for name, path in _directories(world).items()
    }
    messages = [{"role": "user", "content": "up gapi demon"}]
    prompts = {
        name: tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        for name, tokenizer in tokenizers.items()
    }
    assert len(set(prompts.values())) == len(MODELS)
    assert len({tokenizer.eos_token for tokenizer in tokenizers.values()}) == len(MODELS)
    assert len({tokenizer.chat_template for tokenizer in tokenizers.values()}) == len(MODELS)
    assert len({frozenset(tokenizer.get_vocab()) for tokenizer in tokenizers.values()}) == 3
    student, sort = tokenizers["student"], tokenizers["sort"]
    assert len(student.encode("1379", add_special_tokens=False)) == 2
    assert len(sort.encode("1379", add_special_tokens=False)) == 4


@pytest.mark.parametrize("name", MODELS)
def test_models_load_and_fit_their_tokenizer(world: World, name: str) -> None:
    path = _directories(world)[name]
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.model_type == ("llama" if name == "sort" else "qwen3")
    assert model.config.head_dim == 32
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


@pytest.mark.parametrize("name", MODELS)
def test_saved_tokenizer_is_the_one_trained_with(world: World, name: str) -> None:
    saved = AutoTokenizer.from_pretrained(_directories(world)[name])
    made = make_tokenizer(WorldSpec.tiny(), name=name)
    tasks = make_splits(WorldSpec.tiny())["heldout"]
    assert encode_tasks(saved, tasks=tasks) == encode_tasks(made, tasks=tasks)


@pytest.mark.parametrize("name", MODELS)
def test_tokens_spell_the_answer(name: str) -> None:
    tokenizer = make_tokenizer(WorldSpec.tiny(), name=name)
    table = token_bytes(tokenizer, metaspace=KINDS[name].metaspace)
    for text in ("13479", "GAPI DEMON", "caf\u00e9"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(table[token] for token in ids) == text.encode()
        assert tokenizer.decode(ids) == text
    assert table[tokenizer.eos_token_id] == b""


@pytest.mark.parametrize("name", MODELS)
def test_default_vocabularies_are_full(name: str) -> None:
    spec = WorldSpec()
    sizes = {"student": spec.student_vocab, "sort": spec.sort_vocab, "upper": spec.upper_vocab}
    assert len(make_tokenizer(spec, name=name)) == sizes[name]


def test_report_has_the_measurements(world: World) -> None:
    report = world.report
    assert report["spec"] == dataclasses.asdict(WorldSpec.tiny())
    assert report["seconds"]["total"] > 0.0
    for name in ("sort", "upper"):
        assert 0.0 <= report["teachers"][name]["heldout"] <= 1.0
        assert 0.0 <= report["cold_start"]["heldout"][name] <= 1.0
        assert report["chunks"][name]["canonical"]["tokens_outside_1_1"] > 0.0
        assert set(report["unreachable"][name]) == {"tokens", "mass"}
        assert set(report["robust"][name]) == {"canonical", "resplit"}


def test_build_shows_no_bars_of_libraries(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ensure_world(tmp_path, spec=WorldSpec.tiny())
    captured = capfd.readouterr()
    assert captured.out == ""
    assert all(line.startswith("world: ") for line in captured.err.splitlines())


def test_complete_world_is_reused(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    before = (world.path / "world.json").stat().st_mtime_ns
    again = ensure_world(world.path.parent, spec=WorldSpec.tiny())
    assert again == world
    assert (world.path / "world.json").stat().st_mtime_ns == before
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("world: reusing")


def test_changed_spec_builds_another_world(world: World) -> None:
    other = ensure_world(world.path.parent, spec=WorldSpec.tiny(seed=1), progress=False)
    assert other.path != world.path
    assert world.path.is_dir()
    assert other.data.read_bytes() != world.data.read_bytes()


def test_crashed_build_is_recovered(world: World, tmp_path: Path) -> None:
    spec = WorldSpec.tiny()
    leftover = tmp_path / f".{spec.digest()}.building"
    (leftover / "student").mkdir(parents=True)
    (leftover / "student" / "config.json").write_text("{")
    with pytest.raises(ArtifactError):
        load_world(tmp_path / spec.digest())
    recovered = ensure_world(tmp_path, spec=spec, progress=False)
    assert not leftover.exists()
    assert _digests(recovered) == _digests(world)


def test_unguarded_script_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "unguarded.py"
    script.write_text(
        "from mopd.demo import WorldSpec, ensure_world\n"
        f"ensure_world({str(tmp_path / 'worlds')!r}, spec=WorldSpec.tiny(), progress=False)\n"
    )
    package_root = Path(mopd.demo.__file__).parents[2]
    result = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(package_root)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode != 0
    assert "ArtifactError" in result.stderr
    assert "__main__" in result.stderr
