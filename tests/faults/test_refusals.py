"""Twelve mistakes end the start: exit code 2, one line with the remedy, before any step.

Where a detector can be switched off alone, the same start then trains: it is what refuses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mopd.demo import World
from mopd.projection import ProjectionOptions, build_projection
from mopd.projection.store import save_projection
from mopd.tokens.chat import ChatTokenizer
from tests.faults import refusals
from tests.faults.refusals import Start, changed_copy, start_here
from tests.helpers.dist import run_ranks
from tests.helpers.runs import launch, words
from tests.helpers.stub_scorers import PrefixScorer
from tests.helpers.stub_server import StubOptions, StubServer

pytestmark = pytest.mark.dist

SECONDS = 30.0
NAME = "run"
SIZE = 560  # of the teacher's tokenizer
TEXTS = "mopd.teachers.identity:Identity.check_texts"
CHATS = "mopd.teachers.identity:Identity.check_chats"
END = "mopd.tokens.chat:ChatTokenizer.check_end"
TEACHER_EOS = (
    r"teachers\.sort: its chat template ends a turn with <\|eot_id\|>, and its tokenizer's "
    r"eos_token is <\|pad\|>; set teachers\.sort\.eos_token=<\|eot_id\|>$"
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One mistake.

    Args:
        message: what the line says, a regular expression.
        server: options of the stub server; None: the teacher is in process.
        served: changes to the files that the server has; the recipe's stay.
        keys: of the recipe.
        files: keys whose values are made from the world, in a directory.
        off: the detectors without which the start would train.
    """

    message: str
    server: dict[str, Any] | None = None
    served: dict[str, Any] | None = None
    keys: dict[str, Any] | None = None
    files: Callable[[World, Path], dict[str, Any]] | None = None
    off: tuple[str, ...] = ()


def teacher_of(**changes: Any) -> Callable[[World, Path], dict[str, Any]]:
    """The teacher's own directory, changed."""

    def files(world: World, path: Path) -> dict[str, Any]:
        return {
            "teachers__sort__model": changed_copy(world.teachers["sort"], path / "m", **changes)
        }

    return files


def student_without_its_end(world: World, path: Path) -> dict[str, Any]:
    eos = {"eos_token": "<|endoftext|>"}
    return {"student__model": changed_copy(world.student, path / "m", tokenizer_config=eos)}


def projection_of_another_pair(world: World, path: Path) -> dict[str, Any]:
    student, teacher = (
        ChatTokenizer.load(found).vocabulary for found in (world.student, world.teachers["upper"])
    )
    options = ProjectionOptions(max_length=4, gamma=0.0)
    save_projection(
        path / "p.safetensors", build_projection(student, teacher, options), options=options
    )
    return {"teachers__sort__projection_matrix_path": path / "p.safetensors"}


NO_END = teacher_of(tokenizer_config={"eos_token": "<|pad|>"})
REMEDY = r"name its own files: teachers\.sort\.tokenizer$"
CASES = {
    "1 model id": Case(
        server={},
        keys={"teachers__sort__backend__served_model": "other"},
        message=r"no model 'other' \(\['stub'\]\); set backend\.served_model",
    ),
    "2 tokenizer revision": Case(
        served={"tokenizer": refusals.another_revision},
        message=r"reads token \d+ where its tokenizer here reads .*" + REMEDY,
        off=(TEXTS, CHATS),
    ),
    "3 merge": Case(
        served={"tokenizer": refusals.without_a_merge},
        message=r"has other merges or pieces; " + REMEDY,
        off=(TEXTS,),
    ),
    "4 added token": Case(
        served={
            "tokenizer": refusals.another_added_token,
            "tokenizer_config": {"pad_token": "<|fim|>"},
        },
        message=r"the added token '<\|pad\|>' \(4\): it has another set of added tokens; " + REMEDY,
        off=(TEXTS,),
    ),
    "5 chat template": Case(
        served={"template": lambda text: text.replace("<|eot_id|>", "<|eot_id|>\n")},
        message=r"writes a chat of user with other tokens: it has another chat template; " + REMEDY,
        off=(CHATS,),
    ),
    "5 chat template of a finished turn": Case(
        served={
            "template": lambda text: (
                text + "{% if messages[-1]['role'] == 'assistant' %}!{% endif %}"
            )
        },
        message=r"writes a chat of user, assistant with other tokens",
        off=(CHATS,),
    ),
    "6 end of turn, in process": Case(files=NO_END, message=TEACHER_EOS, off=(END,)),
    "6 end of turn, served": Case(server={}, files=NO_END, message=TEACHER_EOS, off=(END,)),
    "6 end of turn, student": Case(
        files=student_without_its_end,
        message=r"student: .* ends a turn with <\|im_end\|>.*set student\.eos_token=<\|im_end\|>$",
        off=(END,),
    ),
    "7 ids beyond the tokenizer": Case(
        server={"width": 700}, message=r"lists token ids beyond the 560.*teachers\.sort\.tokenizer$"
    ),
    "7 narrower server": Case(
        server={"vocab_size": 300}, message=r"refuses ids below the 560.*teachers\.sort\.tokenizer$"
    ),
    "7 narrower model, in process": Case(
        files=teacher_of(config={"vocab_size": 500}),
        message=r"logits for 500 tokens and its tokenizer has 560.*teachers\.sort\.tokenizer$",
    ),
    "8 top-k": Case(
        server={"max_logprobs": 5},
        message=r"refuses 16 log-probabilities a token; start it with --max-logprobs 16, or lower",
    ),
    "9 context": Case(
        server={"max_model_len": 150},
        keys={"rollout__max_new_tokens": 160},
        message=r"reads 149 tokens and this recipe needs 160; start it with --max-model-len 161",
        off=("mopd.teachers.selftest:check_context",),
    ),
    "9 context, in process": Case(
        files=teacher_of(config={"max_position_embeddings": 8}),
        message=r"reads 8 tokens, and an answer may have 14; lower rollout\.max_new_tokens",
    ),
    "10 temperature": Case(
        server={"tempered": True},
        message=r"applies the sampling temperature.*--logprobs-mode raw_logprobs$",
        off=("mopd.teachers.selftest:check_temperature",),
    ),
    "11 order": Case(
        server={"ordered": False},
        message=r"scores the same text .* apart in another order.*raise backend\.tolerance$",
        off=("mopd.teachers.selftest:difference",),
    ),
    "12 projection": Case(
        files=projection_of_another_pair,
        message=r"teachers\.sort\.projection_matrix_path: .*built for another teacher tokenizer",
    ),
}


