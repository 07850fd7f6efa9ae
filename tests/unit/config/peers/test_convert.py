"""Every key of every table arrives, and none vanishes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mopd.config.load import load_config
from mopd.config.peers import PEERS
from mopd.config.peers.convert import Conversion, convert, guess, nested
from mopd.config.peers.read import read_keys
from mopd.config.peers.rows import Peer, Row, fits
from mopd.config.peers.write import recipe_text
from mopd.config.schema import RunConfig
from mopd.errors import ConfigError
from tests.helpers.peer_cases import NEMO_RL_CASES, TWINKLE_CASES
from tests.helpers.peers import EXAMPLE, MS_SWIFT_CASES, TRAINER_CASES, TRL_CASES, Case

CASES: dict[str, list[Case]] = {
    "trl": [*TRL_CASES, *TRAINER_CASES],
    "nemo-rl": NEMO_RL_CASES,
    "ms-swift": [*MS_SWIFT_CASES, *TRAINER_CASES],
    "twinkle": TWINKLE_CASES,
}
FLAT = [(name, *case) for name, cases in CASES.items() for case in cases]


@pytest.mark.parametrize(("name", "keys", "target", "value"), FLAT)
def test_a_key_arrives(name: str, keys: dict[str, Any], target: str, value: Any) -> None:
    made = convert(PEERS[name], keys)
    assert target in made.writes, [entry.note for entry in made.entries]
    assert made.writes[target].value == value
    assert not any(entry.kind == "unknown" for entry in made.entries)
    RunConfig.model_validate(made.recipe())


def covered(row: Row, case: Case) -> bool:
    keys, target, _ = case
    place = re.escape(row.target or "").replace(r"\{teacher\}", r"[\w-]+")
    aims = row.target == "*" or re.fullmatch(place, target) is not None
    return aims and any(fits(row.key, key) for key in keys)


@pytest.mark.parametrize("name", PEERS)
def test_every_row_has_a_case(name: str) -> None:
    rows = [row for row in PEERS[name].rows if row.target is not None]
    bare = [row for row in rows if not any(covered(row, case) for case in CASES[name])]
    assert [(row.key, row.place) for row in bare] == []


@pytest.mark.parametrize("name", PEERS)
def test_every_target_is_a_key_of_a_recipe(name: str) -> None:
    rows = [*PEERS[name].rows, *PEERS[name].ways]
    targets = {
        row.target.replace("{teacher}", "t") for row in rows if row.target not in (None, "*")
    }
    for target in targets:
        section: Any = RunConfig
        parts = target.replace("teachers.t.", "").split(".")
        if target.startswith("teachers."):
            section = RunConfig.model_fields["teachers"].annotation.__args__[1]  # type: ignore[union-attr]
        for part in parts:
            assert part in section.model_fields, target
            section = section.model_fields[part].annotation


@pytest.mark.parametrize("name", PEERS)
def test_the_example_is_recognised_and_carried_over_whole(name: str) -> None:
    keys = read_keys(EXAMPLE[name])
    assert guess(keys) is PEERS[name]
    made = convert(PEERS[name], keys)
    assert [entry.key for entry in made.entries if entry.important] == []
    assert made.problem is None


def known_keys(peer: Peer) -> list[str]:
    keys = {row.key for row in peer.rows}
    return sorted(re.sub(r"\*\*", "other", key).replace(".*.", ".0.") for key in keys)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 9),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from(["1e-5", "true", "jsd", "gkd", "grpo", "hkl", "pkl", "lora", "a/b", "$X", "["]),
    st.text(max_size=5),
    st.lists(st.one_of(st.integers(-1, 3), st.text(max_size=3)), max_size=3),
)


@pytest.mark.parametrize("name", PEERS)
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_no_key_crashes_or_vanishes(name: str, data: st.DataObject) -> None:
    """Each key is in exactly one group, and what is written is a recipe of those values."""
    peer = PEERS[name]
    names = st.one_of(st.sampled_from(known_keys(peer)), st.text(min_size=1, max_size=4))
    keys = data.draw(st.dictionaries(names, VALUES, max_size=12))
    made = convert(peer, keys)
    assert [entry.key for entry in made.entries] == list(keys)
    for entry in made.entries:
        assert (entry.kind in ("carried", "changed")) == bool(entry.targets)
        assert entry.targets or entry.note
        assert all(made.writes[target].value == v for target, v in entry.targets.items())
    RunConfig.model_validate(made.recipe())


@pytest.mark.parametrize("name", PEERS)
@settings(max_examples=6, phases=[Phase.generate])
@given(data=st.data())
def test_what_is_written_loads_as_what_was_converted(
    name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    names = st.sampled_from(known_keys(PEERS[name]))
    made = convert(PEERS[name], data.draw(st.dictionaries(names, VALUES, max_size=12)))
    path = tmp_path_factory.mktemp("recipe") / "r.yaml"
    path.write_text(recipe_text(made, origin="x\n# y"), encoding="utf-8")
    assert load_config(path) == RunConfig.model_validate(made.recipe())


@pytest.mark.parametrize("text", ["\U000d3f52c_", "a\x85b\x7f", '"', "\\ud83d", "${x}", " a\n"])
def test_any_text_comes_back_as_it_was(text: str, tmp_path: Path) -> None:
    made = convert(PEERS["ms-swift"], {"teacher_model": text})
    (tmp_path / "r.yaml").write_text(recipe_text(made, origin="x"), encoding="utf-8")
    assert load_config(tmp_path / "r.yaml") == RunConfig.model_validate(made.recipe())


def entry(made: Conversion, key: str) -> Any:
    return next(entry for entry in made.entries if entry.key == key)


def test_an_unset_key_has_their_default_and_not_ours() -> None:
    made = convert(PEERS["trl"], {"use_uld_loss": True})
    assert made.writes["rollout.temperature"].value == 0.9
    assert made.writes["student.optimizer.lr"].value == 1e-7
    assert made.writes["rollout.lmbda"].value == 0.5
    assert "default" in made.writes["rollout.temperature"].origin


def test_what_matters_and_is_lost_is_marked() -> None:
    made = convert(PEERS["trl"], {"top_p": 0.5, "fp16": True, "what_is_this": 1})
    assert all(one.important for one in made.entries)
    assert entry(made, "what_is_this").kind == "unknown"
    assert not made.is_whole
    neutral = convert(PEERS["trl"], {"top_p": 1.0, "fp16": False, "hub_token": "x"})
    assert neutral.is_whole


def test_a_variable_is_neither_filled_nor_written() -> None:
    """What OmegaConf would look up in the environment never reaches the recipe."""
    made = convert(PEERS["trl"], {"model_name_or_path": "${oc.env:HOME}", "dataset_name": "$D"})
    assert "student.model" not in made.writes
    assert all(one.important for one in made.entries)
    assert "HOME" not in recipe_text(made, origin="f")


def test_two_names_of_one_setting_with_two_values_are_told() -> None:
    made = convert(PEERS["ms-swift"], {"learning_rate": 1e-3, "lr": 2e-3})
    assert made.writes["student.optimizer.lr"].value == 1e-3
    assert entry(made, "lr").important


def test_processes_of_the_launch_multiply_a_batch() -> None:
    swift = {"NPROC_PER_NODE": "4", "NNODES": "2", "gradient_accumulation_steps": 3}
    assert convert(PEERS["ms-swift"], swift).writes["train.num_prompts_per_step"].value == 24
    trl = convert(PEERS["trl"], {"per_device_train_batch_size": 2}, processes=4)
    assert trl.writes["train.num_prompts_per_step"].value == 8


def test_a_recipe_that_the_checks_refuse_says_so() -> None:
    made = convert(PEERS["ms-swift"], {"lmbda": 0.5, "rlhf_type": "grpo", "teacher_model": "t"})
    assert made.problem is None, "OPD-RL has no lmbda"
    made = convert(
        PEERS["ms-swift"],
        {
            "sequence_parallel": True,
            "recompute_method": "block",
            "gradient_checkpointing": False,
            "teacher_model": "t",
        },
    )
    assert made.problem is not None and "recompute" in made.problem
    assert not made.is_whole


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"learning_rate": 1}, "no key tells"),
        (
            {"rlhf_type": "gkd", "use_uld_loss": True},
            "use_uld_loss of trl and rlhf_type of ms-swift",
        ),
    ],
)
def test_whose_file_it_is_is_not_guessed_wildly(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        guess(keys)


def test_sections_come_from_dotted_keys() -> None:
    assert nested({"a.b": 1, "a.c.d": 2, "e": 3}) == {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
