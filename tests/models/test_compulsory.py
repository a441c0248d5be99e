"""Bytes and operations of one decoded token, as costs of ops add them up, against the published inventory of
both releases.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from dsv4c.buckets import Bucket
from dsv4c.config import Deployment, load_config
from dsv4c.ir.graph import Graph, Kind
from dsv4c.ir.totals import compulsory, totals
from dsv4c.models.deepseek_v4 import build
from dsv4c.models.layout import part_of
from dsv4c.models.schedule import LayerKind, layer_plans
from dsv4c.passes.quantize import quantize
from dsv4c.passes.recipes import recipe_named

CONTEXT = 131_072


@cache
def decoded(name: str, experts: str = "mxfp4", context: int = CONTEXT) -> Graph:
    """One token of one sequence, in the formats of the release."""
    config = replace(load_config(f"deepseek-v4-{name}"), expert_format=experts)
    recipe = recipe_named("nvfp4-experts" if experts == "nvfp4" else "official")
    deployment = Deployment(recipe=recipe.name, max_context=context)
    return quantize(build(config, deployment, Bucket("decode"), recipe.activation), recipe)


def by_part(graph: Graph) -> dict[str, int]:
    parts: dict[str, int] = {}
    for value, count in compulsory(graph).items():
        part = "state" if value.kind is Kind.STATE else part_of(value.name)
        parts[part] = parts.get(part, 0) + count
    return parts


TOKENS = [  # name, experts, context, GFLOP, weights GB, state MB, total GB
    ("flash", "mxfp4", 8_192, 29.58, 11.212, 13.8, 11.226),
    ("flash", "mxfp4", 131_072, 42.80, 11.212, 68.9, 11.281),
    ("flash", "mxfp4", 1_048_576, 141.49, 11.212, 480.1, 11.692),
    ("flash", "nvfp4", 131_072, 42.80, 11.415, 68.9, 11.484),
    ("pro", "mxfp4", 8_192, 109.44, 39.658, 28.7, 39.687),
    ("pro", "mxfp4", 131_072, 132.53, 39.658, 108.8, 39.767),
    ("pro", "mxfp4", 1_048_576, 305.00, 39.658, 706.5, 40.365),
    ("pro", "nvfp4", 131_072, 132.53, 40.414, 108.8, 40.522),
]


@pytest.mark.parametrize(("name", "experts", "context", "gflop", "weights", "state", "total"), TOKENS)
def test_a_whole_token(
    name: str, experts: str, context: int, gflop: float, weights: float, state: float, total: float
) -> None:
    """Apart from the inventory's byte of padding in every key, and rotations and norms that it rounds."""
    graph = decoded(name, experts, context)
    found = by_part(graph)
    assert totals(graph).flops / 1e9 == pytest.approx(gflop, rel=2e-3)
    assert (sum(found.values()) - found["state"]) / 1e9 == pytest.approx(weights, abs=0.0005)
    assert found["state"] / 1e6 == pytest.approx(state, rel=2e-3, abs=0.051)
    assert sum(found.values()) / 1e9 == pytest.approx(total, abs=0.001)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("flash", (4599.5, 3652.2, 1082.2, 1059.3, 520.2, 275.3, 135.3, 90.2)),
        ("pro", (18294.8, 13600.2, 4029.9, 1853.8, 1336.1, 625.3, 335.8, 335.9)),
    ],
)
def test_where_the_weight_bytes_go(name: str, parts: tuple[float, ...]) -> None:
    names = (
        "attention projections",
        "routed experts",
        "shared experts",
        "embedding and head",
        "compressors",
        "indexers",
        "hyper-connections",
        "routers",
    )
    found = by_part(decoded(name, "nvfp4"))
    assert [found[part] / 1e6 for part in names] == pytest.approx(parts, abs=0.11)
    assert found.keys() - set(names) == {"norms", "state"}


HASHED = 6 * 4 - 256 * 4  # a hash router reads a row of its table instead of the bias
LAYERS = [  # name, a layer, its kind, weight bytes, state bytes
    ("flash", 0, "SWA", 217_608_536 + HASHED, 75_336),
    ("flash", 4, "CSA", 247_498_840, 2_623_211),
    ("flash", 3, "HCA", 225_999_200, 681_548),
    ("pro", 4, "CSA", 637_794_328, 2_922_219),
    ("pro", 3, "HCA", 602_269_728, 681_548),
]


@pytest.mark.parametrize(("name", "layer", "kind", "weights", "state"), LAYERS)
def test_bytes_of_a_layer(name: str, layer: int, kind: str, weights: int, state: int) -> None:
    """A compressor's norm is read once in `ratio` tokens, which costs do not divide by."""
    graph = decoded(name)
    assert layer_plans(load_config(f"deepseek-v4-{name}"))[layer].attention is LayerKind[kind]
    own = {v: n for v, n in compulsory(graph).items() if v.name.startswith(f"layers.{layer}.")}
    read = sum(n for v, n in own.items() if v.kind is Kind.PARAM)
    assert read == pytest.approx(weights, rel=6e-6 if kind != "SWA" else 0)
    assert sum(own.values()) - read == pytest.approx(state, rel=2e-3)


def test_more_rows_of_a_call_share_its_weights() -> None:
    config, recipe = load_config("deepseek-v4-flash"), recipe_named("official")
    bucket = Bucket("decode", sequences=8)
    deployment = Deployment(max_context=CONTEXT, slots=8, buckets=(bucket,))
    eight = by_part(quantize(build(config, deployment, bucket, recipe.activation), recipe))
    one = by_part(decoded("flash"))
    assert eight["attention projections"] == one["attention projections"]
    assert eight["routed experts"] == 8 * one["routed experts"]  # at most
    assert eight["state"] == pytest.approx(8 * one["state"], rel=1e-3)
