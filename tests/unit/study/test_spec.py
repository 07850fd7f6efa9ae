"""Study files: those of recipes/study run, and mistakes are one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from mopd.config.load import RECIPES, load_config
from mopd.demo.fill import WorldFill
from mopd.errors import ConfigError
from mopd.study.spec import Study, jobs_of, load_study

FILES = sorted((RECIPES / "study").glob("*.yaml"))
GOOD = """
name: s
seeds: [1, 2]
common: [train.steps=3]
groups: {g: {title: G}}
arms:
  two: {group: g, recipe: mopd_ctkd, asks: x, after: one, overrides: [train.steps=4]}
  one: {group: g, recipe: mopd_gold, asks: y}
"""


def read(tmp_path: Path, text: str) -> Study:
    path = tmp_path / "s.yaml"
    path.write_text(text)
    return load_study(path)


def test_there_are_study_files() -> None:
    assert FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_arm_of_every_file_can_run(path: Path) -> None:
    study = load_study(path).model_copy(update={"seeds": (5,)})  # the others are like it
    jobs = jobs_of(study, study.chosen("*"), fill=WorldFill(announce=False, build=False))
    assert [job.config.run.seed for job in jobs] == [5] * len(study.arms)
    assert all(job.config.student.model for job in jobs)
    # two arms that compute the same would be one question asked twice
    first = [job.config for job in jobs if job.after is None]
    plain = [c.model_copy(update={"run": first[0].run}) for c in first]
    assert all(a != b for i, a in enumerate(plain) for b in plain[:i])


def test_an_arm_comes_behind_the_one_it_starts_from(tmp_path: Path) -> None:
    study = read(tmp_path, GOOD)
    assert study.chosen("two") == ["two", "one"]
    jobs = jobs_of(study, study.chosen("*"), fill=WorldFill(announce=False, build=False))
    assert [job.name for job in jobs] == ["one-s1", "two-s1", "one-s2", "two-s2"]
    assert [job.config.train.steps for job in jobs] == [3, 4, 3, 4]


@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        ("seeds: [1, 2]", "seeds: [1, 1]", "seeds: one is listed twice"),
        ("seeds: [1, 2]", "seeds: []", "seeds: "),
        ("group: g, recipe: mopd_gold", "group: h, recipe: mopd_gold", "`h` is not under groups"),
        ("after: one", "after: three", "`three` is no arm"),
        ("after: one", "after: two", "leads back to itself"),
        ("asks: y", "ask: y", "arms.one.ask"),
        ("name: s", "name: a/b", "name: "),
        ("title: G", "title: G, baseline: [three]", "`three` is no arm"),
        ("arms:", "arms: [", "is no study file"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, old: str, new: str, wanted: str) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, GOOD.replace(old, new))
    assert wanted in str(caught.value) and "\n" not in str(caught.value)


def test_a_recipe_that_cannot_run_names_its_arm(tmp_path: Path) -> None:
    study = read(tmp_path, GOOD.replace("train.steps=4", "train.step=4"))
    with pytest.raises(ConfigError, match=r"arm two: .*train\.step"):
        jobs_of(study, study.chosen("*"), fill=WorldFill(announce=False, build=False))


def test_a_pattern_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no arm and no group"):
        read(tmp_path, GOOD).chosen("x*")


def test_study_files_are_not_offered_as_recipes() -> None:
    with pytest.raises(ConfigError, match=r"recipes: .*mopd_ctkd") as caught:
        load_config("nothing")
    assert "study/" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"a: [\n", "not valid YAML, line 2"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (None, "No such file or directory"),
    ],
)
def test_what_is_no_study_is_one_line_with_a_remedy(
    tmp_path: Path, content: bytes | None, wanted: str
) -> None:
    path = tmp_path / "study.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=wanted) as caught:
        load_study(path)
    assert "name one such as recipes/study/main.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)
