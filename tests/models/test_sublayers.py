"""Every sublayer on recorded inputs: with the same rounding points nearly all values are equal bit by bit,
and a missing step is plainly visible. The end of the file makes such mistakes and sees them.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4c.buckets import Bucket
from dsv4c.config import load_config
from dsv4c.ir.graph import Builder, Graph, Node, Value, rewrite
from dsv4c.ir.op import Op
from dsv4c.ir.ops.attention import WindowIndex
from dsv4c.ir.ops.math import Clamp
from dsv4c.ir.ops.quant import Hadamard
from dsv4c.ir.ops.rope import Rope
from dsv4c.numerics import codec
from dsv4c.numerics.codec import Quantized
from dsv4c.passes.recipes import OFFICIAL, RECIPES, Recipe
from dsv4c.reference.interpret import interpret
from tests.goldens import Recorded, recorded
from tests.interpreted import (
    STATES,
    evaluate,
    fresh_states,
    graph_of,
    layer_value,
    padded,
    part_of,
    recorded_slots,
    streams_after,
    weights_of,
)

ATTENTION = (
    "qr",
    "q",
    "kv",
    "entries",
    "index_q",
    "index_keys",
    "index_w",
    "index_scores",
    "index_sel",
    "o",
    "z",
    "attn_out",
)
EXPERTS = ("router_idx", "router_w", "ffn_out")
HYPER = tuple(f"hc_{part}_{x}" for part in ("attn", "ffn") for x in ("pre", "post", "comb"))
FLIP = 1e-3  # bound of what the cases state none for: a few values in the next bf16
COEFFICIENTS = 5e-6  # f32 of equal inputs

QUANTIZED = [(c, layer) for c in ("official-quant", "nvfp4-experts") for layer in range(3)]
RECIPE = {"official-quant": OFFICIAL, "nvfp4-experts": RECIPES["nvfp4-experts"], "fp32": RECIPES["fp32"]}


def weights(case: Recorded, recipe: Recipe) -> Mapping[str, codec.Value]:
    return weights_of(case.folder, recipe)


def bound(case: Recorded, name: str) -> float:
    if name in HYPER:
        return COEFFICIENTS
    stated = case.tolerance.get("sublayer_with_recorded_input_rel_l2", {})
    return stated[name]["same_rounding_points"] if name in stated else FLIP


def prefill_graph(case: Recorded, recipe: Recipe, rows: int) -> Graph:
    return graph_of(load_config(case.folder), recipe, Bucket("prefill", tokens=rows))


def of_layer(case: Recorded, prefix: str, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if f"{prefix}.{name}" in case.tensors]


def layer_results(
    case: Recorded,
    graph: Graph,
    layer: int,
    given: Mapping[str, Tensor],
    names: list[str],
    params: Mapping[str, codec.Value],
    states: Mapping[str, codec.Value] | None = None,
) -> dict[str, Tensor]:
    """Our values by their recorded names, from values `given` by name and fresh (or given) state."""
    places = {name: layer_value(graph, layer, name) for name in names}
    part = part_of(graph, [n for n in given if n not in ("tokens", "lengths")], list(places.values()))
    inputs = {value.name: given[value.name] for value in part.inputs}
    values = evaluate(part, inputs, params, states)
    return {name: values[place] for name, place in places.items()}


def attention(
    case: Recorded,
    layer: int,
    graph: Graph,
    params: Mapping[str, codec.Value],
) -> dict[str, float]:
    """Deviation of every recorded value of an attention sublayer."""
    run, prefix = case.run(), f"prefill.{layer}"
    names = of_layer(case, prefix, ATTENTION)
    given = padded(run.ids[: run.prefill], run.prefill)
    given[f"layers.{layer}.attn_in"] = case.tensors[f"{prefix}.attn_in"]
    values = layer_results(case, graph, layer, given, names, params)
    return {name: case.deviation(prefix, name, values) for name in names}


def experts(
    case: Recorded, layer: int, graph: Graph, params: Mapping[str, codec.Value], out: str = "ffn_out"
) -> dict[str, float]:
    """Deviation of every recorded value of an expert sublayer; `out` names the recorded output."""
    run, prefix = case.run(), f"prefill.{layer}"
    x = case.tensors[f"{prefix}.ffn_in"]
    rows = list(range(run.prefill)) if len(x) == run.prefill else case.probe_rows
    given = padded([run.ids[row] for row in rows], len(rows)) | {f"layers.{layer}.ffn_in": x}
    values = layer_results(case, graph, layer, given, list(EXPERTS), params)
    found = {out: case.distance(f"{prefix}.{out}", values["ffn_out"])}
    return found | {name: case.deviation(prefix, name, values) for name in EXPERTS[:2]}


def rows_of_input(case: Recorded, layer: int) -> int:
    return len(case.tensors[f"prefill.{layer}.ffn_in"])


def exceeding(case: Recorded, found: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in found.items() if not value <= bound(case, name)}


def covers_what_is_packed(case: Recorded, prefix: str, names: tuple[str, ...], found: object) -> bool:
    packed = {name for name in names if f"{prefix}.{name}" in case.packed_names}
    return bool(packed) and packed <= set(found)  # type: ignore[call-overload]


@pytest.mark.parametrize(("name", "layer"), QUANTIZED)
def test_attention(name: str, layer: int) -> None:
    case, recipe = recorded(name), RECIPE[name]
    graph = prefill_graph(case, recipe, case.run().prefill)
    found = attention(case, layer, graph, weights(case, recipe))
    assert exceeding(case, found) == {}
    assert covers_what_is_packed(case, f"prefill.{layer}", ATTENTION, found)


@pytest.mark.parametrize(("name", "layer"), QUANTIZED)
def test_experts(name: str, layer: int) -> None:
    case, recipe = recorded(name), RECIPE[name]
    graph = prefill_graph(case, recipe, rows_of_input(case, layer))
    found = experts(case, layer, graph, weights(case, recipe))
    assert exceeding(case, found) == {}
    assert covers_what_is_packed(case, f"prefill.{layer}", EXPERTS, found)


@pytest.mark.parametrize("layer", range(3))
def test_experts_with_nvfp4_activations(layer: int) -> None:
    case, recipe = recorded("nvfp4-experts"), RECIPES["nvfp4-experts-w4a4"]
    graph = prefill_graph(case, recipe, rows_of_input(case, layer))
    found = experts(case, layer, graph, weights(case, recipe), "ffn_out_w4a4_same_input")
    stated = case.tolerance["ffn_out_w4a4_same_input_rel_l2"]["same_rounding_points"]
    assert found.pop("ffn_out_w4a4_same_input") <= stated
    assert exceeding(case, found) == {}


@pytest.mark.parametrize("layer", range(3))
@pytest.mark.parametrize("activations", ["w4a8", "w4a4"])
def test_one_expert(activations: str, layer: int) -> None:
    """One routed expert by itself: the codes of its input are equal bit by bit, and so are its GEMMs but for
    single values, where the recording multiplied the scales in another order.
    """
    case = recorded("nvfp4-experts")
    recipe = RECIPES["nvfp4-experts" if activations == "w4a8" else "nvfp4-experts-w4a4"]
    of_expert = {n.rpartition(".")[2]: v for n, v in case.tensors.items() if n.startswith(f"expert.{layer}.")}
    results = {
        n.removeprefix(f"expert.{layer}.{activations}."): v
        for n, v in case.tensors.items()
        if n.startswith(f"expert.{layer}.{activations}.")
    }
    x, count = of_expert["x"], len(of_expert["x"])
    graph, ffn = prefill_graph(case, recipe, count), f"layers.{layer}.ffn"
    given = {
        f"layers.{layer}.ffn_in": x,
        f"{ffn}.router.experts": of_expert["id"].repeat(count, 2),
        f"{ffn}.router.weights": of_expert["route_w"][:, None].repeat(1, 2),
    }
    names = {"w1": "gate", "w3": "up", "h": "h", "w2": "down"}
    (encoded,) = (
        v.name for node in graph.nodes for v in node.inputs[:1] if node.name == f"{ffn}.experts.gate"
    )
    part = part_of(graph, given, [*(f"{ffn}.experts.{n}" for n in names.values()), encoded])
    values = interpret(part, {v.name: given[v.name] for v in part.inputs}, {}, weights(case, recipe))
    for theirs, ours in names.items():
        value = values[f"{ffn}.experts.{ours}"]
        assert isinstance(value, Tensor)
        difference = value[:, 0].double() - results[theirs].double()
        assert difference.norm() <= 1e-6 * results[theirs].double().norm(), theirs
        assert (difference != 0).sum() <= 1, theirs
    codes = values[encoded]
    assert isinstance(codes, Quantized)
    data, scale = codes.data, codec.decode_scale(codes.scale)
    if activations == "w4a4":
        data, scale = data[:, 0], scale[:, 0]
    assert torch.equal(data.view(torch.uint8), results["x_q"].view(torch.uint8))
    assert torch.equal(scale, results["x_scale"].float())


@pytest.mark.parametrize(
    ("name", "layer"), [(c, layer) for c, n in (("fp32", 4), ("official-quant", 3)) for layer in range(n)]
)
def test_hyper_connections(name: str, layer: int) -> None:
    """From the streams before a layer and the outputs of its sublayers to the streams after it."""
    case, recipe, prefix = recorded(name), RECIPE[name], f"prefill.{layer}"
    probes = case.probe_rows
    graph = prefill_graph(case, recipe, len(probes))
    given = padded([case.run().ids[row] for row in probes], len(probes))
    for value in ("attn_out", "ffn_out"):
        recorded_rows = case.tensors[f"{prefix}.{value}"]
        rows = recorded_rows if len(recorded_rows) == len(probes) else recorded_rows[probes]
        given[layer_value(graph, layer, value)] = rows
    if layer:
        given[streams_after(graph, layer - 1)] = case.tensors[f"prefill.{layer - 1}.x_ffn"]
    names = of_layer(case, prefix, (*HYPER, "attn_in", "x_attn", "ffn_in", "x_ffn"))
    values = layer_results(case, graph, layer, given, names, weights(case, recipe))
    found = {n: case.deviation(prefix, n, values) for n in names}
    limits = {n: COEFFICIENTS if name == "fp32" or n in HYPER else FLIP for n in names}
    assert {n: d for n, d in found.items() if not d <= limits[n]} == {}
    assert len(found) >= len(HYPER) + 3


@pytest.mark.parametrize("name", ["fp32", "official-quant"])
def test_output(name: str) -> None:
    """From the last streams to the logits."""
    case, recipe = recorded(name), RECIPE[name]
    last = max(int(n[8]) for n in case.tensors if fnmatch.fnmatchcase(n, "prefill.?.x_ffn"))
    graph = prefill_graph(case, recipe, len(case.probe_rows))
    x = case.tensors[f"prefill.{last}.x_ffn"]
    wanted = ["output.hc_head", "output.final_norm", "output.logits"]
    values = evaluate(
        part_of(graph, [streams_after(graph, last)], wanted),
        {streams_after(graph, last): x},
        weights(case, recipe),
    )
    limit = COEFFICIENTS if name == "fp32" else FLIP
    for value in ("hc_head", "final_norm"):
        assert case.distance(f"prefill.{value}", values[f"output.{value}"]) <= limit
    logits = case.tensors["main.logits"][case.probe_rows]
    assert (values["output.logits"] - logits).norm() <= limit * logits.norm()


@pytest.mark.parametrize("layer", range(3))
def test_one_decode_step_from_the_recorded_state(layer: int) -> None:
    """Both sublayers of the official recipe at `decode_probe_position`, from what the caches held.

    The bounds were stated for many rows together; a single one may be twice as far off.
    """
    case, prefix = recorded("official-quant"), f"decode.{layer}"
    if f"{prefix}.attn_in" not in case.tensors:
        assert f"{prefix}.attn_in" not in case.packed_names
        pytest.skip("this layer's state is in the complete recordings only")
    position = case.description["decode_probe_position"]
    graph = prefill_graph(case, OFFICIAL, 1)
    states = fresh_states(graph)
    states["position"].fill_(position)
    for full in (n for n in case.tensors if n.startswith(f"{prefix}.state.")):
        name = full.rpartition(".")[2]
        state, theirs = states[f"layers.{layer}.{STATES[name]}"], case.tensors[full]
        slots = recorded_slots(name, len(theirs), position)
        rows, ours = [row for row, _ in slots], [token % state.shape[1] for _, token in slots]
        store(state, ours, theirs[rows])
    given = padded([case.run().ids[position]], 1)
    given[f"layers.{layer}.attn_in"] = case.tensors[f"{prefix}.attn_in"]
    names = of_layer(case, prefix, ATTENTION)
    values = layer_results(case, graph, layer, given, names, weights(case, OFFICIAL), states)
    found = {name: case.deviation(prefix, name, values) for name in names}
    states["position"].fill_(position)
    given = padded([case.run().ids[position]], 1)
    given[f"layers.{layer}.ffn_in"] = case.tensors[f"{prefix}.ffn_in"]
    values = layer_results(case, graph, layer, given, list(EXPERTS), weights(case, OFFICIAL), states)
    found |= {name: case.deviation(prefix, name, values) for name in EXPERTS}
    assert {name: value for name, value in found.items() if not value <= 2 * bound(case, name)} == {}
    assert len(found) >= 9


def store(state: codec.Value, slots: list[int], rows: Tensor) -> None:
    """Write recorded rows, decoded values of what the cache holds, which encoding them again gives back."""
    if not isinstance(state, Quantized):
        state[0, slots] = rows
        return
    encoded = codec.quantize(rows, state.format)
    assert torch.equal(codec.dequantize(encoded), rows.float())
    for cache, part in zip(state.parts, encoded.parts, strict=True):
        cache[0, slots] = part


# --- deliberate mistakes ------------------------------------------------------------------------------------

Visit = Callable[[Builder, Node, dict[Value, Value]], bool]


def replaced(kind: type[Op], change: Callable[[Any], Op]) -> Visit:
    """Gives every op of that kind other attributes."""

    def visit(builder: Builder, node: Node, values: dict[Value, Value]) -> bool:
        if not isinstance(node.op, kind):
            return False
        inputs = tuple(values[v] for v in node.inputs)
        (result,) = builder.emit(change(node.op), inputs, names=[node.name], scope=node.scope)
        values[node.outputs[0]] = result
        return True

    return visit


def dropped(op: Op | type[Op], scope: str = "") -> Visit:
    """Leaves out every op equal to `op` (or of that kind), below a scope that ends so."""

    def visit(builder: Builder, node: Node, values: dict[Value, Value]) -> bool:
        same = isinstance(node.op, op) if isinstance(op, type) else node.op == op
        if not same or not node.scope.endswith(scope):
            return False
        values[node.outputs[0]] = values[node.inputs[0]]
        return True

    return visit


RECIPE_MISTAKES = {
    "activations not quantized": (replace(OFFICIAL, activations=()), "qr"),
    "cached keys not rounded": (replace(OFFICIAL, state=OFFICIAL.state[1:]), "kv"),
    "entries not rounded": (replace(OFFICIAL, state=(OFFICIAL.state[0], OFFICIAL.state[2])), "entries"),
    "index queries not rounded": (replace(OFFICIAL, queries=()), "index_q"),
    "index keys not rounded": (replace(OFFICIAL, state=OFFICIAL.state[:2], queries=()), "index_keys"),
}
GRAPH_MISTAKES: dict[str, tuple[Visit, str]] = {
    "window off by one": (replaced(WindowIndex, lambda op: WindowIndex(window=op.window - 1)), "z"),
    "output not rotated back": (dropped(Rope(inverse=True)), "z"),
    "no rotation of index queries": (dropped(Rope(), "indexer"), "index_q"),
    "no Hadamard transform": (dropped(Hadamard), "index_keys"),
    "entries rotated like tokens": (replaced(Rope, lambda op: replace(op, stride=1)), "entries"),
}
WEIGHT_MISTAKES = {
    "no sink": ("attn.attn_sink", -1e30, "z"),
    "no position bias": ("attn.compressor.ape", 0.0, "entries"),
}
CSA = 1  # the layer that has everything


@pytest.fixture(scope="module")
def official() -> Recorded:
    return recorded("official-quant")


@pytest.mark.parametrize("mistake", RECIPE_MISTAKES)
def test_a_recipe_that_leaves_out_a_rounding_is_seen(official: Recorded, mistake: str) -> None:
    recipe, value = RECIPE_MISTAKES[mistake]
    graph = prefill_graph(official, recipe, official.run().prefill)
    found = attention(official, CSA, graph, weights(official, OFFICIAL))
    assert found[value] > 10 * bound(official, value)


@pytest.mark.parametrize("mistake", GRAPH_MISTAKES)
def test_a_wrong_graph_is_seen(official: Recorded, mistake: str) -> None:
    visit, value = GRAPH_MISTAKES[mistake]
    graph = rewrite(prefill_graph(official, OFFICIAL, official.run().prefill), visit)
    found = attention(official, CSA, graph, weights(official, OFFICIAL))
    assert found[value] > 2 * bound(official, value)


@pytest.mark.parametrize("mistake", WEIGHT_MISTAKES)
def test_a_weight_that_has_no_effect_is_seen(official: Recorded, mistake: str) -> None:
    name, constant, value = WEIGHT_MISTAKES[mistake]
    params = dict(weights(official, OFFICIAL))
    params[f"layers.{CSA}.{name}"] = torch.full_like(params[f"layers.{CSA}.{name}"], constant)
    graph = prefill_graph(official, OFFICIAL, official.run().prefill)
    assert attention(official, CSA, graph, params)[value] > 2 * bound(official, value)


@pytest.mark.parametrize("mistake", ["activations not quantized", "unclamped shared expert", "no gate bias"])
def test_a_wrong_expert_layer_is_seen(official: Recorded, mistake: str) -> None:
    recipe = replace(OFFICIAL, activations=()) if mistake.startswith("activations") else OFFICIAL
    graph = prefill_graph(official, recipe, rows_of_input(official, CSA))
    params = dict(weights(official, OFFICIAL))
    if mistake == "unclamped shared expert":
        graph = rewrite(graph, dropped(Clamp, "shared_experts"))
    if mistake == "no gate bias":
        bias = f"layers.{CSA}.ffn.gate.bias"
        params[bias] = torch.zeros_like(params[bias])
    found = experts(official, CSA, graph, params)
    assert found["ffn_out"] > 10 * bound(official, "ffn_out")
