"""Recipes: where a model's values are quantized, as data. The first pattern that matches a name decides."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from dsv4c.errors import ConfigError, listed
from dsv4c.types import (
    BF16,
    F32,
    FP8_ROW,
    FP8_WEIGHT,
    KV_FP8,
    MXFP4,
    NVFP4,
    NVFP4_ROW,
    DType,
    QuantFormat,
)

Formats = tuple[tuple[str, QuantFormat | None], ...]
"""(name pattern, format) pairs; None leaves the value plain."""


def format_of(formats: Formats, name: str) -> QuantFormat | None:
    """The format that the first matching pattern gives to `name`, None when nothing matches."""
    return next((f for pattern, f in formats if fnmatchcase(name, pattern)), None)


@dataclass(frozen=True)
class Recipe:
    """How one set of numerics departs from the plain model.

    `weights` and `activations` are matched with a weight's name; the latter says how the GEMM's input is
    encoded. `state` is matched with a cache's name, `queries` with that of the indexer's key cache.
    """

    name: str
    activation: DType = BF16
    weights: Formats = ()
    activations: Formats = ()
    state: Formats = ()
    queries: Formats = ()
    head_norm: DType = F32  # rounding of the steps of the per-head query norm
    static_scales: tuple[str, ...] = ()  # weights whose activations use the checkpoint's input_scale
    requantize: tuple[str, ...] = ()  # weights that loading may round into the formats above
    summary: str = ""  # for people

    @property
    def copies_head(self) -> bool:
        """Have drafts a copy of the head, in a format of its own?"""
        return format_of(self.weights, "mtp.0.head") is not None

    def rounds(self, name: str) -> bool:
        """May loading round this weight?"""
        return any(fnmatchcase(name, pattern) for pattern in self.requantize)


FP8_LINEARS = (
    "*.attn.wq_a",
    "*.attn.wq_b",
    "*.attn.wkv",
    "*.attn.wo_b",
    "*.attn.indexer.wq_b",
    "*.shared_experts.*",
    "mtp.*.e_proj",
    "mtp.*.h_proj",
    "mtp.*.main_proj",
)

OFFICIAL = Recipe(
    name="official",
    weights=(
        *((pattern, FP8_WEIGHT) for pattern in FP8_LINEARS),
        ("*.attn.wo_a", FP8_WEIGHT),  # bf16 activations: the release dequantizes this one weight
        ("*.experts.*", MXFP4),
    ),
    activations=(*((pattern, FP8_ROW) for pattern in FP8_LINEARS), ("*.experts.*", FP8_ROW)),
    state=(("*.attn.window", KV_FP8), ("*.attn.entries", KV_FP8), ("*.indexer.keys", MXFP4)),
    queries=(("*.indexer.keys", MXFP4),),
    head_norm=BF16,
    summary="the release's own numerics: FP8 GEMMs, MXFP4 experts, FP8 KV cache, FP4 index keys",
)

NVFP4_EXPERTS = replace(
    OFFICIAL,
    name="nvfp4-experts",
    weights=(("layers.*.experts.*", NVFP4), *OFFICIAL.weights),
    summary="official, with routed experts in NVFP4 and FP8 activations (W4A8)",
)

NEVER: Formats = (("*hc_*", None), ("*head", None), ("*.markov_head.*", None), ("*.confidence_head.*", None))
PLAIN = "quantized checkpoints are dequantized at load"

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("fp32", activation=F32, summary=f"plain F32; {PLAIN}"),
        Recipe("bf16", summary=f"plain BF16; {PLAIN}"),
        OFFICIAL,
        replace(
            OFFICIAL,
            name="fp8-experts",
            weights=(("*.experts.*", FP8_WEIGHT), *OFFICIAL.weights),
            summary="what official is for a model whose routed experts are FP8 as its linear layers are",
        ),
        NVFP4_EXPERTS,
        replace(
            NVFP4_EXPERTS,
            name="nvfp4-experts-w4a4",
            activations=(("layers.*.experts.*", NVFP4_ROW), *OFFICIAL.activations),
            static_scales=("layers.*.experts.*",),
            summary="the same with NVFP4 activations under the checkpoint's static input scales",
        ),
        replace(
            OFFICIAL,
            name="nvfp4",
            weights=(*NEVER, ("*", NVFP4)),
            activations=(*NEVER, ("*", NVFP4_ROW)),
            requantize=("*",),
            summary="every linear layer in NVFP4 with NVFP4 activations, global scale per token at run time",
        ),
    )
}


FP8_DRAFTS = "-fp8-drafts"
"""Behind the name of a recipe: drafts have a copy of the head in FP8, rounded at load."""


def recipe_named(name: str) -> Recipe:
    """One of the recipes, or one with `FP8_DRAFTS`. Raises ConfigError listing the recipes there are."""
    base = name.removesuffix(FP8_DRAFTS)
    if base not in RECIPES:
        raise ConfigError(f"recipe: unknown recipe {name!r}; known: {listed(RECIPES, name)}")
    recipe, copy = RECIPES[base], "mtp.*.head"
    if name == base:
        return recipe
    return replace(
        recipe,
        name=name,
        weights=((copy, FP8_WEIGHT), *recipe.weights),
        activations=((copy, FP8_ROW), *recipe.activations),
        requantize=(copy, *recipe.requantize),
        summary=f"{recipe.summary}; drafts with a copy of the head in FP8",
    )


def recipe_for(name: str, expert_format: str) -> Recipe:
    """The recipe of that name for a model whose checkpoint has routed experts in `expert_format`: its own
    numerics, `official`, depend on that. Raises ConfigError listing the recipes there are.
    """
    base = name.removesuffix(FP8_DRAFTS)
    if (base, expert_format) == ("official", "fp8"):
        name = name.replace(base, "fp8-experts")
    return recipe_named(name)
