"""Files as others write them, and files that nobody should read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mopd.config.peers.read import MAX_BYTES, read_keys
from mopd.errors import ConfigError


def read(tmp_path: Path, content: str, name: str = "f.yaml") -> dict[str, Any]:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    return read_keys(path)


def test_sections_and_lists_become_dotted_keys(tmp_path: Path) -> None:
    content = "a: {b: 1, c: [x, y]}\nt:\n- {n: p}\n- {n: q, e: []}\nd: 2020-01-01\n"
    keys = {"a.b": 1, "a.c": ["x", "y"], "t.0.n": "p", "t.1.n": "q", "t.1.e": [], "d": "2020-01-01"}
    assert read(tmp_path, content) == keys
    assert read(tmp_path, '{"a": {"b": 1e-5}}', "f.json") == {"a.b": 1e-5}


SCRIPT = r"""#!/bin/bash
# --not a key
MODEL=org/m   # the student
export RATE=1e-5
torchrun --nproc_per_node 4 \
    train.py \
    --model $MODEL --teacher_model ${TEACHER:-org/t} \
    --dataset a.jsonl#500 'b c' \
    --learning-rate=$RATE --use_vllm --other "$HOME" --json '[{"url": "u"}]'
echo done
"""


def test_a_script_is_cut_into_arguments_and_variables(tmp_path: Path) -> None:
    assert read(tmp_path, SCRIPT, "run.sh") == {
        "MODEL": "org/m",
        "RATE": "1e-5",
        "launch.nproc_per_node": "4",
        "model": "org/m",
        "teacher_model": "org/t",
        "dataset": ["a.jsonl#500", "b c"],
        "learning_rate": "1e-5",
        "use_vllm": True,
        "other": "$HOME",
        "json": '[{"url": "u"}]',
    }


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "\n".join(
    f"{new}: &{new} {{{', '.join(f'k{i}: *{old}' for i in range(9))}}}"
    for old, new in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("f.yaml", "a: !!python/object/apply:os.system [touch hacked]", "not valid YAML"),
        ("f.yaml", "a: 1\na: 2", "stands twice"),
        ("f.yaml", "a: &a [*a]", "nested deeper"),
        ("f.yaml", "a: &a {b: *a}", "nested deeper"),
        ("f.yaml", BOMB, "more than 5000 keys"),
        ("f.yaml", "a: [1", "not valid YAML"),
        ("f.yaml", "a: 2020-99-99", "not valid YAML"),
        ("f.yaml", "- 1", "has no keys"),
        ("f.yaml", "", "has no keys"),
        ("f.yaml", "[" * 3000, "not valid YAML"),
        ("f.json", "{" + '"a":' * 5000, "not valid JSON"),
        ("f.json", '{"a": 1, "a": 2}', "not valid JSON"),
        ("f.sh", "--a 'b", "not a shell script"),
        ("f.sh", "x --a 1\ny --a 2", "stands twice"),
        ("f.yaml", "a: " + "x" * MAX_BYTES, "larger than"),
    ],
)
def test_hostile_files_are_refused_in_one_line(
    tmp_path: Path, name: str, content: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        read(tmp_path, content, name)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert not Path("hacked").exists()


def test_bytes_that_are_no_text_and_files_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_keys(tmp_path / "f.yaml")
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_keys(path)


def test_nothing_of_a_script_is_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    keys = read(tmp_path, f"X=$(touch {mark})\nswift rlhf --model `touch {mark}` --beta 1", "r.sh")
    assert keys["beta"] == "1"
    assert not mark.exists()