@contextmanager
def recipe(case: Case, world: World, path: Path) -> Iterator[list[str]]:
    """The words of one training step with the teacher of the case, whose server is up."""
    keys: dict[str, Any] = {
        "run__overwrite": "true",
        "train__steps": 1,
        "distillation__top_k": 16,
        "data__heldout_path": "null",
        "teachers__sort__domains": "[]",
    }
    keys |= (case.keys or {}) | (case.files(world, path) if case.files else {})
    options = dict(case.server or {})
    if case.served is not None:
        files = changed_copy(world.teachers["sort"], path / "served", **case.served)
        options["tokenizer"] = ChatTokenizer.load(files)
    with StubServer(PrefixScorer(SIZE), StubOptions(**options)) as stub:
        if case.server is not None or case.served is not None:
            keys["teachers__sort__backend__type"] = "vllm"
            keys["teachers__sort__backend__urls"] = f"[{stub.url}]"
        found = words(world, path, NAME, **keys)
        yield [word for word in found if not word.startswith("teachers.upper.")]


def test_all_twelve_are_here() -> None:
    assert {int(name.split()[0]) for name in CASES} == set(range(1, 13))


@pytest.mark.parametrize("name", CASES)
def test_a_start_that_cannot_be_right_is_refused(
    name: str, tiny_world: World, tmp_path: Path
) -> None:
    case = CASES[name]
    with recipe(case, tiny_world, tmp_path) as overrides:
        (start,) = run_ranks(start_here, 1, overrides)
        assert_refused(start, case, tmp_path)
        assert start.seconds < SECONDS
        if case.off:
            (start,) = run_ranks(start_here, 1, overrides, case.off)
            assert start.code == 0, start.errors
            assert (tmp_path / NAME / "metrics.jsonl").read_text()


def assert_refused(start: Start, case: Case, path: Path) -> None:
    assert start.code == 2 and len(start.errors) == 1, start
    assert re.search(case.message, start.errors[0]), start.errors[0]
    assert start.errors[0].startswith(("error: teachers.sort", "error: student"))
    assert not (path / NAME / "metrics.jsonl").exists()
    assert not (path / NAME / "checkpoints").exists()


@pytest.mark.parametrize("name", ["3 merge", "12 projection"])
def test_the_command_itself_is_refused(name: str, tiny_world: World, tmp_path: Path) -> None:
    with recipe(CASES[name], tiny_world, tmp_path) as overrides:
        done = launch("mopd_ctkd", overrides, timeout=120)
    errors = tuple(done.stderr.splitlines())
    assert_refused(Start(code=done.returncode, errors=errors, seconds=0.0), CASES[name], tmp_path)


@pytest.mark.parametrize("name", ["6 end of turn, in process", "6 end of turn, student"])
def test_the_named_remedy_mends_the_end_of_turn(
    name: str, tiny_world: World, tmp_path: Path
) -> None:
    case = CASES[name]
    with recipe(case, tiny_world, tmp_path) as overrides:
        (refused,) = run_ranks(start_here, 1, overrides)
        remedy = refused.errors[0].rpartition("; set ")[2]
        (start,) = run_ranks(start_here, 1, [*overrides, remedy])
    assert start.code == 0, start.errors


def test_the_right_server_is_taken(tiny_world: World, tmp_path: Path) -> None:
    """With ``/tokenize`` from the same files, so that the cases above are not just any server."""
    with recipe(Case(message="", served={}), tiny_world, tmp_path) as overrides:
        (start,) = run_ranks(start_here, 1, overrides)
    assert start.code == 0, start.errors
