"""Recipes as data: which weights, GEMM inputs and caches each one quantizes, in which format."""

from __future__ import annotations

import pytest

from dsv4c.config import load_config
from dsv4c.errors import ConfigError
from dsv4c.models.layout import head_of_drafts, layout
from dsv4c.passes.recipes import OFFICIAL, RECIPES, format_of, recipe_for, recipe_named
from dsv4c.types import BF16, F32, FP8_ROW, FP8_WEIGHT, KV_FP8, MXFP4, NVFP4, NVFP4_ROW, QuantFormat

LAYER = "layers.3"
FP8 = {
    *(f"attn.{n}" for n in ("wq_a", "wq_b", "wkv", "wo_b", "indexer.wq_b")),
    *(f"ffn.shared_experts.{n}" for n in ("w1", "w2", "w3")),
}
EXPERTS = {f"ffn.experts.{n}" for n in ("w1", "w2", "w3")}
PLAIN = {
    *(f"attn.{n}" for n in ("q_norm", "compressor.wkv", "compressor.wgate", "indexer.weights_proj")),
    *(f"attn.indexer.compressor.{n}" for n in ("wkv", "wgate")),
    *("ffn.gate", "hc_attn_fn", "hc_ffn_fn"),
}


def of_layer(name: str, kind: str, values: set[str], prefix: str = LAYER) -> set[QuantFormat | None]:
    return {format_of(getattr(RECIPES[name], kind), f"{prefix}.{value}") for value in values}


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_plain_recipes_quantize_nothing(name: str) -> None:
    recipe = RECIPES[name]
    assert recipe.activation is (F32 if name == "fp32" else BF16)
    assert (*recipe.weights, *recipe.activations, *recipe.state, *recipe.queries) == ()
    assert not recipe.requantize


@pytest.mark.parametrize("name", ["official", "nvfp4-experts", "nvfp4-experts-w4a4"])
def test_official_weights_and_activations(name: str) -> None:
    assert of_layer(name, "weights", FP8) == {FP8_WEIGHT}
    assert of_layer(name, "activations", FP8) == {FP8_ROW}
    assert of_layer(name, "weights", PLAIN) == of_layer(name, "activations", PLAIN) == {None}
    assert of_layer(name, "weights", {"attn.wo_a"}) == {FP8_WEIGHT}
    assert of_layer(name, "activations", {"attn.wo_a"}) == {None}  # its input stays bf16
    assert format_of(RECIPES[name].weights, "mtp.0.e_proj") == FP8_WEIGHT
    assert format_of(RECIPES[name].weights, "head") is format_of(RECIPES[name].weights, "embed") is None
    assert not RECIPES[name].requantize


def test_routed_experts_of_each_recipe() -> None:
    found = {
        name: (of_layer(name, "weights", EXPERTS), of_layer(name, "activations", EXPERTS))
        for name in ("official", "fp8-experts", "nvfp4-experts", "nvfp4-experts-w4a4")
    }
    assert found == {
        "official": ({MXFP4}, {FP8_ROW}),
        "fp8-experts": ({FP8_WEIGHT}, {FP8_ROW}),
        "nvfp4-experts": ({NVFP4}, {FP8_ROW}),
        "nvfp4-experts-w4a4": ({NVFP4}, {NVFP4_ROW}),
    }
    for name in found:  # the MTP block's experts stay as the release has them
        assert of_layer(name, "weights", EXPERTS, "mtp.0") == {FP8_WEIGHT if name == "fp8-experts" else MXFP4}
        assert of_layer(name, "activations", EXPERTS, "mtp.0") == {FP8_ROW}


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4", "fp8"])
def test_official_numerics_are_those_of_the_models_own_experts(format: str) -> None:
    assert recipe_for("official", format).name == ("fp8-experts" if format == "fp8" else "official")
    assert recipe_for("bf16", format).name == "bf16"


@pytest.mark.parametrize("name", ["official", "nvfp4-experts", "nvfp4-experts-w4a4", "nvfp4"])
def test_caches(name: str) -> None:
    assert of_layer(name, "state", {"attn.window", "attn.entries"}) == {KV_FP8}
    assert of_layer(name, "state", {"attn.indexer.keys"}) == {MXFP4}
    assert of_layer(name, "queries", {"attn.indexer.keys"}) == {MXFP4}
    assert of_layer(name, "state", {"attn.compressor.kv", "attn.indexer.compressor.score"}) == {None}
    assert RECIPES[name].head_norm is BF16


def test_a_copy_of_the_head_for_drafts_is_all_that_loading_rounds() -> None:
    recipe = recipe_for("official-fp8-drafts", "mxfp4")
    name = head_of_drafts(load_config("tiny"))
    assert format_of(recipe.weights, name) == FP8_WEIGHT
    assert format_of(recipe.activations, name) == FP8_ROW
    assert [p.name for p in layout(load_config("tiny")) if recipe.rounds(p.name)] == []
    assert recipe.rounds(name)
    assert recipe.copies_head
    assert not any(each.copies_head for each in RECIPES.values())
    assert recipe_for("official-fp8-drafts", "fp8").name == "fp8-experts-fp8-drafts"
    assert recipe_named("nvfp4-fp8-drafts").rounds("layers.0.attn.wq_a")
    with pytest.raises(ConfigError, match=r"unknown recipe 'fp7-fp8-drafts'"):
        recipe_named("fp7-fp8-drafts")


def test_nvfp4_quantizes_every_linear_layer_but_the_head() -> None:
    recipe = RECIPES["nvfp4"]
    assert recipe.requantize
    for name in (f"{LAYER}.{n}" for n in (*FP8, *EXPERTS, "attn.wo_a", "ffn.gate")):
        assert format_of(recipe.weights, name) == NVFP4
        assert format_of(recipe.activations, name) == NVFP4_ROW
    for param in layout(load_config("tiny")):
        if param.name == "head" or "hc_" in param.name:
            assert format_of(recipe.weights, param.name) is format_of(recipe.activations, param.name) is None


def test_the_first_pattern_that_matches_decides() -> None:
    formats = (("a.*", None), ("*.b", FP8_ROW), ("*", MXFP4))
    assert [format_of(formats, n) for n in ("a.b", "c.b", "c.d")] == [None, FP8_ROW, MXFP4]
    assert format_of((("x", MXFP4),), "y") is None


def test_names() -> None:
    assert {name: recipe.name for name, recipe in RECIPES.items()} == {name: name for name in RECIPES}
    assert recipe_named("official") is OFFICIAL
    message = r"recipe: unknown recipe 'fp16'; known: fp32, bf16, official, fp8-experts, .*, nvfp4"
    with pytest.raises(ConfigError, match=message):
        recipe_named("fp16")
