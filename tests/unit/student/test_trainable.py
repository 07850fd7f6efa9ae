"""Patterns of what does not learn, against the weights of a whole model."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from mopd.config.model_shape import MoeShape
from mopd.errors import ConfigError
from mopd.student.hf_io import build_slots
from mopd.student.trainable import frozen_parameters
from tests.helpers.shapes import QWEN3

SHAPE = replace(QWEN3, architecture="Qwen2ForCausalLM", num_layers=12, qkv_bias=True, qk_norm=False)
SLOTS = build_slots(SHAPE, pp_size=2)
EMBEDDING = {(0, "0.embedding.word_embeddings.weight"), (1, "0.output_layer.weight")}


def frozen(patterns: list[str]) -> set[tuple[int, str]]:
    return {(slot.stage, slot.parameter) for slot in frozen_parameters(patterns, SLOTS)}


def test_a_tied_embedding_is_frozen_as_one() -> None:
    assert frozen([r"model\.embed_tokens\.weight"]) == EMBEDDING


def test_patterns_match_whole_names() -> None:
    """`layers.1` is neither layer 1 with all in it, nor layers 10 and 11."""
    layer = {(0, slot.parameter) for slot in SLOTS if ".layers.1." in slot.tensors[0]}
    assert frozen([r"model\.layers\.1\..*"]) == layer
    with pytest.raises(ConfigError, match="matches no weight"):
        frozen_parameters([r"model\.layers\.1"], SLOTS)
    norm = {(1, "0.decoder.final_layernorm.weight")}
    assert frozen([r"model\.norm\.weight|input_layernorm"]) == norm


def test_several_patterns_may_cover_one_parameter() -> None:
    patterns = [r".*layers\.0\.self_attn\.[qk]_proj\.weight", r".*layers\.0\..*v_proj\.weight"]
    expected = {(0, "0.decoder.layers.0.self_attention.linear_qkv.weight")}
    assert frozen(patterns) == expected
    assert frozen([]) == set()


def test_an_expert_is_frozen_where_it_is() -> None:
    """Experts of different ranks have one name in Megatron."""
    moe = MoeShape(
        num_experts=4,
        num_experts_per_tok=2,
        ffn_hidden_size=32,
        norm_topk_prob=True,
        router_aux_loss_coef=0.0,
        layers=(0,),
    )
    slots = build_slots(replace(SHAPE, moe=moe), pp_size=1, ep_size=2)
    found = frozen_parameters([r".*\.experts\.2\..*"], slots)
    assert {slot.ep_rank for slot in found} == {1} and len(found) == 2
    with pytest.raises(ConfigError, match="matches every weight"):
        frozen_parameters([".*"], slots)


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        (
            [r".*q_proj\.weight"],
            "`.*q_proj\\.weight` matches model.layers.0.self_attn.q_proj.weight",
        ),
        ([r".*q_proj\.bias"], "in one parameter with model.layers.0.self_attn.k_proj.bias"),
        ([r".*norm\.weight", r".*up_proj.*"], "`.*up_proj.*` matches model.layers.0.mlp.up_proj"),
        ([r"lm_head\.weight"], "`lm_head\\.weight` matches no weight"),  # it is the embedding
        ([r".*embed.*", "nothing"], "`nothing` matches no weight"),
        ([".*"], "matches every weight"),
    ],
)
def test_what_cannot_be_frozen_is_refused(patterns: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as error:
        frozen_parameters(patterns, SLOTS)
    assert str(error.value).startswith("student.freeze: ") and "\n" not in str(error.value)
