"""`mopd eval`: the numbers that a run measured itself, from what it left behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from mopd.demo import World
from tests.helpers.cli import mopd
from tests.helpers.dist import run_ranks
from tests.helpers.runs import summary, train_here, words

pytestmark = [pytest.mark.dist, pytest.mark.e2e]


@pytest.fixture(scope="module")
def trained(tiny_world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps with a rate that changes the answers, evaluated after each; one float32 rank."""
    directory = tmp_path_factory.mktemp("trained")
    keys = {
        "train__steps": 2,
        "checkpoint__save_interval": 1,
        "student__optimizer__lr": 3e-2,
        "evaluate__interval": 1,
        "evaluate__teachers": "false",
        "evaluate__max_prompts_per_domain": 8,
        "evaluate__kl_prompts_per_domain": 3,
        "data__validation_path": tiny_world.selection,
        "data__response_key": "answer",
    }
    run_ranks(train_here, 1, "mopd_ctkd", words(tiny_world, directory, "one", **keys), timeout=200)
    return directory / "one"


def evaluation(run: Path, step: int) -> dict[str, float]:
    (found,) = (one for one in summary(run)["evaluations"] if one["step"] == step)
    return {key: value for key, value in found.items() if key != "step"}


def evaluated(words: Sequence[object]) -> dict[str, float]:
    said = mopd("eval", *words, "--json")
    assert said.code == 0, said
    return {key: value for key, value in said.json.items() if key.startswith("eval/")}


def answers(line: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in line.items() if k.startswith(("eval/accuracy/", "eval/canonical/"))}


def test_a_finished_run_and_its_checkpoint_have_its_numbers(trained: Path) -> None:
    assert evaluated(["--run", trained]) == answers(evaluation(trained, 2))
    assert evaluated(["--run", trained, "--step", 1]) == answers(evaluation(trained, 1))
    assert answers(evaluation(trained, 0)) != answers(evaluation(trained, 2))


@pytest.mark.parametrize(("step", "words"), [(2, []), (1, ["--step", 1])], ids=["hf", "step"])
def test_losses_of_the_teachers_are_those_of_the_run(
    step: int, words: list[object], trained: Path
) -> None:
    found, own = evaluated(["--run", trained, "--loss", *words]), evaluation(trained, step)
    assert found.keys() == own.keys()
    assert own["eval/loss"] != pytest.approx(evaluation(trained, 3 - step)["eval/loss"], rel=1e-3)
    for key, value in own.items():
        assert found[key] == pytest.approx(value, rel=1e-5), key


def test_a_recipes_own_student_and_a_table(trained: Path) -> None:
    recipe = f"recipe={trained / 'config.yaml'}"
    assert evaluated([recipe]) == answers(evaluation(trained, 0))
    said = mopd("eval", recipe, "--model", trained / "hf", "evaluate.max_prompts_per_domain=4")
    assert said.code == 0 and said.out.splitlines()[-1] == str(trained / "hf")
    assert [line.split()[:2] for line in said.out.splitlines()[1:3]] == [
        ["sort", "4"],
        ["upper", "4"],
    ]


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        (["--run", "nowhere"], "--run nowhere: is no run"),
        (["--step", "1"], "--step: is of a run's checkpoints"),
        (["--model", "nowhere"], "--model nowhere: holds no model"),
        (["--loss", "data.validation_path=null"], "--loss: data.validation_path is not set"),
        (["data.heldout_path=null", "evaluate.interval=null"], "data.heldout_path: is not set"),
    ],
)
def test_a_wrong_command_is_one_line(more: list[str], wanted: str, trained: Path) -> None:
    recipe = [] if "--run" in more else [f"recipe={trained / 'config.yaml'}"]
    said = mopd("eval", *recipe, *more)
    assert said.code == 2 and said.err.count("\n") == 1 and wanted in said.err


def test_a_checkpoint_that_is_not_there(trained: Path) -> None:
    said = mopd("eval", "--run", trained, "--step", 7)
    assert said.code == 2 and "--step 7: no such checkpoint; there are 1, 2" in said.err
