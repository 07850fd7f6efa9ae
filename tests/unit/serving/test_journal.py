"""Journals: what is written is read back, and what a crash cut is dropped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mopd.errors import ArtifactError
from mopd.serving.journal import Journal, read_journal
from mopd.types import Prompt, Rollout


def rollout(name: str, *, sample: int = 0, version: int = 0) -> Rollout:
    return Rollout(
        prompt=Prompt(id=name, messages=(), domain="d"),
        sample_index=sample,
        prompt_ids=np.zeros(1, dtype=np.int32),
        token_ids=np.array([3, 1, 2], dtype=np.int32),
        loss_mask=np.ones(3, dtype=bool),
        logprobs=np.array([-0.1, -1 / 3, -7e-8], dtype=np.float32),
        byte_ends=np.array([1, 2, 2]),
        response=b"ab",
        policy_version=version,
        finish_reason="stop",
    )


def write(path: Path, steps: range, *, names: tuple[str, ...] = ("p", "q\n\u2028\u00e9")) -> None:
    journal = Journal(path)
    for step in steps:
        journal.append(step, [rollout(name, version=step) for name in names])
    journal.close()


def keys(path: Path) -> list[tuple[int, str, int]]:
    return sorted(read_journal(path))


def test_what_is_written_is_read_back_exactly(tmp_path: Path) -> None:
    write(tmp_path / "journal" / "rollouts-0.jsonl", range(2))
    record = read_journal(tmp_path)[1, "q\n\u2028\u00e9", 0]
    assert record["ids"] == [3, 1, 2]
    logprobs = np.array(record["logprobs"], dtype=np.float32)
    assert (logprobs == rollout("p").logprobs).all()
    assert (record["finish"], record["version"]) == ("stop", 1)
    assert len((tmp_path / "journal" / "rollouts-0.jsonl").read_text().splitlines()) == 4


def test_lines_are_durable_before_append_returns(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.jsonl")
    journal.append(0, [rollout("p")])
    assert keys(tmp_path / "j.jsonl") == [(0, "p", 0)]  # the file is still open
    journal.close()


@pytest.mark.parametrize("step", [0, 2, 4])
def test_later_steps_that_are_whole_are_handed_back_once(tmp_path: Path, step: int) -> None:
    path = tmp_path / "j.jsonl"
    write(path, range(4), names=("p", "q"))
    with path.open("a") as file:  # a crash cut step 4 short
        file.write('{"step":4,"prompt":"p","sample":0}\n')
    journal = Journal(path)
    journal.resume_from(step, size=2)
    for number in range(6):
        found = journal.recorded(number)
        assert (found is not None) == (step <= number < 4)
        assert found is None or [record["prompt"] for record in found] == ["p", "q"]
        assert journal.recorded(number) is None
    journal.append(9, [rollout("p", version=9)])
    journal.close()
    assert [key[0] for key in keys(path)] == [0, 0, 1, 1, 2, 2, 3, 3, 9]
    assert [file.name for file in tmp_path.iterdir()] == ["j.jsonl"]


def test_missing_logprobs_and_the_author_survive(tmp_path: Path) -> None:
    foreign = replace(rollout("p"), logprobs=np.full(3, np.nan, dtype=np.float32), source="dataset")
    journal = Journal(tmp_path / "j.jsonl")
    journal.append(0, [foreign])
    journal.close()
    (record,) = read_journal(tmp_path / "j.jsonl").values()
    assert record["logprobs"] == [None] * 3 and record["source"] == "dataset"


@pytest.mark.parametrize("size", [1, 20, 60])
def test_a_line_that_a_crash_cut_is_dropped(tmp_path: Path, size: int) -> None:
    path = tmp_path / "j.jsonl"
    write(path, range(2), names=("p",))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:size])
    assert len(read_journal(path)) == 2
    journal = Journal(path)
    journal.resume_from(2, size=1)
    journal.close()
    assert path.read_bytes() == whole


def test_all_files_of_a_run_are_read_from_any_of_its_names(tmp_path: Path) -> None:
    write(tmp_path / "journal" / "rollouts-0.jsonl", range(1), names=("p",))
    write(tmp_path / "journal" / "rollouts-1.jsonl", range(1), names=("q",))
    assert keys(tmp_path) == keys(tmp_path / "journal") == [(0, "p", 0), (0, "q", 0)]
    assert keys(tmp_path / "journal" / "rollouts-1.jsonl") == [(0, "q", 0)]


def test_a_missing_journal_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ArtifactError, match="no journal there"):
            read_journal(path)


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_text('{"step": 0, "prom\n')
    with pytest.raises(ArtifactError):
        read_journal(path)
