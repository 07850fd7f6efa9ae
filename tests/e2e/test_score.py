"""`mopd score`: the numbers of a training step, text by text; and a dump compared with a replay."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mopd.cli.main import main
from mopd.demo import World
from mopd.serving.models import load_causal_lm
from mopd.tokens.chat import ChatTokenizer
from tests.helpers.cli import mopd
from tests.helpers.dist import run_ranks
from tests.helpers.runs import step_lines, train_here, words

pytestmark = [pytest.mark.dist, pytest.mark.e2e]

TEACHER = "sort"


def rows_of(world: World, path: Path, count: int) -> Path:
    rows = [json.loads(line) for line in Path(world.data).read_text().splitlines()]
    mine = [row | {"response": row["answer"]} for row in rows if row["domain"] == TEACHER][:count]
    path.write_text("".join(json.dumps(row) + "\n" for row in mine))
    return path


@pytest.mark.parametrize(
    ("recipe", "keys"),
    [
        ("mopd_ctkd", {}),
        ("mopd_gold", {"student__fused_head": "false"}),
        ("mopd_ctkd", {"distillation__crossentropy_weight": 0.5, "ctkd__lambda_chunk": 0.3}),
    ],
    ids=["ctkd", "gold", "ctkd-chunk-ce"],
)
def test_the_numbers_are_those_of_a_first_step(
    recipe: str, keys: dict[str, Any], tiny_world: World, tmp_path: Path
) -> None:
    """All rows are one step of the run, so the two lines of numbers are of the same answers."""
    rows = rows_of(tiny_world, tmp_path / "rows.jsonl", 8)
    keys = {
        **keys,
        "data__path": rows,
        "data__heldout_path": "null",
        "rollout__backend__type": "dataset",
        "train__steps": 1,
        "train__num_prompts_per_step": 8,
    }
    given = [w for w in words(tiny_world, tmp_path, "run", **keys) if "teachers.upper" not in w]
    run_ranks(train_here, 1, recipe, given, timeout=120)
    (step,) = (line for line in step_lines(tmp_path / "run") if "loss" in line)

    output = tmp_path / "scored.jsonl"
    said = mopd("score", "--teacher", TEACHER, f"recipe={recipe}", *given, rows, "--output", output)
    assert said.code == 0, said
    last = said.out.splitlines()[-2]
    told = {name: float(value) for name, value in re.findall(r"(\S+) (\d+\.\d{6})", last)}
    wanted = {name: value for name, value in step.items() if name.startswith(("loss", "kl/"))}
    assert told == pytest.approx(wanted, rel=1e-6, abs=1e-6)

    texts = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(texts) == 8
    chunks = [sum(chunk["kept"] for chunk in text["chunks"]) for text in texts]
    per_text = sum(
        n * text["metrics"][f"kl/{TEACHER}"] for n, text in zip(chunks, texts, strict=True)
    )
    assert per_text / sum(chunks) == pytest.approx(step[f"kl/{TEACHER}"], rel=1e-5)


def test_a_text_shows_its_alignment(tiny_world: World, tmp_path: Path) -> None:
    (tmp_path / "answers.txt").write_text("1234\nno such answer ü\n")
    said = mopd(
        *("score", "--teacher", "upper", "recipe=mopd_ctkd", "--prompt", "sort 4 3 2 1", "--json"),
        *words(tiny_world, tmp_path, "run", rollout__max_new_tokens=40),
        tmp_path / "answers.txt",
    )
    assert said.code == 0, said
    first, second = (json.loads(line) for line in said.out.splitlines())
    assert first["response"] == "1234" and second["response"] == "no such answer ü"
    for text in (first, second):
        assert text["aligned"] == len(text["student_tokens"])
        assert text["loss"] > 0 and text["metrics"]["kl/upper"] > 0
        for side in ("student", "teacher"):
            tokens = text[f"{side}_tokens"]
            assert tokens[-1]["text"] == "end of turn"
            spelled = "".join(token["text"][1:-1] for token in tokens[:-1])
            assert spelled.encode().decode("unicode_escape").encode("latin-1") in (
                text["response"].encode(),
                text["response"].encode("latin-1", "ignore"),
            )
            edges = [chunk[side] for chunk in text["chunks"]]
            assert edges[0][0] == 0 and edges[-1][1] == len(tokens)
            for chunk in text["chunks"]:
                mine = tokens[slice(*chunk[side])]
                total = sum(token["logprob"] for token in mine)
                assert chunk[f"{side}_logprob"] == pytest.approx(total, rel=1e-5)
                many = "1" if len(mine) == 1 else "n" if side == "student" else chunk["kind"][2]
                assert chunk["kind"].split("-")[side == "teacher"] == many
        assert [token["logprob"] for token in text["student_tokens"]] == pytest.approx(
            by_transformers(tiny_world, "sort 4 3 2 1", text), abs=1e-4
        )
    assert not (tmp_path / "run").exists()


def by_transformers(world: World, prompt: str, text: dict[str, Any]) -> list[float]:
    """The student's log-probabilities by a plain forward pass."""
    tokenizer = ChatTokenizer.load(world.student)
    before = tokenizer.prompt_ids([{"role": "user", "content": prompt}]).tolist()
    ids = [token["id"] for token in text["student_tokens"]]
    model = load_causal_lm(world.student, device=torch.device("cpu"))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*before, *ids]])).logits[0]
    rows = torch.log_softmax(logits[len(before) - 1 : -1, : tokenizer.vocabulary.size], dim=-1)
    return rows[torch.arange(len(ids)), torch.tensor(ids)].tolist()


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        (["--teacher", "nobody", "FILE"], "--teacher nobody: is none of the recipe's"),
        (["--teacher", "sort"], "expected one FILE"),
        (["FILE"], "--teacher: is not set"),
        (["--teacher", "sort", "gone.jsonl"], "gone.jsonl: no such file"),
        (["--teacher", "sort", "FILE", "data.response_key=nope"], "has no answer to train on"),
        (["--teacher", "sort", "FILE", "--nope"], "option `--nope` is not known to mopd score"),
        (["--teacher", "sort", "--prompt", "x", "EMPTY"], "empty.txt: is empty"),
        (["--teacher", "sort", "--prompt", "x", "BINARY"], "binary.txt: is not UTF-8 text"),
    ],
)
def test_a_wrong_command_is_one_line(
    more: list[str], wanted: str, tiny_world: World, tmp_path: Path
) -> None:
    rows = rows_of(tiny_world, tmp_path / "rows.jsonl", 2)
    files = {"FILE": rows, "EMPTY": tmp_path / "empty.txt", "BINARY": tmp_path / "binary.txt"}
    files["EMPTY"].write_bytes(b"")
    files["BINARY"].write_bytes(b"\xff\xfe")
    more = [str(files.get(word, word)) for word in more]
    said = mopd("score", "recipe=mopd_ctkd", *words(tiny_world, tmp_path, "run"), *more)
    assert said.code == 2 and said.out == ""
    assert said.err.count("\n") == 1 and wanted in said.err


@pytest.mark.parametrize(
    ("computed", "code"),
    [({"loss": 1.0 + 1e-8, "kl/a": 2.0}, 0), ({"loss": 1.0 + 1e-5, "kl/a": 2.0}, 1), ({}, 1)],
    ids=["same", "other", "missing"],
)
def test_a_replay_is_compared_name_by_name(
    computed: dict[str, float],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """How the verb tells it; `mopd.runtime.dump` has its own tests."""
    found = SimpleNamespace(
        recorded={"loss": 1.0, "kl/a": 2.0}, computed=computed, largest_difference=1e-5
    )
    fake = SimpleNamespace(replay=lambda directory: found)
    monkeypatch.setitem(sys.modules, "mopd.runtime.dump", fake)
    assert main(["score", "--replay", str(tmp_path)]) == code
    assert ("DIFFERS" in capsys.readouterr().out) == bool(code)
    assert main(["score", "--replay", str(tmp_path), "--json"]) == code
    told = json.loads(capsys.readouterr().out)
    assert told["recorded"] == found.recorded and bool(told["differ"]) == bool(code)
    assert main(["score", "--replay", str(tmp_path / "gone")]) == 2
