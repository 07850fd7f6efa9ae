"""Answers that come with the data: nothing is sampled, and a validation loss falls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mopd.demo import World
from mopd.serving.journal import read_journal
from tests.helpers.dist import RankError, run_ranks
from tests.helpers.runs import step_lines, summary, train_here, words

pytestmark = pytest.mark.dist

STEPS = 12


def offpolicy(world: World, directory: Path, name: str, *, ranks: int = 1, **keys: Any) -> Path:
    settings = {
        "data__heldout_path": "null",
        "data__validation_path": world.selection,
        "train__steps": STEPS,
        "student__optimizer__lr": 3e-3,
        "evaluate__interval": 4,
        **keys,
    }
    arguments = words(world, directory, name, **settings)
    run_ranks(train_here, ranks, "mopd_offpolicy", arguments, timeout=200)
    return directory / name


def test_the_validation_loss_falls_and_nobody_samples(tiny_world: World, tmp_path: Path) -> None:
    # the tiny world's teachers know nothing, so the right answers would pull away from them
    run = offpolicy(tiny_world, tmp_path, "plain", distillation__crossentropy_weight=0)
    found = summary(run)
    losses = [one["eval/loss"] for one in found["evaluations"]]
    assert len(losses) == 4 and losses[-1] < 0.9 * losses[0]
    for teacher in ("sort", "upper"):
        first, last = found["evaluations"][0], found["evaluations"][-1]
        assert last[f"eval/validation_kl/{teacher}"] < first[f"eval/validation_kl/{teacher}"]
    assert found["best_step"] == min(found["evaluations"], key=lambda x: x["eval/loss"])["step"]
    assert found["domains"] == {} and found["learned"] is None
    lines = [line for line in step_lines(run) if "loss" in line]
    assert all(line["on_policy"] == 0 and "sync/probe" not in line for line in lines)
    records = read_journal(run).values()
    assert {record["source"] for record in records} == {"dataset"}
    assert found["answers"]["trained"] == 8 * STEPS


def test_parquet_columns_two_replicas_and_accuracy(tiny_world: World, tmp_path: Path) -> None:
    """The same rows under other names in Parquet, a thread ahead, and held-out accuracy as well."""
    import pyarrow
    from pyarrow.parquet import write_table

    rows = [json.loads(line) for line in Path(tiny_world.data).read_text().splitlines()]
    table = [
        {"id": r["id"], "domain": r["domain"], "q": r["messages"][0]["content"], "a": r["answer"]}
        for r in rows
    ]
    (tmp_path / "data").mkdir()
    for name, part in (("1", table[:100]), ("2", table[100:])):
        write_table(pyarrow.Table.from_pylist(part), tmp_path / f"data/{name}.parquet")
    keys = {"train__steps": 2, "evaluate__interval": 2, "evaluate__max_prompts_per_domain": 5}
    # nine rows: the last batch of an evaluation leaves one of two replicas without a row
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps(row) + "\n" for row in rows[:4] + rows[-7:]))
    jsonl = offpolicy(tiny_world, tmp_path, "jsonl", data__validation_path=few, **keys)
    heldout = tmp_path / "heldout.parquet"
    write_table(pyarrow.Table.from_pylist(table[:4] + table[-7:]), heldout)
    parquet = offpolicy(
        tiny_world,
        tmp_path,
        "parquet",
        ranks=2,
        data__path=tmp_path / "data",
        data__heldout_path=heldout,
        data__validation_path=heldout,
        data__prompt_key="q",
        data__response_key="a",
        data__answer_key="a",
        rollout__max_staleness=1,
        **keys,
    )
    ours = [line for line in step_lines(parquet) if "loss" in line]
    theirs = [line for line in step_lines(jsonl) if "loss" in line]
    assert [x["loss"] for x in ours] == pytest.approx([x["loss"] for x in theirs], rel=1e-4)
    first = summary(parquet)["evaluations"][0]
    for name, value in summary(jsonl)["evaluations"][0].items():
        assert first[name] == pytest.approx(value, rel=1e-4), name
    last = summary(parquet)["evaluations"][-1]
    for name in ("eval/accuracy/sort", "eval/kl/sort", "eval/validation_kl/sort", "eval/loss"):
        assert name in last
    assert summary(parquet)["domains"].keys() == {"sort", "upper"}


def test_rows_without_an_answer_are_named(tiny_world: World, tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"data\.path: row .* has no answer to train on; give it"):
        offpolicy(tiny_world, tmp_path, "none", data__response_key="nothing")


def test_a_metric_without_a_number_is_refused(tiny_world: World, tmp_path: Path) -> None:
    """Every validation row is cut and left out: a loss of 0 would be the best there is."""
    keys = {"rollout__max_new_tokens": 1, "rollout__mask_truncated_completions": True}
    with pytest.raises(RankError, match=r"evaluate\.metric=loss: checkpoint\.keep_best=1 goes by"):
        offpolicy(tiny_world, tmp_path, "cut", checkpoint__keep_best=1, **keys)


def test_an_accuracy_that_no_row_tells_is_refused(tiny_world: World, tmp_path: Path) -> None:
    keys = {"data__answer_key": "nothing", "data__response_key": "answer"}
    with pytest.raises(RankError, match=r"evaluate\.metric=accuracy: .* no row of data\.heldout"):
        offpolicy(
            tiny_world,
            tmp_path,
            "accuracy",
            data__heldout_path=tiny_world.selection,
            evaluate__metric="accuracy",
            evaluate__patience=1,
            **keys,
        )
