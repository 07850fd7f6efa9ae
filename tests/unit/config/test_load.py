"""Recipes and overrides become one RunConfig, and every mistake becomes one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from mopd.config import load
from mopd.config.load import dump_config, load_config, parse_arguments
from mopd.config.schema import RunConfig, RunSection
from mopd.errors import ConfigError

BASE = """
student: {model: models/student}
teachers:
  math: {model: models/math, domains: [math]}
  code: {model: models/code}
"""
TOP = """
defaults: [base]
train: {steps: 5}
cache_dir: ${run.dir}/cache
"""


@pytest.fixture(autouse=True)
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(load, "RECIPES", tmp_path)
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "top.yaml").write_text(TOP)
    return tmp_path


def complaint(recipe: str | Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, overrides)
    message = str(caught.value)
    assert message.isprintable()  # which also means: one line
    return message


def test_layers_merge_in_order() -> None:
    config = load_config("top", ["teachers.math.weight=3", "teachers.code.domains=[a, b]"])
    assert config.train.steps == 5
    assert config.teachers["math"].model == "models/math"
    assert config.teachers["math"].weight == 3.0
    assert config.teachers["code"].domains == ("a", "b")


def test_the_recipe_wins_over_its_defaults_and_an_override_over_both(recipes: Path) -> None:
    (recipes / "low.yaml").write_text("train: {steps: 1, micro_batch_size: 1}\nrun: {seed: 1}")
    (recipes / "mid.yaml").write_text("train: {steps: 2, micro_batch_size: 2}")
    (recipes / "high.yaml").write_text("defaults: [low, mid]\ntrain: {steps: 3}")
    config = load_config("high", ["run.seed=4"])
    assert (config.train.steps, config.train.micro_batch_size, config.run.seed) == (3, 2, 4)


def test_interpolation_sees_the_defaults_of_the_schema() -> None:
    assert load_config("top").cache_dir == f"{RunConfig().run.dir}/cache"
    assert load_config("top", ["run.dir=elsewhere"]).cache_dir == "elsewhere/cache"


def test_a_path_is_a_recipe_and_its_defaults_are_beside_it(
    recipes: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "mine.yaml").write_text(f"defaults: [{recipes / 'base.yaml'}, beside]")
    (elsewhere / "beside.yml").write_text("run: {seed: 7}")
    assert "beside" in complaint(elsewhere / "mine.yaml")
    (elsewhere / "beside.yml").rename(elsewhere / "beside.yaml")
    config = load_config(elsewhere / "mine.yaml")
    assert config.run.seed == 7
    assert config == load_config(str(elsewhere / "mine.yaml"))
    assert set(config.teachers) == {"math", "code"}


def test_null_drops_an_inherited_teacher() -> None:
    assert set(load_config("top", ["teachers.code=null"]).teachers) == {"math"}


def test_fill_completes_but_an_override_wins() -> None:
    def fill(config: DictConfig) -> DictConfig:
        assert config.train.steps == 5
        assert config.data.path is None
        filled = {"data": {"path": "filled"}, "student": {"model": "filled"}}
        return DictConfig(OmegaConf.merge(config, filled))

    config = load_config("top", ["student.model=mine"], fill=fill)
    assert config.data.path == "filled"
    assert config.student.model == "mine"


def test_fill_is_held_to_the_schema() -> None:
    with pytest.raises(ConfigError, match=r"unknown key `data\.pth`"):
        load_config(
            "top", fill=lambda config: DictConfig(OmegaConf.merge(config, {"data": {"pth": 1}}))
        )


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        (
            "train.stpes=3",
            "unknown key `train.stpes` (override `train.stpes`): did you mean `train.steps`?",
        ),
        ("teachers.math.wieght=3", "did you mean `teachers.math.weight`?"),
        ("teachers.new.backend.typ=hf", "did you mean `teachers.new.backend.type`?"),
        ("lr=1", "`student.optimizer.lr`"),
        ("zzz=1", "known keys: run, launcher"),
        ("defaults=[base]", "unknown key `defaults`"),
        ("train.steps=x", "train.steps: expected a valid integer"),
        ("train.steps=x", "got 'x' (str)"),
        ("train.steps=0", "train.steps: expected greater than or equal to 1, got 0 (int)"),
        (
            "gold.divergence.beta=2",
            "gold.divergence.beta: expected less than or equal to 1, got 2 (int)",
        ),
        (
            "distillation.loss=ctdk",
            "'uld', 'kl' or 'opd', got 'ctdk' (str)",
        ),
        ("student.optimizer.lr=.inf", "student.optimizer.lr: expected a finite number"),
        ("run.dir=[a]", "run.dir: expected a valid string, got"),
        ("train=3", "train: expected a section of keys, got 3"),
        ("teachers.math=3", "teachers.math: expected a section of keys"),
        ("teachers.math.domains.a=3", "teachers.math.domains: expected a value, got keys {'a': 3}"),
        ("run.dir=${data}", "run.dir: expected a value, got keys {'path': None"),
        ("run.name=a/b", "a name has letters, digits, `.`, `_` and `-` only, and no slash"),
        ("teachers.math.domains=a", "got 'a' (str); write a list, as in [a, b]"),
        ("run.seed=[1]", "run.seed: expected a valid integer, got [1] (list)"),
        ("teachers=[a]", "teachers: expected a section of keys"),
        ("run.dir=${nope}", "run.dir: Interpolation key 'nope' not found"),
        ("run.dir=${run.dir}", "run.dir: Recursive interpolation"),
        ("run.dir=${oc.env:MOPD_TEST_UNSET}", "MOPD_TEST_UNSET"),
        ("run.dir=${", "run.dir: "),
        ("run.dir=???", "run.dir: is `???`; give it a value"),
        ("train.steps=[1", "override `train.steps=[1` is not valid YAML"),
        ("run.dir=!!python/object/apply:os.getcwd []", "is not valid YAML"),
        ("a", "override `a` is malformed: key=value expected"),
        ("train.steps=", "key=value expected"),
        ("=3", "key=value expected"),
        ("train..steps=3", "key=value expected"),
        ("train[0]=3", "key=value expected"),
        ("\x1b[31m=3", "key=value expected"),
        ("run.dir=\x1b", "is not valid YAML"),
    ],
)
def test_a_wrong_override_is_explained(word: str, wanted: str) -> None:
    assert wanted in complaint("top", word)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a: [", "bad.yaml is not valid YAML, line 2"),
        ("run: {seed: 1}\nrun: {seed: 2}", "duplicate key run"),
        ("- 1", "bad.yaml: expected keys at the top level, got a list"),
        ("3", "bad.yaml"),
        ("1: 2", "unknown key `1` (bad.yaml)"),
        ("train:\n  stpes: 3", "unknown key `train.stpes` (bad.yaml): did you mean `train.steps`?"),
        ("teachers: {m: {wieght: 3}}", "did you mean `teachers.m.weight`?"),
        ("run: {dir: '${'}", "run.dir: "),
        ("defaults: base", "defaults: expected a list of recipe names, got 'base' (bad.yaml)"),
        ("defaults: [3]", "defaults: expected a list of recipe names"),
        ("defaults: [nope]", "defaults: `nope` of bad.yaml does not exist; beside it: base, top"),
        ("defaults: [bad]", "defaults: cyclic (bad.yaml -> bad.yaml)"),
        ("ctkd: {gamma: -1}\ntrain: {steps: x}", "(and 1 more)"),
    ],
)
def test_a_wrong_file_is_explained(recipes: Path, text: str, wanted: str) -> None:
    (recipes / "bad.yaml").write_text(text)
    assert wanted in complaint("bad")


def test_a_longer_cycle_is_found(recipes: Path) -> None:
    (recipes / "a.yaml").write_text("defaults: [b]")
    (recipes / "b.yaml").write_text("defaults: [base, a]")
    assert "cyclic (a.yaml -> b.yaml -> a.yaml)" in complaint("a")


def test_a_file_that_is_not_text_is_explained(recipes: Path) -> None:
    (recipes / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    assert "bad.yaml is not UTF-8 text" in complaint("bad")


def test_a_missing_recipe_lists_what_exists(recipes: Path) -> None:
    (recipes / "gpu").mkdir()
    (recipes / "gpu" / "big.yaml").write_text("defaults: [../base]")
    assert "recipes: gpu/big, top" in complaint("mopd_cktd")
    assert "does not exist" in complaint("missing.yaml")
    assert load_config("gpu/big").teachers


def test_arguments_are_split() -> None:
    assert parse_arguments(["a.b=1", "recipe=top", "c=2"]) == ("top", ["a.b=1", "c=2"])


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        ([], "no recipe given: write recipe=<name>; recipes: top"),
        (["recipe=a", "recipe=b"], "more than one recipe"),
        (["recipe=top", "--train.steps=3"], "without dashes, as in train.steps=3"),
        (["top"], "key=value expected"),
    ],
)
def test_wrong_arguments_are_explained(argv: list[str], wanted: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_arguments(argv)
    assert wanted in str(caught.value)


def test_a_dump_is_a_recipe(recipes: Path) -> None:
    config = load_config("top", ["teachers.math.weight=0.1", "student.optimizer.lr=1e-7"])
    (recipes / "dumped.yaml").write_text(dump_config(config))
    assert load_config("dumped") == config


@settings(max_examples=50)
@given(
    # `???` alone is refused by design
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])).filter("???".__ne__)
)
@example("1e5")
@example("null")
@example("???x")
@example("${a}")
@example("\\${a}")
@example("\\\\${")
def test_any_string_survives_a_dump(text: str) -> None:
    config = RunConfig(run=RunSection(dir=text), cache_dir=f"{text}\\${{{text}")
    path = load.RECIPES / "string.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config("string") == config
