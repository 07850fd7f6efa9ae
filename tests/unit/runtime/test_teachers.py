"""Teachers of a recipe: what is refused before anything is asked, and what reaches the servers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from mopd.config.schema import RunConfig
from mopd.demo import World
from mopd.errors import ConfigError
from mopd.runtime.teachers import build_pool
from mopd.teachers.pool import TeacherPool
from mopd.tokens.chat import ChatTokenizer
from tests.helpers.stub_scorers import PrefixScorer
from tests.helpers.stub_server import StubOptions, StubServer
from tests.helpers.teachers import make_rollout_of


@pytest.fixture(scope="module")
def student(tiny_world: World) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_world.student)


@pytest.fixture(scope="module")
def tokenizer(tiny_world: World) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_world.teachers["sort"])


def build(
    student: ChatTokenizer,
    tokenizer: ChatTokenizer,
    *,
    backend: dict[str, Any],
    teacher: dict[str, Any] | None = None,
    **sections: Any,
) -> TeacherPool:
    section = {"backend": backend} | (teacher or {})
    config = RunConfig.model_validate({"teachers": {"sort": section}} | sections)
    return build_pool(config, {"sort": tokenizer}, student=student, device=torch.device("cpu"))


@pytest.mark.parametrize("kind", ["vllm", "openai", "sglang", "trl", "mopd"])
def test_every_type_of_server(kind: str, student: ChatTokenizer, tokenizer: ChatTokenizer) -> None:
    with StubServer(PrefixScorer(tokenizer.vocabulary.size)) as stub:
        backend = {"type": kind, "urls": [stub.url], "entries_per_request": 1}
        pool = build(
            student,
            tokenizer,
            backend=backend,
            distillation={"top_k": 4, "temperature": 2.0 if kind == "mopd" else 1.0},
        )
        began = len(stub.requests)
        found = pool.score([make_rollout_of(student, b"bo %d" % i) for i in range(3)])
        assert all(scores["sort"].valid.all() for scores in found)
        # each answer in a request of its own, besides the checks of new connections
        assert len(stub.requests) - began >= 3
        lse = found[0]["sort"].lse
        assert (lse is not None) == (kind == "mopd")
        if kind == "mopd":
            assert stub.requests[-1]["temperature"] in (1.0, 2.0)
            assert abs(lse[:, 0] - lse[:, 1]).min() > 0.1
        pool.close()


def test_whole_rows_by_the_recipe_and_their_budget(
    student: ChatTokenizer, tokenizer: ChatTokenizer
) -> None:
    size = tokenizer.vocabulary.size
    whole: dict[str, Any] = {"top_k": None}
    recipe: dict[str, Any] = {
        "rollout": {"max_new_tokens": 16, "num_generations_per_prompt": 2},
        "train": {"num_prompts_per_step": 4},
    }
    need = 4 * 2 * 16 * size * 4
    with StubServer(PrefixScorer(size)) as stub:
        backend = {"type": "mopd", "urls": [stub.url]}
        less = whole | {"max_remote_gb_per_step": (need - 1) / 1e9}
        with pytest.raises(ConfigError) as caught:
            build(student, tokenizer, backend=backend, distillation=less, **recipe)
        line = str(caught.value)
        assert line.startswith("distillation.top_k: null asks teachers.sort for up to ")
        assert f"{need / 1e9:.3g} GB" in line and "type=megatron or hf" in line
        assert not stub.requests
        enough = whole | {"max_remote_gb_per_step": need / 1e9}
        pool = build(student, tokenizer, backend=backend, distillation=enough, **recipe)
        (found,) = pool.score([make_rollout_of(student, b"bo 12")])
        assert found["sort"].topk_ids is None
        assert found["sort"].topk_logprobs.shape[1] == size
        pool.close()


def with_template(tokenizer: ChatTokenizer, template: str) -> ChatTokenizer:
    found = copy.copy(tokenizer)
    found._tokenizer = copy.deepcopy(tokenizer._tokenizer)
    found._tokenizer.chat_template = template
    return found


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system here') }}", r"refuses a system message \(no system here\)"),
        ("{{ messages[-1].content }}", "leaves a system message out"),
    ],
)
def test_a_system_text_needs_a_template_that_writes_it(
    template: str, message: str, student: ChatTokenizer, tokenizer: ChatTokenizer
) -> None:
    other = with_template(tokenizer, template)
    teacher = {"privileged": {"system": "S"}}
    with pytest.raises(ConfigError, match=message) as caught:
        build(student, other, backend={"type": "uniform"}, teacher=teacher)
    assert str(caught.value).startswith("teachers.sort.privileged.system: ")
    assert str(caught.value).endswith("use privileged.prefix")
    build(student, tokenizer, backend={"type": "uniform"}, teacher=teacher)
    build(student, other, backend={"type": "uniform"})


def test_a_server_that_cannot_be_the_teacher_is_a_mistake_in_the_recipe(
    student: ChatTokenizer, tokenizer: ChatTokenizer
) -> None:
    with (
        StubServer(PrefixScorer(300), StubOptions(model="m")) as stub,
        pytest.raises(ConfigError, match="300 columns"),
    ):
        build(student, tokenizer, backend={"type": "mopd", "urls": [stub.url]})
