"""Where the fusions fire, what is left beside them, and that nothing gets lost on the way there and back."""

from __future__ import annotations

from collections import Counter

import pytest

from dsv4c.arch import SM_90A
from dsv4c.buckets import Bucket
from dsv4c.codegen.select import Kernels
from dsv4c.config import load_config
from dsv4c.ir.graph import Graph, Kind
from dsv4c.ir.op import OPS
from dsv4c.ir.text import parse_graph, print_graph
from dsv4c.ir.totals import compulsory
from dsv4c.ir.verify import verify
from dsv4c.models.schedule import layer_plans
from dsv4c.passes.expand import expand
from dsv4c.passes.fold import fold
from dsv4c.passes.fusions import FUSIONS
from dsv4c.passes.recipes import RECIPES
from dsv4c.passes.schedule import schedule
from tests.conftest import Golden
from tests.passes.fusions.cases import BUCKETS, CASES, DECODE, DRAFT, RULES, folded, unfolded, wiring

LARGE = ("deepseek-v4-flash", "deepseek-v4-pro")
NAMES = {
    "attention",
    "compressor",
    "experts_down",
    "head",
    "hyper_norm",
    "in_proj",
    "index_topk",
    "indexer",
    "inverse_rope",
    "kv_norm_rope_store",
    "q_norm_quantize",
    "q_norm_rope",
    "rmsnorm_quantize",
    "router",
    "sinkhorn",
    "swiglu",
}
LEFT = {
    "positions",
    "owners",
    "advance",
    "last_rows",
    "argmax",
    "reshape",
    "rope_frequencies",
    "grouped_linear",
    "linear",
}
LEFT_OF = {  # the routed input under its expert's scale; the draft's two inputs meeting, and its attention
    ("nvfp4-experts-w4a4", bucket): {"take_along", "quantize"} for bucket in BUCKETS
}
ATTENTION = {"window_index", "attention_scores", "sink_softmax", "attention_values"}
DRAFTED = ATTENTION | {"draft_rows", "gather", "concat"}  # keys of the cache and rows of the draft together
LEFT_OF |= {(recipe, DRAFT): {"embedding", "add", "dequantize"} | DRAFTED for recipe in RECIPES}


def ops(graph: Graph) -> Counter[str]:
    return Counter(node.op.name for node in graph.nodes)


def test_every_named_fusion_is_a_rule() -> None:
    names = [op.name for op in FUSIONS]
    assert set(names) >= NAMES
    assert len(set(names)) == len(names)
    assert all(OPS[name] is op for name, op in zip(names, FUSIONS, strict=True))


@pytest.mark.parametrize(("recipe", "bucket"), CASES)
def test_little_is_left_beside_fused_ops(recipe: str, bucket: Bucket) -> None:
    graph, _ = folded("tiny", recipe, bucket)
    fused = {op.name for op in FUSIONS}
    found = {name for name in ops(graph) if name not in fused}
    assert found - LEFT - LEFT_OF.get((recipe, bucket), set()) == set()


@pytest.mark.parametrize("recipe", ["official", "nvfp4-experts", "nvfp4-experts-w4a4", "nvfp4"])
def test_single_linears_left_are_the_ones_named(recipe: str) -> None:
    graph, _ = folded("tiny", recipe, DECODE)
    assert [n.inputs[1].name for n in graph.nodes if n.op.name == "linear"] == ["head"]


@pytest.mark.parametrize("recipe", ["fp32", "bf16"])
def test_without_quantization_the_output_projection_stays_a_linear(recipe: str) -> None:
    graph, _ = folded("tiny", recipe, DECODE)
    left = [n.inputs[1].name for n in graph.nodes if n.op.name == "linear"]
    assert left == [*(f"layers.{i}.attn.wo_b" for i in range(6)), "head"]


@pytest.mark.parametrize(("recipe", "bucket"), CASES)
def test_expanding_gives_the_unfused_graph_back(recipe: str, bucket: Bucket) -> None:
    graph, _ = folded("tiny", recipe, bucket)
    back = verify(expand(graph))
    assert back == unfolded("tiny", recipe, bucket)
    assert wiring(back) == wiring(unfolded("tiny", recipe, bucket))  # names too
    again, _ = fold(back, RULES)
    assert again == graph
    assert wiring(again) == wiring(graph)


@pytest.mark.parametrize(("recipe", "bucket"), CASES)
def test_folding_twice_changes_nothing(recipe: str, bucket: Bucket) -> None:
    graph, _ = folded("tiny", recipe, bucket)
    again, report = fold(graph, RULES)
    assert again == graph
    assert set(report.counts.values()) == {0}


@pytest.mark.parametrize(("recipe", "bucket"), CASES)
def test_the_folded_graph_can_be_written_and_read(recipe: str, bucket: Bucket) -> None:
    text = print_graph(folded("tiny", recipe, bucket)[0])
    assert print_graph(verify(parse_graph(text))) == text


