"""The pass that applies a recipe: roundings are nodes, each value is encoded once, misfits are refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from dsv4c.buckets import Bucket
from dsv4c.config import ModelConfig, load_config
from dsv4c.errors import GraphError
from dsv4c.ir.graph import Graph, Node
from dsv4c.ir.ops.norm import RmsNorm
from dsv4c.ir.ops.quant import Dequantize, Quantize
from dsv4c.ir.text import parse_graph, print_graph, print_nodes
from dsv4c.ir.verify import verify
from dsv4c.models.deepseek_v4 import build
from dsv4c.models.layout import layout
from dsv4c.passes.quantize import quantize
from dsv4c.passes.recipes import OFFICIAL, RECIPES, Recipe, format_of, recipe_named
from dsv4c.types import (
    BF16,
    F32,
    FP8_ROW,
    FP8_WEIGHT,
    KV_FP8,
    MXFP4,
    NVFP4,
    NVFP4_ROW,
    QuantFormat,
    QuantType,
    TensorType,
)
from tests.goldens import recorded
from tests.interpreted import deployment_of

GEMMS = ("linear", "grouped_linear", "expert_linear")


DECODE = Bucket("decode", 2)
BUCKETS = (DECODE, Bucket("prefill", tokens=8), Bucket("prefill", tokens=32), Bucket("draft", tokens=2))


def plain(config: ModelConfig, bucket: Bucket = DECODE, recipe: Recipe = OFFICIAL) -> Graph:
    deployment = deployment_of(bucket, slots=2, max_context=256)
    return build(config, deployment, bucket, recipe.activation)


@pytest.fixture(scope="module")
def tiny() -> ModelConfig:
    return load_config("tiny")


@pytest.fixture(scope="module")
def official(tiny: ModelConfig) -> Graph:
    return verify(quantize(plain(tiny), OFFICIAL))


def node(graph: Graph, name: str) -> Node:
    found = graph.by_name[name].node
    assert found is not None
    return found


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("bucket", BUCKETS, ids=lambda bucket: bucket.name)
def test_weights_inputs_and_caches_take_the_recipes_formats(
    tiny: ModelConfig, name: str, bucket: Bucket
) -> None:
    recipe = RECIPES[name]
    before = plain(tiny, bucket, recipe)
    graph = verify(quantize(before, recipe))
    seen: Counter[str] = Counter()
    for gemm in (n for n in graph.nodes if n.op.name in GEMMS):
        x, w = gemm.inputs[:2]
        for value, formats in ((w, recipe.weights), (x, recipe.activations)):
            wanted = format_of(formats, w.name)
            found = value.type.format if isinstance(value.type, QuantType) else None
            assert found == wanted, f"{gemm.name}: {value}"
            seen[str(wanted)] += 1
    for state in graph.states:
        wanted = format_of(recipe.state, state.name)
        assert (state.type.format if isinstance(state.type, QuantType) else None) == wanted
        assert state.type.shape == {s.name: s.type.shape for s in before.states}[state.name]
    assert {k: v.type for k, v in graph.outputs.items()} == {k: v.type for k, v in before.outputs.items()}
    assert parse_graph(print_graph(graph)) == graph
    assert len(seen) == {"fp32": 1, "bf16": 1, "fp8-experts": 3, "nvfp4": 3}.get(
        name, 4 if bucket.kind == "draft" else len(seen)
    )


def test_a_recipe_without_formats_changes_nothing(tiny: ModelConfig) -> None:
    for name in ("fp32", "bf16"):
        graph = plain(tiny, recipe=RECIPES[name])
        assert print_graph(quantize(graph, RECIPES[name])) == print_graph(graph)


def test_a_value_is_encoded_once_however_many_read_it(official: Graph) -> None:
    encoded = [(n.inputs, n.op) for n in official.nodes if isinstance(n.op, Quantize)]
    assert len(encoded) == len(set(encoded))
    layer = "layers.2"  # CSA: attention input for wq_a and wkv, expert input for routed and shared experts
    readers = {
        name: sorted(
            n.inputs[1].name.removeprefix(f"{layer}.") for n in official.users[official.by_name[name]]
        )
        for name in (f"{layer}.attn_in_quantized", f"{layer}.ffn_in_quantized", f"{layer}.attn.qr_quantized")
    }
    assert list(readers.values()) == [
        ["attn.wkv", "attn.wq_a"],
        ["ffn.experts.w1", "ffn.experts.w3", "ffn.shared_experts.w1", "ffn.shared_experts.w3"],
        ["attn.indexer.wq_b", "attn.wq_b"],
    ]


def test_what_is_cached_is_encoded_and_what_is_gathered_decoded(official: Graph) -> None:
    for cache, row, format_ in (
        ("attn.window", "attn.kv", KV_FP8),
        ("attn.entries", "attn.compressor.entry", KV_FP8),
        ("attn.indexer.keys", "attn.indexer.compressor.key", MXFP4),
    ):
        state = official.by_name[f"layers.2.{cache}"]
        (write,) = official.users[state]
        encode = write.inputs[1].node
        assert encode is not None
        assert encode.op == Quantize(format=format_)
        assert encode.inputs[0].name == f"layers.2.{row}"
    for name in ("window_keys", "entry_keys"):
        gather = node(official, f"layers.2.attn.{name}")
        (decode,) = official.users[gather.outputs[0]]
        assert decode.op == Dequantize(out=BF16)
    scores = node(official, "layers.2.attn.indexer.scores")
    assert [v.type.format for v in scores.inputs[:2] if isinstance(v.type, QuantType)] == [MXFP4, MXFP4]


def test_only_the_query_norm_works_in_bf16_steps(official: Graph) -> None:
    norms = [n for n in official.nodes if isinstance(n.op, RmsNorm)]
    stepped = [n.name for n in norms if n.op.precision is BF16]
    assert stepped == [f"layers.{layer}.attn.q_normed" for layer in range(6)]
    assert len(norms) > 4 * len(stepped)


def test_static_input_scales_follow_the_chosen_experts(tiny: ModelConfig) -> None:
    recipe = RECIPES["nvfp4-experts-w4a4"]
    graph = verify(quantize(plain(tiny), recipe))
    scales = [p for p in graph.params if p.name.endswith(".input_scale")]
    experts = tiny.n_routed_experts
    assert {p.name for p in scales} == {
        f"layers.{layer}.ffn.experts.{w}.input_scale" for layer in range(6) for w in ("w1", "w2")
    }
    assert {p.type for p in scales} == {TensorType(F32, (experts,))}
    for weight, rows in (("gate", "ffn_in"), ("up", "ffn_in"), ("down", "ffn.experts.h")):
        x = node(graph, f"layers.2.ffn.experts.{weight}").inputs[0]
        assert x.node is not None
        assert x.node.op == Quantize(format=NVFP4_ROW)
        assert x.node.inputs[0].name == f"layers.2.{rows}"
        assert x.type.shape[:2] == (2, tiny.num_experts_per_tok)
        chosen = x.node.inputs[1].node
        assert chosen is not None
        assert chosen.op.name == "take_along"
        assert chosen.inputs[0].name.endswith("w2.input_scale" if weight == "down" else "w1.input_scale")
    shared = node(graph, "layers.2.ffn.shared_experts.gate")
    assert [v.type.format for v in shared.inputs if isinstance(v.type, QuantType)] == [FP8_ROW, FP8_WEIGHT]


def test_nvfp4_computes_its_global_scale_at_run_time(tiny: ModelConfig) -> None:
    graph = verify(quantize(plain(tiny, recipe=RECIPES["nvfp4"]), RECIPES["nvfp4"]))
    assert not [p.name for p in graph.params if p.name.endswith("input_scale")]
    assert {p.name for p in graph.params} == {p.name for p in plain(tiny).params}
    quantized = {p.name for p in graph.params if isinstance(p.type, QuantType)}
    assert {p.type.format for p in graph.params if isinstance(p.type, QuantType)} == {NVFP4}
    linear = {p.name for p in layout(tiny) if p.storage in ("linear", "expert") and "mtp" not in p.name}
    assert linear <= quantized
    assert not quantized & {"embed", "head"}


def test_a_weight_that_no_gemm_reads_stays_plain(official: Graph) -> None:
    for name in ("embed", "layers.2.attn_norm", "layers.2.attn.attn_sink", "layers.2.attn.compressor.ape"):
        assert isinstance(official.by_name[name].type, TensorType)


@pytest.mark.parametrize(
    ("format_", "message"),
    [
        (replace(FP8_ROW, tail=300), r"at layers.0.attn_in_quantized: .*leaves nothing to quantize"),
        (FP8_WEIGHT, r"at layers.0.attn.qa: .*x must have row-wise scales"),
    ],
)
def test_an_input_format_that_does_not_fit_is_refused(
    tiny: ModelConfig, format_: QuantFormat, message: str
) -> None:
    with pytest.raises(GraphError, match=message):
        quantize(plain(tiny), replace(OFFICIAL, activations=(("*.wq_a", format_),)))


@pytest.mark.parametrize(
    ("change", "name"), [({"head_dim": 64}, "attn.window"), ({"moe_intermediate_size": 47}, "experts.w2")]
)
def test_a_width_that_the_format_does_not_fit_is_refused(change: dict[str, int], name: str) -> None:
    config = replace(load_config(recorded("fp32").folder), **change)
    with pytest.raises(GraphError, match=name):
        quantize(plain(config), OFFICIAL)


def test_a_cache_format_goes_with_the_rotated_width() -> None:
    config = replace(load_config(recorded("fp32").folder), qk_rope_head_dim=32)
    with pytest.raises(GraphError, match="keeps 64 elements of a row in BF16, but the model rotates 32"):
        quantize(plain(config), OFFICIAL)


def test_whole_text_of_one_official_layer(official: Graph, golden) -> None:
    parts = ("layers.2.attn.", "layers.2.ffn.")
    nodes = [
        n
        for n in official.nodes
        if f"{n.scope}.".startswith(parts) or n.name.startswith(("layers.2.attn_in", "layers.2.ffn_in"))
    ]
    golden("\n".join(print_nodes(nodes)), "model/csa_dense.official.txt")


def test_a_graph_takes_one_recipe() -> None:
    graph = plain(load_config("tiny"))
    once = quantize(graph, recipe_named("official"))
    with pytest.raises(
        GraphError, match=r"recipe nvfp4: %layers\.0\.\S+ is q\[e4m3.* a graph takes one recipe"
    ):
        quantize(once, recipe_named("nvfp4"))
