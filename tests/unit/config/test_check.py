"""Mistakes across sections are found before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from mopd.config.check import check_config
from mopd.config.schema import RunConfig
from mopd.errors import ConfigError

SHAPE = {
    "architectures": ["Qwen3ForCausalLM"],
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    """A recipe without a mistake for one rank."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(SHAPE))
    (model / "tokenizer.json").write_text("{}")
    (tmp_path / "bare").mkdir()
    (tmp_path / "untokenized").mkdir()
    (tmp_path / "untokenized" / "config.json").write_text(json.dumps(SHAPE))
    (tmp_path / "data.jsonl").write_text("")
    return {
        "student": {"model": str(model)},
        "teachers": {"math": {"model": str(model)}, "code": {"model": str(model)}},
        "data": {
            "path": str(tmp_path / "data.jsonl"),
            "heldout_path": str(tmp_path / "data.jsonl"),
        },
    }


def check(recipe: dict[str, Any], *changes: str, world_size: int = 1) -> None:
    merged = OmegaConf.merge(recipe, OmegaConf.from_dotlist(list(changes)))
    values = OmegaConf.to_container(merged)
    check_config(RunConfig.model_validate(values), world_size=world_size)


def test_a_right_recipe_passes(recipe: dict[str, Any]) -> None:
    check(recipe)
    check(recipe, "student.parallel.tensor_model_parallel_size=2", world_size=4)
    check(recipe, "gold.matched_weight=0.7", "gold.unmatched_weight=0.3")
    check(recipe, "distillation={loss: kl, top_k: null}", "kl.support=student")
    check(recipe, "ctkd={learned: {enabled: true}, gamma: 0.1}")
    check(recipe, "opd.policy=old", "rollout.temperature=0.7")  # nobody uses opd
    check(recipe, "rollout.temperature=0.7", "teachers.code.backend.type=uniform")
    check(recipe, "teachers.code.backend={type: custom, target: 'package.module:Name'}")


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        (
            ["student.model=null"],
            "student.model: is not set; set it to a Hugging Face directory, or use launch/train.py",
        ),
        (["teachers.math.model=null"], "teachers.math.model: is not set"),
        (
            ["teachers.math={model: null, backend: {type: uniform}}"],
            "teachers.math.model: is not set",
        ),
        (["data.path=null"], "data.path: is not set; set it, or use launch/train.py"),
        (["data.path=nope"], "data.path: nope is not a file"),
        (["data.heldout_path=nope"], "data.heldout_path: nope is not a file"),
        (["student.model=nope"], "student.model: nope is not a directory"),
        (["student.tokenizer=nope"], "student.tokenizer: nope has no tokenizer"),
        (["teachers.math.tokenizer=nope"], "teachers.math.tokenizer: nope has no tokenizer"),
        (
            ["teachers.math.projection_matrix_path=nope"],
            "projection_matrix_path: nope is not a file",
        ),
        (["teachers.math.weight=0", "teachers.code.weight=0"], "teachers.<name>.weight: all are 0"),
        (["distillation.default_teacher=art"], "`art` is not a teacher; choose one of math, code"),
        (["teachers.math.backend.type=custom"], "teachers.math.backend.target: is not set"),
        (
            ["rollout.backend={type: custom, target: nope}"],
            "expected package.module:Name, got `nope`",
        ),
        (["rollout.backend.target='a:b'"], "rollout.backend.target: is only read by type=custom"),
        (["rollout.backend.type=replay"], "rollout.backend.path: is not set"),
        (["rollout.backend.path=nope"], "rollout.backend.path: is only read by type=replay"),
        (
            ["rollout.backend={type: replay, path: nope}"],
            "rollout.backend.path: nope does not exist",
        ),
        (["gold.matched_weight=1"], "gold.unmatched_weight: is not set"),
        (["gold.unmatched_weight=1"], "gold.matched_weight: is not set"),
        (["gold={matched_weight: 0, unmatched_weight: 0}"], "both are 0"),
        (["gold.divergence.top_k_mode=genkl"], "for kind=forward_kl and reverse_kl, not jsd"),
        (["distillation.shared_columns=8"], "set distillation.top_k=null"),
        (["distillation.loss=kl", "kl.support=union"], "kl.support=union: needs the teacher's"),
        (
            ["distillation.top_k=null", "teachers.code.backend.type=uniform"],
            "teachers.code with backend.type=uniform sends lists",
        ),
        (
            [
                "distillation={loss: kl, top_k: null}",
                "kl.divergence.kind=akl",
                "student.parallel.tensor_model_parallel_size=2",
            ],
            "kl.divergence.kind=akl",
        ),
        (["distillation.distillation_weight=0"], "both are 0"),
        (["distillation.balance=dynamic"], "raise distillation.crossentropy_weight"),
        (["ctkd.direction=pull"], "ctkd.direction=pull: judges the student's own tokens"),
        (["ctkd.merge=decayed"], "ctkd.merge=decayed: judges the student's own tokens"),
        (
            ["ctkd={direction: pull, path_terms: false, merge: nemo}"],
            "set ctkd.merge=boundary",
        ),
        (
            ["ctkd={direction: pull, path_terms: false, unreachable: rest}"],
            "loses no teacher token",
        ),
        (["ctkd.learned.enabled=true"], "set ctkd.gamma=0.1"),
        (
            ["ctkd={learned: {enabled: true}, gamma: 0.1, loss_type: hkl}"],
            "is for loss_type=pkl",
        ),
        (
            ["distillation.loss=opd", "opd.policy=old", "rollout.temperature=0.7"],
            "those of temperature 0.7",
        ),
        (["distillation.loss=opd", "opd={lower: 3, upper: 2}"], "opd.lower: 3 is above"),
        (["distillation.loss=opd", "opd.lower=3"], "opd.upper: is not set"),
        (
            ["distillation.loss=opd", "opd={importance: none, lower: 1, upper: 2}"],
            "is not read with importance=none",
        ),
        (
            ["distillation={loss: kl, top_k: null, shared_columns: 9}", "kl.support=union"],
            "set distillation.shared_columns=null",
        ),
        (
            [
                "distillation={top_k: null, shared_columns: 9}",
                "ctkd={direction: pull, path_terms: false}",
            ],
            "a pull lists the student's tokens",
        ),
        (["ctkd={loss_type: hkl, unreachable: rest}"], "folds nothing"),
        (["ctkd={learned: {enabled: true}, gamma: 0.1, map: exact}"], "leaves nothing to learn"),
        (
            [
                "distillation={balance: dynamic, crossentropy_weight: 1}",
                "ctkd.divergence.top_k_mode=trunc",
            ],
            "may be negative",
        ),
        (
            ["distillation={loss: opd, balance: dynamic, crossentropy_weight: 1}"],
            "a policy gradient's value has none",
        ),
        (
            ["student.optimizer.lr_warmup_fraction=0.7"],
            "lr_warmup_fraction + lr_decay_fraction = 1.1 is more than the whole run",
        ),
        (
            ["student.parallel.tensor_model_parallel_size=2"],
            "does not divide the world size 1; start a multiple of 2 ranks",
        ),
        (["student.moe_aux_loss_coeff=0.1"], "is a Qwen3ForCausalLM; remove it"),
        (
            ["student.recompute={granularity: full, num_layers: 3}"],
            "student.recompute.num_layers=3: method=uniform cuts the 4 layers of a stage",
        ),
        (
            ["student.recompute={granularity: selective, method: block}"],
            "student.recompute.method: is only read with student.recompute.granularity=full",
        ),
    ],
)
def test_a_mistake_is_named_with_its_remedy(
    recipe: dict[str, Any], changes: list[str], wanted: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check(recipe, *changes)
    assert wanted in str(caught.value)
    assert str(caught.value).isprintable()


def test_experts_get_no_adapters(recipe: dict[str, Any], tmp_path: Path) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    names = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
    more = experts | names | {"norm_topk_prob": True, "router_aux_loss_coef": 0.001}
    more |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
    (tmp_path / "model" / "config.json").write_text(json.dumps(SHAPE | more))
    attention = "student.lora.target_modules=[q_proj,k_proj,v_proj,o_proj]"
    check(recipe, "student.lora.rank=4", attention)
    with pytest.raises(ConfigError, match="down_proj, gate_proj, up_proj are experts"):
        check(recipe, "student.lora.rank=4")


def test_no_teachers(recipe: dict[str, Any]) -> None:
    recipe["teachers"] = {}
    with pytest.raises(ConfigError, match="teachers: is empty"):
        check(recipe)


def test_a_teacher_name_that_is_not_a_name(recipe: dict[str, Any]) -> None:
    recipe["teachers"]["../up"] = recipe["teachers"]["math"]
    with pytest.raises(ConfigError, match="rename it"):
        check(recipe)


def test_incomplete_model_directories(recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"student\.model: .* has no config\.json"):
        check(recipe, f"student.model={tmp_path / 'bare'}")
    with pytest.raises(ConfigError, match=r"has no tokenizer .* set student\.tokenizer"):
        check(recipe, f"student.model={tmp_path / 'untokenized'}")
    check(
        recipe,
        f"student.model={tmp_path / 'untokenized'}",
        f"student.tokenizer={tmp_path / 'model'}",
    )


def test_a_layout_that_the_model_does_not_allow(recipe: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"student\.parallel: .*query groups"):
        check(recipe, "student.parallel.tensor_model_parallel_size=4", world_size=4)


def test_recomputed_blocks_that_do_not_fill_a_stage(recipe: dict[str, Any]) -> None:
    full = "student.recompute.granularity=full"
    with pytest.raises(ConfigError, match=r"student\.recompute\.num_layers=99: .*the 4 layers"):
        check(recipe, full, "student.recompute.num_layers=99")
    check(recipe, full, "student.recompute.num_layers=4")
    stages = "student.parallel.pipeline_model_parallel_size=2"
    with pytest.raises(ConfigError, match=r"the 2 layers"):
        check(recipe, full, "student.recompute.num_layers=4", stages, world_size=2)
    check(recipe, full, "student.recompute.num_layers=99", "student.recompute.method=block")


def test_a_batch_that_cannot_be_shared_evenly(recipe: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"data-parallel size 3; 66 would fit"):
        check(recipe, world_size=3)
    with pytest.raises(ConfigError, match="66 would fit"):  # whole prompts go to a replica
        check(recipe, "rollout.num_generations_per_prompt=3", world_size=3)
    check(recipe, "train.num_prompts_per_step=66", world_size=3)
