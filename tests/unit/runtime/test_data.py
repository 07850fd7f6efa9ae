"""JSONL rows, routing, and the order in which prompts are drawn."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mopd.config.schema import DistillationSection, TeacherSection
from mopd.errors import ConfigError
from mopd.runtime.data import PromptSource, Router, read_prompts
from mopd.types import Prompt

MESSAGES = [{"role": "user", "content": "hi"}]


def router(default: str | None = None, **domains: tuple[str, ...]) -> Router:
    teachers = {name: TeacherSection(domains=listed) for name, listed in domains.items()}
    return Router(teachers, DistillationSection(default_teacher=default))


ROUTER = router(math=("math",), code=("code", "shell"))


def write(path: Path, *rows: dict[str, Any] | str) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return path


def row(**changes: Any) -> dict[str, Any]:
    return {"messages": MESSAGES, "domain": "math"} | changes


def test_rows_become_prompts(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", row(id=7, answer=12), "", row(domain="shell"))
    first, second = read_prompts(path, router=ROUTER, teacher_key="domain")
    assert (first.id, first.answer, first.domain, first.teachers) == ("7", "12", "math", ("math",))
    assert (second.id, second.answer, second.teachers) == ("d-3", None, ("code",))
    assert first.messages == ({"role": "user", "content": "hi"},)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "a JSON object"),
        (json.dumps({"domain": "math"}), "'messages' must be"),
        (json.dumps(row(messages=[])), "'messages' must be"),
        (json.dumps(row(messages=[{"role": "user"}])), "'messages' must be"),
        (json.dumps(row(messages=["hi"])), "'messages' must be"),
        (json.dumps(row(id="a")), "id 'a' is used twice"),
        (json.dumps(row(domain="law")), "no teacher judges domain='law'"),
        (json.dumps({"messages": MESSAGES}), "no teacher judges domain='default'"),
        (json.dumps(row(messages=[{"role": "user", "content": "a\ud83d"}])), "(\\ud83d)"),
        (json.dumps(row(response="\udc00")), "'response' holds half a character"),
        (json.dumps(row(answer="\udc00")), "'answer' holds half a character"),
        (json.dumps(row(id="\udc00")), "'id' holds half a character"),
        ("[" * 100_000, "not JSON"),
        ('{"id": ' + "1" * 5000 + "}", "not JSON"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, bad: str, message: str) -> None:
    path = write(tmp_path / "d.jsonl", row(id="a"), bad)
    with pytest.raises(ConfigError) as caught:
        read_prompts(path, router=ROUTER, teacher_key="domain")
    text = str(caught.value)
    assert text.startswith(f"{path}:2: ") and message in text
    assert "\n" not in text


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", "", "  ")
    with pytest.raises(ConfigError, match="no rows"):
        read_prompts(path, router=ROUTER, teacher_key="domain")


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\u0085"])
def test_line_separators_inside_a_string_are_text(tmp_path: Path, character: str) -> None:
    content = f"a{character}b"
    path = tmp_path / "d.jsonl"
    text = json.dumps(row(messages=[{"role": "user", "content": content}]), ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    (prompt,) = read_prompts(path, router=ROUTER, teacher_key="domain")
    assert prompt.messages[0]["content"] == content


def test_half_a_character_in_what_nobody_reads_is_let_pass(tmp_path: Path) -> None:
    assert read_one(tmp_path, row(note="\udc00"), ROUTER).teachers == ("math",)
    emoji = row(messages=[{"role": "user", "content": "\U0001f600"}])
    assert read_one(tmp_path, emoji, ROUTER).messages[0]["content"] == "\U0001f600"
    with pytest.raises(ConfigError, match="'hint' holds half a character"):
        read_one(tmp_path, row(hint="\udc00"), knowing(field="hint"))


def test_a_file_of_another_encoding_is_named_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    line = json.dumps(row(messages=[{"role": "user", "content": "\u00e9"}]), ensure_ascii=False)
    path.write_bytes(json.dumps(row()).encode() + b"\n" + line.encode("latin-1") + b"\n")
    with pytest.raises(ConfigError, match=r"d\.jsonl:2: not UTF-8 .*; save the file as UTF-8"):
        read_prompts(path, router=ROUTER, teacher_key="domain")


def knowing(top_k: int | None = 8, **privileged: Any) -> Router:
    teachers = {
        "math": TeacherSection.model_validate({"domains": ("math",), "privileged": privileged}),
        "all": TeacherSection(),
        "off": TeacherSection.model_validate({"weight": 0, "privileged": {"field": "nowhere"}}),
    }
    return Router(teachers, DistillationSection(top_k=top_k))


def read_one(tmp_path: Path, one: dict[str, Any], router_: Router) -> Prompt:
    path = write(tmp_path / "d.jsonl", one)
    (prompt,) = read_prompts(path, router=router_, teacher_key="domain")
    return prompt


def test_only_named_fields_are_read_and_only_where_their_teacher_judges(tmp_path: Path) -> None:
    router_ = knowing(field="hint")
    prompt = read_one(tmp_path, row(hint="1 2", secret="x"), router_)
    assert prompt.private == {"hint": "1 2"} and prompt.top_k is None
    assert read_one(tmp_path, row(domain="law"), router_).private == {}
    assert read_one(tmp_path, row(hint=""), router_).private == {"hint": ""}


@pytest.mark.parametrize("value", [None, 3, ["a"]])
def test_a_private_field_must_be_a_string(tmp_path: Path, value: Any) -> None:
    bad = row() if value is None else row(hint=value)
    message = r"d\.jsonl:1: teachers\.math\.privileged\.field='hint' must be a string.*add it"
    with pytest.raises(ConfigError, match=message):
        read_one(tmp_path, bad, knowing(field="hint"))


@pytest.mark.parametrize("keys", [{"prefix": "P"}, {"field": "hint"}])
def test_a_text_before_a_user_message_needs_one(tmp_path: Path, keys: dict[str, str]) -> None:
    bad = row(messages=[{"role": "system", "content": "s"}], hint="h")
    with pytest.raises(ConfigError, match=r"d\.jsonl:1: no user message.*privileged\.system"):
        read_one(tmp_path, bad, knowing(**keys))
    assert read_one(tmp_path, bad, knowing(system="S")).private == {}


def test_a_row_may_have_its_own_top_k(tmp_path: Path) -> None:
    for value in (1, 8):
        assert read_one(tmp_path, row(top_k=value), knowing()).top_k == value
    assert read_one(tmp_path, row(top_k=None), knowing(top_k=None)).top_k is None


@pytest.mark.parametrize("value", [0, 9, -1, 2.0, "4", True])
def test_a_top_k_beyond_the_recipes_is_refused(tmp_path: Path, value: Any) -> None:
    message = r"d\.jsonl:1: 'top_k' must be an integer from 1 to distillation\.top_k=8"
    with pytest.raises(ConfigError, match=message):
        read_one(tmp_path, row(top_k=value), knowing())


def test_a_top_k_of_whole_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"d\.jsonl:1: 'top_k' cuts lists.*give distillation"):
        read_one(tmp_path, row(top_k=4), knowing(top_k=None))


def test_routing() -> None:
    everyone = router(math=("math",), all=())
    assert everyone.route("math", "x") == ("math", "all")
    assert everyone.route("law", "x") == ("all",)
    assert router("code", math=("math",), code=("code",)).route("law", "x") == ("code",)
    assert router("code", math=("math",), code=("code",)).route("math", "x") == ("math",)


def test_teachers_of_weight_0_judge_nothing() -> None:
    teachers = {"a": TeacherSection(weight=0), "b": TeacherSection(domains=("x",))}
    assert Router(teachers, DistillationSection()).route("x", "w") == ("b",)
    with pytest.raises(ConfigError, match="no teacher judges"):
        Router(teachers, DistillationSection()).route("y", "w")


def test_a_default_teacher_of_weight_0_is_refused() -> None:
    teachers = {"a": TeacherSection(weight=0), "b": TeacherSection(domains=("x",))}
    with pytest.raises(ConfigError):
        Router(teachers, DistillationSection(default_teacher="a")).route("y", "w")


def prompts(**sizes: int) -> list[Prompt]:
    return [
        Prompt(id=f"{domain}{n}", messages=(), domain=domain)
        for domain, size in sizes.items()
        for n in range(size)
    ]


def source(pool: list[Prompt], *, size: int, seed: int = 1, balance: bool = True) -> PromptSource:
    return PromptSource(pool, num_prompts_per_step=size, seed=seed, balance=balance)


def drawn(source_: PromptSource, steps: range) -> list[list[str]]:
    return [[prompt.id for prompt in source_.take(step)] for step in steps]


def test_steps_do_not_depend_on_what_was_drawn_before() -> None:
    pool = prompts(a=7, b=5)
    whole = drawn(source(pool, size=4), range(12))
    assert drawn(source(pool, size=4), range(12)) == whole
    assert drawn(source(pool, size=4), range(9, 12)) == whole[9:]
    backwards = source(pool, size=4)
    assert [drawn(backwards, range(s, s + 1))[0] for s in reversed(range(12))] == whole[::-1]
    assert drawn(source(pool, size=4, seed=2), range(12)) != whole


def test_every_prompt_comes_once_an_epoch_and_epochs_differ() -> None:
    steps = drawn(source(prompts(a=6, b=4), size=4), range(6))
    for domain, size in (("a", 6), ("b", 4)):
        mine = [name for step in steps for name in step if name.startswith(domain)]
        epochs = [mine[i : i + size] for i in range(0, len(mine) - size + 1, size)]
        assert all(len(set(epoch)) == size for epoch in epochs)
        assert epochs[0] != epochs[1]


@pytest.mark.parametrize("size", [4, 5])
def test_balance_holds_in_every_step_and_over_the_run(size: int) -> None:
    steps = drawn(source(prompts(a=30, b=3), size=size), range(6))
    for step in steps:
        counts = Counter(name[0] for name in step)
        assert abs(counts["a"] - counts["b"]) <= size % 2
    total = Counter(name[0] for step in steps for name in step)
    assert abs(total["a"] - total["b"]) <= 1


def test_without_balance_domains_come_as_often_as_they_are_in_the_data() -> None:
    steps = drawn(source(prompts(a=9, b=3), size=4, balance=False), range(3))
    assert Counter(name[0] for step in steps for name in step) == {"a": 9, "b": 3}
