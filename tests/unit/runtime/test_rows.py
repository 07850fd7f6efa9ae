"""Rows of JSON lines, Parquet and Arrow files, and the turns of a chat."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from mopd.config.schema import DataSection, DistillationSection, TeacherSection
from mopd.errors import ConfigError
from mopd.runtime.data import Router, check_answers, read_prompts
from mopd.runtime.rows import read_rows
from mopd.types import Prompt

ROUTER = Router({"any": TeacherSection()}, DistillationSection())
USER = {"role": "user", "content": "hi"}
BOT = {"role": "assistant", "content": "yes"}


def row(**changes: Any) -> dict[str, Any]:
    return {"messages": [USER], "domain": "a"} | changes


def jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def parquet(path: Path, *rows: dict[str, Any]) -> Path:
    import pyarrow
    from pyarrow.parquet import write_table

    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def arrow(path: Path, *rows: dict[str, Any]) -> Path:
    """A directory as `Dataset.save_to_disk` writes it."""
    from datasets import Dataset

    Dataset.from_list(list(rows)).save_to_disk(str(path))
    return path


def read(
    path: Path | str, *, answered: bool = False, cache: Path | None = None, **data: Any
) -> list[Prompt]:
    return read_prompts(
        path,
        router=ROUTER,
        teacher_key="domain",
        data=DataSection(**data),
        answered=answered,
        cache=cache,
    )


def arrow_file(path: Path, *rows: dict[str, Any]) -> Path:
    """Arrow's random-access format, which other tools write."""
    import pyarrow

    table = pyarrow.Table.from_pylist(list(rows))
    path = path.with_suffix(".arrow")
    with pyarrow.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    return path


WRITERS = {"jsonl": jsonl, "parquet": parquet, "arrow": arrow, "arrow-file": arrow_file}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_gives_the_same_prompts(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a data file asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    rows = [row(id="x", answer="1", response="r"), row(id="y", answer=None, response=None)]
    path = WRITERS[kind](tmp_path / f"d.{kind}", *rows)
    first, second = read(path, cache=tmp_path / "cache")
    assert (first.id, first.answer, first.response, first.domain) == ("x", "1", "r", "a")
    assert (second.id, second.answer, second.response) == ("y", None, None)
    assert first.messages == second.messages == (USER,)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_directory_and_a_pattern_are_read_in_order_of_names(kind: str, tmp_path: Path) -> None:
    for name in ("b", "a", "deep/a"):
        WRITERS[kind](tmp_path / "rows" / f"{name}.{kind}", row(), row())
    (tmp_path / "rows" / "README.md").write_text("no data")
    (tmp_path / "rows" / f".a.{kind}.crc").write_text("hidden")
    cache = tmp_path / "cache"
    found = [prompt.id for prompt in read(tmp_path / "rows", cache=cache)]
    assert found == ["a-1", "a-2", "b-1", "b-2", "deep/a-1", "deep/a-2"]
    pattern = f"{tmp_path}/rows/*.{kind}"
    assert len(read(pattern, cache=cache)) == 4
    assert len({prompt.id for prompt in read(pattern, cache=cache)}) == 4


def test_what_is_not_there_is_not_downloaded() -> None:
    with pytest.raises(ConfigError, match=r"^gsm8k: no such file, .*nothing is downloaded"):
        list(read_rows("gsm8k"))


def test_a_missing_column_and_a_bad_cell_are_named(tmp_path: Path) -> None:
    path = parquet(tmp_path / "d.parquet", {"question": "q"}, {"question": ""})
    with pytest.raises(ConfigError, match=r"no column 'messages' \(it has question\)"):
        read(path, cache=tmp_path)
    with pytest.raises(ConfigError, match=r"d\.parquet:2: 'question' \(data\.prompt_key\) must be"):
        read(path, cache=tmp_path, prompt_key="question")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_file_that_is_none_of_its_kind(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"d.{kind}"
    path.write_bytes(b"PAR1 nonsense")
    with pytest.raises(
        ConfigError, match=rf"d\.{kind}: cannot be read \(.*write it again"
    ) as found:
        read(path, cache=tmp_path)
    assert "\n" not in str(found.value)


def test_plain_columns(tmp_path: Path) -> None:
    path = parquet(tmp_path / "d.parquet", {"q": "2+2", "a": "4", "gold": 4})
    keys = {"prompt_key": "q", "response_key": "a", "answer_key": "gold"}
    (prompt,) = read(path, cache=tmp_path, answered=True, **keys)
    assert prompt.messages == ({"role": "user", "content": "2+2"},)
    assert (prompt.response, prompt.answer) == ("4", "4")


CHAT = [USER, BOT, {"role": "user", "content": "and?"}, {"role": "assistant", "content": "no"}]


def test_the_last_turn_or_all_of_them(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", row(id="x", messages=CHAT, answer="no"))
    (last,) = read(path, answered=True)
    assert (last.id, last.messages, last.response) == ("x", tuple(CHAT[:3]), "no")
    first, second = read(path, answered=True, train_on="all")
    assert (first.id, first.messages, first.response, first.answer) == ("x#1", (USER,), "yes", None)
    assert (second.id, second.messages, second.response) == ("x#2", tuple(CHAT[:3]), "no")
    assert second.answer == "no"
    (asked,) = read(path)  # where the student answers, it does not read an answer first
    assert asked.messages == tuple(CHAT[:3]) and asked.response is None


def test_a_response_is_the_last_turn(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", row(messages=CHAT[:3], response="no"))
    (last,) = read(path, answered=True)
    assert (last.messages, last.response) == (tuple(CHAT[:3]), "no")
    assert [prompt.response for prompt in read(path, answered=True, train_on="all")] == [
        "yes",
        "no",
    ]


def test_an_answer_without_a_prompt_or_a_prompt_without_an_answer(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", row(messages=[BOT]))
    for answered in (True, False):
        with pytest.raises(ConfigError, match=r"d\.jsonl:1: 'messages' begins with the assistant"):
            read(path, answered=answered)
    for content in (None, ""):
        path = jsonl(tmp_path / "d.jsonl", row(id="x", response=content))
        prompts = read(path, answered=True)
        with pytest.raises(ConfigError, match=r"^data\.path: row x has no answer .*response_key"):
            check_answers("data.path", prompts, data=DataSection())
