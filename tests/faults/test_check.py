"""`mopd check`: what a start refuses, found without one; with ``--live`` the servers' part, too."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mopd.demo import World
from tests.faults.test_refusals import CASES, SIZE, recipe
from tests.helpers.cli import Said, mopd
from tests.helpers.runs import words
from tests.helpers.small_server import SCRIPT, TEACHER, left_over, small_server, starts
from tests.helpers.stub_scorers import PrefixScorer
from tests.helpers.stub_server import StubOptions, StubServer

pytestmark = pytest.mark.dist


def problems(said: Said) -> list[dict[str, Any]]:
    return [one for one in said.json["findings"] if one["status"] == "problem"]


@pytest.mark.parametrize("name", CASES)
def test_every_refused_start_is_found(name: str, tiny_world: World, tmp_path: Path) -> None:
    case = CASES[name]
    with recipe(case, tiny_world, tmp_path) as overrides:
        said = mopd("check", "recipe=mopd_ctkd", *overrides, "--live", "--json")
    (found,) = problems(said)
    assert re.search(case.message, found["detail"]), found
    # what files tell is the recipe's fault, what a server tells is found by asking it
    assert said.code == (1 if found["item"] == "teachers.sort" else 2)
    asked = case.server is not None or case.served is not None
    assert (said.code == 1) == (asked and "end of turn" not in name)
    assert not (tmp_path / "run").exists()


def test_a_right_recipe_is_ok_and_nothing_is_left_behind(tiny_world: World, tmp_path: Path) -> None:
    with StubServer(PrefixScorer(SIZE), StubOptions()) as stub:
        keys = {
            "teachers__sort__backend__type": "vllm",
            "teachers__sort__backend__urls": f"[{stub.url}]",
            "distillation__top_k": 16,
        }
        said = mopd("check", "recipe=mopd_ctkd", *words(tiny_world, tmp_path, "run", **keys))
        assert not stub.requests, "without --live nobody is asked"
        assert said.code == 0 and "ask it with --live" in said.out
        said = mopd(
            "check", "recipe=mopd_ctkd", *words(tiny_world, tmp_path, "run", **keys), "--live"
        )
        assert stub.requests
    assert said.code == 0, said
    lines = said.out.splitlines()
    assert lines[-1] == "mopd_ctkd: ok"
    for item in ("teachers.sort", "teachers.upper", "rollout.backend", "projection of sort"):
        assert re.search(rf"^{item} +ok ", said.out, re.MULTILINE), item
    assert re.search(r"rollout.backend .*answered row \S+ with \d+ tokens", said.out)
    assert not (tmp_path / "run").exists()


def test_two_bad_teachers_are_both_told(tiny_world: World, tmp_path: Path) -> None:
    """A run would name the first and end."""
    with (
        StubServer(PrefixScorer(SIZE), StubOptions(tempered=True)) as one,
        StubServer(PrefixScorer(496), StubOptions(max_logprobs=5)) as two,
    ):
        keys: dict[str, Any] = {"distillation__top_k": 16}
        for name, stub in (("sort", one), ("upper", two)):
            keys[f"teachers__{name}__backend__type"] = "vllm"
            keys[f"teachers__{name}__backend__urls"] = f"[{stub.url}]"
        said = mopd(
            *("check", "recipe=mopd_ctkd", "--live", "--json"),
            *words(tiny_world, tmp_path, "run", **keys),
        )
    assert said.code == 1
    first, second = problems(said)
    assert first["item"] == "teachers.sort" and "sampling temperature" in first["detail"]
    assert second["item"] == "teachers.upper" and "--max-logprobs 16" in second["detail"]


def test_several_mistakes_in_files_are_all_told(tiny_world: World, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((tiny_world.teachers["sort"] / "config.json").read_text())
    keys = {
        "data__path": tmp_path / "rows.jsonl",
        "teachers__sort__model": bare,
        "teachers__sort__tokenizer": tiny_world.teachers["sort"],
    }
    said = mopd(
        *("check", "recipe=mopd_ctkd", "--live", "--json"),
        *words(tiny_world, tmp_path, "run", **keys),
    )
    assert said.code == 2
    details = {one["item"]: one["detail"] for one in problems(said)}
    assert "no teacher judges domain='default'" in details["data"]
    assert "no *.safetensors" in details["teachers.sort.model"]
    assert said.json["findings"][-1]["item"] == "--live"


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        (["train.stpes=3"], "did you mean `train.steps`?"),
        (["data.path=/no/such.jsonl"], "data.path: /no/such.jsonl"),
        (["rollout.temperature=0"], "rollout.temperature"),
    ],
)
def test_a_wrong_recipe_is_one_finding(
    more: list[str], wanted: str, tiny_world: World, tmp_path: Path
) -> None:
    said = mopd("check", "recipe=mopd_ctkd", *words(tiny_world, tmp_path, "run"), *more)
    assert said.code == 2
    assert re.search(r"^recipe +problem +.*" + re.escape(wanted), said.out.splitlines()[0]), said


def test_teachers_on_the_students_ranks_are_tested_for_real(
    tiny_world: World, tmp_path: Path
) -> None:
    keys = {"teachers__sort__backend__type": "megatron"}
    said = mopd(
        *("check", "recipe=mopd_ctkd", "--live"), *words(tiny_world, tmp_path, "run", **keys)
    )
    assert said.code == 0, said
    assert re.search(r"^teachers.sort +ok +megatron", said.out, re.MULTILINE)


@pytest.mark.parametrize("fails", [False, True], ids=["starts", "fails"])
def test_servers_of_the_recipe_are_started_and_ended(
    fails: bool, tiny_world: World, tmp_path: Path
) -> None:
    script = small_server(tmp_path, script=SCRIPT if fails else TEACHER)
    keys = {
        "teachers__sort__backend__type": "vllm",
        "teachers__sort__backend__server__python": script,
        "teachers__sort__backend__server__args": "[--fail]" if fails else "[]",
        "distillation__top_k": 16,
    }
    said = mopd(
        *("check", "recipe=mopd_ctkd", "--live", "--json"),
        *words(tiny_world, tmp_path, "run", **keys),
    )
    status = {one["item"]: one["status"] for one in said.json["findings"]}
    assert len(starts(script)) == 1 and left_over(script) == []
    assert "starting vLLM for teachers.sort" in said.err
    assert said.code == int(fails)
    assert status["servers"] == ("problem" if fails else "ok")
    assert status["teachers.sort"] == ("skipped" if fails else "ok")
    assert status["teachers.upper"] == status["rollout.backend"] == "ok"
    assert not (tmp_path / "run").exists()
    assert list((tmp_path / "cache" / "check" / "run" / "servers").glob("*.log"))
