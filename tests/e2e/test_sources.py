"""Where answers come from and how old they are: whole short runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mopd.demo import World
from mopd.serving.journal import read_journal
from tests.helpers.dist import RankError, run_ranks
from tests.helpers.runs import step_lines, summary, train_here, words

pytestmark = pytest.mark.dist


def train(
    world: World, directory: Path, name: str, *, ranks: int = 1, recipe: str = "mopd_ctkd", **keys
) -> list[dict]:
    arguments = words(world, directory, name, **({"train__steps": 4} | keys))
    run_ranks(train_here, ranks, recipe, arguments, timeout=200)
    return step_lines(directory / name)


def versions(run: Path) -> list[tuple[int, int]]:
    found = {(step, record["version"]) for (step, _, _), record in read_journal(run).items()}
    return sorted(found)


@pytest.mark.parametrize("lag", [1, 2])
def test_answers_are_so_many_versions_old_and_the_same_on_two_replicas(
    tiny_world: World, tmp_path: Path, lag: int
) -> None:
    one = train(tiny_world, tmp_path, "one", rollout__max_staleness=lag)
    assert versions(tmp_path / "one") == [(step, max(0, step - lag)) for step in range(4)]
    assert [line["staleness"] for line in one] == [min(step, lag) for step in range(4)]
    answers = summary(tmp_path / "one")["answers"]
    assert answers == {"issued": 32, "trained": 32, "dropped": {}, "in_flight": 0}
    if lag == 1:
        two = train(tiny_world, tmp_path, "two", ranks=2, rollout__max_staleness=lag)
        assert [x["loss"] for x in two] == pytest.approx([x["loss"] for x in one], rel=1e-4)
        assert summary(tmp_path / "two")["answers"] == answers


def test_a_replay_of_stale_answers_is_dropped_where_the_recipe_wants_fresh_ones(
    tiny_world: World, tmp_path: Path
) -> None:
    train(tiny_world, tmp_path, "stale", rollout__max_staleness=2)
    replay = {"rollout__backend__type": "replay", "rollout__backend__path": tmp_path / "stale"}
    train(tiny_world, tmp_path, "fresh", **replay)
    answers = summary(tmp_path / "fresh")["answers"]
    assert answers["dropped"] == {"stale": 24} and answers["trained"] == 8
    lines = train(tiny_world, tmp_path, "same", rollout__max_staleness=2, **replay)
    before = step_lines(tmp_path / "stale")
    assert [x["loss"] for x in lines] == [x["loss"] for x in before]


def with_responses(world: World, folder: Path) -> Path:
    rows = [json.loads(line) for line in Path(world.data).read_text().splitlines()]
    path = folder / "answered.jsonl"
    lines = [json.dumps({**row, "response": row["answer"]}) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("source", ["dataset", "teacher"])
def test_a_share_of_the_answers_is_written_by_others(
    tiny_world: World, tmp_path: Path, source: str
) -> None:
    lines = train(
        tiny_world,
        tmp_path,
        "mixed",
        rollout__lmbda=0.5,
        rollout__off_policy=source,
        data__path=with_responses(tiny_world, tmp_path),
    )
    records = list(read_journal(tmp_path / "mixed").values())
    others = [record for record in records if record["source"] != "student"]
    assert {record["source"] for record in others} == {source}
    assert 0.2 < len(others) / len(records) < 0.8
    assert sum(1 - line["on_policy"] for line in lines) * 8 == pytest.approx(len(others))
    assert all(line["grad_norm"] > 0 for line in lines)
    assert all(logprob is None for record in others for logprob in record["logprobs"])


@pytest.mark.parametrize(
    "chunk_term", [{"ctkd__lambda_chunk": 0.5}, {"distillation__loss": "gold"}]
)
def test_no_loss_reads_the_logprobs_that_others_do_not_have(
    tiny_world: World, tmp_path: Path, chunk_term: dict
) -> None:
    lines = train(
        tiny_world,
        tmp_path,
        "others",
        rollout__lmbda=0.0,
        rollout__off_policy="teacher",
        **chunk_term,
    )
    assert all(line["skipped"] == 0 and line["grad_norm"] > 0 for line in lines)


def test_rows_without_a_response_are_named(tiny_world: World, tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"row .* of data.path has no `response`"):
        train(tiny_world, tmp_path, "none", rollout__lmbda=0.5)


def test_truncated_answers_are_dropped_and_change_nothing(
    tiny_world: World, tmp_path: Path
) -> None:
    keys = {"rollout__max_new_tokens": 5, "rollout__mask_truncated_completions": "true"}
    lines = train(tiny_world, tmp_path, "cut", train__steps=2, **keys)
    answers = summary(tmp_path / "cut")["answers"]
    truncated = [r for r in read_journal(tmp_path / "cut").values() if r["finish"] == "length"]
    assert answers["dropped"] == {"truncated": len(truncated)} and truncated
    assert answers["trained"] == 16 - len(truncated)
    assert sum(line["dropped/truncated"] for line in lines) * 8 == pytest.approx(len(truncated))


def test_a_run_that_trains_on_nothing_ends(tiny_world: World, tmp_path: Path) -> None:
    keys = {"rollout__max_new_tokens": 1, "rollout__mask_truncated_completions": "true"}
    with pytest.raises(RankError, match="10 steps in a row had no answer to train on"):
        train(tiny_world, tmp_path, "idle", train__steps=20, **keys)


def test_a_replay_has_the_answers_of_others_too(tiny_world: World, tmp_path: Path) -> None:
    mixed = {"rollout__lmbda": 0.5, "rollout__off_policy": "teacher"}
    before = train(tiny_world, tmp_path, "mixed", **mixed)
    after = train(
        tiny_world,
        tmp_path,
        "replayed",
        rollout__backend__type="replay",
        rollout__backend__path=tmp_path / "mixed",
        **mixed,
    )
    assert [line["loss"] for line in after] == [line["loss"] for line in before]
    assert [line["on_policy"] for line in after] == [line["on_policy"] for line in before]
    assert min(line["on_policy"] for line in after) < 1.0