def test_the_folded_graph_of_tiny(golden: Golden) -> None:
    """One layer of each kind: SWA behind a hash router, CSA, HCA."""
    golden(print_graph(folded("tiny", "official", DECODE)[0]), "passes/folded_tiny.txt")


def test_in_proj_takes_all_plain_products_of_a_row_and_nothing_else() -> None:
    graph, _ = folded("tiny", "official", DECODE)
    groups = [[v.name.split(".", 2)[2] for v in n.inputs[1:]] for n in graph.nodes if n.op.name == "in_proj"]
    assert sorted({tuple(g) for g in groups}) == [
        ("attn.compressor.wkv", "attn.compressor.wgate"),
        (
            "attn.compressor.wkv",
            "attn.compressor.wgate",
            "attn.indexer.weights_proj",
            "attn.indexer.compressor.wkv",
            "attn.indexer.compressor.wgate",
        ),
        ("attn.wq_a", "attn.wkv"),
    ]
    assert all(v.kind is Kind.PARAM for n in graph.nodes if n.op.name == "in_proj" for v in n.inputs[1:])


# --- the large models ---


def launches(graph: Graph, model: str) -> dict[str, list[int]]:
    """A GPU's launches of every layer by kind, and those outside; constants are none."""
    plan = schedule(graph, Kernels(SM_90A).groups)
    counts = Counter(nodes[0].place.layer for nodes in plan.launches if nodes[0].inputs)
    kinds: dict[str, list[int]] = {}
    for layer in layer_plans(load_config(model)):
        kinds.setdefault(str(layer.attention).lower(), []).append(counts[layer.prefix])
    return kinds | {"outside": [counts[""]]}


def test_rule_counts(golden: Golden) -> None:
    counts = [folded(model, "official", bucket)[1].counts for bucket in (DECODE, DRAFT) for model in LARGE]
    lines = [f"{'rule':<20}" + "".join(f"{h:>12}" for h in ("Flash", "Pro", "Flash draft", "Pro draft"))]
    lines += [f"{rule:<20}" + "".join(f"{each[rule]:>12}" for each in counts) for rule in counts[0]]
    lines.append("")
    for model in LARGE:
        for kind, each in launches(folded(model, "official", DECODE)[0], model).items():
            numbers = ", ".join(f"{n} x {count}" for count, n in sorted(Counter(each).items()))
            lines.append(f"{model} {kind}: {numbers} launches")
    golden("\n".join(lines), "passes/rule_counts.txt")


def test_norms_into_projections_are_the_ones_named() -> None:
    """Besides the query, the draft's two inputs: enorm into e_proj, hnorm into h_proj."""
    for bucket, extra in ((DECODE, []), (DRAFT, ["e_proj", "h_proj"])):
        graph, _ = folded("tiny", "official", bucket)
        weights = [n.inputs[2].name.split(".", 2)[2] for n in graph.nodes if n.op.name == "q_norm_quantize"]
        assert sorted(set(weights)) == ["attn.wq_b", *extra]


@pytest.mark.parametrize("model", ["tiny", *LARGE])
def test_launches_per_layer(model: str) -> None:
    found = launches(folded(model, "official", DECODE)[0], model)
    most = {"csa": 10, "hca": 9, "swa": 9, "outside": 6}
    assert {kind: max(each) for kind, each in found.items() if max(each) > most[kind]} == {}


@pytest.mark.parametrize("model", LARGE)
def test_sinkhorn_is_one_op_of_each_boundary(model: str) -> None:
    config = load_config(model)
    graph, report = folded(model, "official", DECODE)
    assert report.counts["sinkhorn"] == 2 * config.num_layers == {LARGE[0]: 86, LARGE[1]: 122}[model]
    assert {n.op.iterations for n in graph.nodes if n.op.name == "hyper_norm"} == {config.hc_sinkhorn_iters}


@pytest.mark.parametrize("model", LARGE)
def test_expanding_and_folding_a_large_model_are_each_others_undo(model: str) -> None:
    graph, _ = folded(model, "official", DECODE)
    back = expand(graph)
    assert back == unfolded(model, "official", DECODE)
    assert fold(back, RULES)[0] == graph


@pytest.mark.parametrize("model", LARGE)
@pytest.mark.parametrize("recipe", ["official"])
def test_planned_bytes_are_close_to_compulsory(model: str, recipe: str) -> None:
    context = 131072
    graph, _ = folded(model, recipe, DECODE, context)
    planned = sum(node.cost.bytes for node in graph.nodes)
    before = sum(node.cost.bytes for node in unfolded(model, recipe, DECODE, context).nodes)
    least = sum(compulsory(graph).values())
    print(
        f"{model}: planned {planned / 1e6:.1f} MB, {planned / least:.4f} of compulsory; "
        f"unfused {before / least:.4f}"
    )
    assert 1 <= planned / least <= 1.02
    assert planned < before
