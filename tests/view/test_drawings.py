"""DOT, SVG and Model Explorer JSON."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from xml.etree import ElementTree

import pytest

from dsv4c.errors import GraphError
from dsv4c.ir.graph import Builder, Graph
from dsv4c.ir.ops import add, reshape, rms_norm, silu
from dsv4c.types import BF16, TensorType
from dsv4c.view.dot import dot
from dsv4c.view.model_explorer import model_explorer
from dsv4c.view.svg import svg
from tests.view.graphs import folded, official, plain

NEEDS_DOT = pytest.mark.skipif(
    shutil.which("dot") is None, reason="draws with Graphviz's `dot`, not on PATH: apt-get install graphviz"
)


def small() -> Graph:
    with Builder("small") as b:
        x = b.input("x", TensorType(BF16, (2, 4)))
        y = rms_norm(x, b.param("gain", TensorType(BF16, (4,))), eps=1e-6, name="y")
        with b.scope("inner"):
            z = add(silu(y, name="s"), y, name="z")
    return b.finish({"z": z})


def boxes(text: str) -> dict[str, str]:
    """Ids of drawn nodes by the first line of their label."""
    return {label: id_ for id_, label in re.findall(r'^ *(n\d+) \[.*label="([^"\\]*)', text, re.MULTILINE)}


def edges(text: str) -> set[tuple[str, str]]:
    return set(re.findall(r"^ *(n\d+) -> (n\d+);", text, re.MULTILINE))


def test_every_operand_is_an_edge() -> None:
    text = dot(small(), bodies=True)
    at = boxes(text)
    named = {label.split()[-1]: id_ for label, id_ in at.items()}
    wanted = {("x", "y"), ("y", "s"), ("y", "z"), ("s", "z")}
    assert edges(text) == {(named[a], named[b]) for a, b in wanted}
    assert 'label="inner"' in text
    assert "gain" in text


def test_layers_fold_and_are_chosen_whole() -> None:
    graph = official("deepseek-v4-flash")
    folded_text, one = dot(graph, bodies=True), dot(graph, layer=6, bodies=True)
    assert 'label="layers.4 x20"' in folded_text
    assert "layers.6" not in folded_text
    nodes = [n for n in graph.nodes if n.place.layer == "layers.6"]
    assert len(re.findall(r"fillcolor=\"#|fillcolor=\"white\"", one)) == len(nodes)
    with pytest.raises(GraphError, match=r"no layer 'layers\.99'"):
        dot(graph, layer=99)


def test_a_folded_layer_is_read_through_the_one_drawn() -> None:
    """The head reads the last layer, which stands folded into an earlier one: no edge is lost."""
    graph = official("deepseek-v4-flash")
    text = dot(graph, bodies=True)
    at = boxes(text)
    last = next(n for n in graph.nodes if n.name == "output.v")
    assert last.inputs[0].name == "layers.42.x_ffn"
    sources = {a for a, b in edges(text) if b == at["reshape  v"]}
    (label,) = re.findall(rf'^ *{sources.pop()} \[.*label="([^"\\]*)', text, re.MULTILINE)
    assert label == "cast  x_ffn"


def test_a_fused_body_is_a_cluster() -> None:
    graph = folded("tiny")
    opened, closed = dot(graph, layer=2, bodies=True), dot(graph, layer=2)
    assert 'label="viewed_norm_quantize  attn_in_quantized"' in opened
    assert 'label="viewed_norm_quantize' not in closed
    assert "<B>viewed_norm_quantize</B>" in closed
    assert opened.count('label="rms_norm  rms_norm') == 1
    inner = boxes(opened)
    assert (inner["rms_norm  rms_norm"], inner["quantize  quantize"]) in edges(opened)


def test_each_occurrence_of_a_body_has_its_own_edges() -> None:
    """Equal bodies are traced once; drawings must not share their nodes."""
    text = dot(folded("tiny"), fold=False, bodies=True)
    bodies = re.findall(r'^ *(n\d+) \[.*label="quantize  quantize', text, re.MULTILINE)
    fused = [n for n in folded("tiny").nodes if n.op.name == "viewed_norm_quantize"]
    assert len(bodies) == len(fused) == 6
    into = Counter(b for _, b in edges(text))
    assert [into[b] for b in bodies] == [1] * 6


def launch_boxes(text: str) -> dict[str, str]:
    """Ids of launches by the text of their box, its lines apart by bars."""
    found = re.findall(r"^ *(n\d+) \[shape=plain, .*?label=<(.*?)>, tooltip", text, re.MULTILINE)
    return {"|".join(re.findall(r">([^<>]+)<", table)): id_ for id_, table in found}


def test_a_box_is_a_launch_with_its_bytes() -> None:
    """Views are none: who reads one reads what it is a view of. Weights are named, not drawn."""
    with Builder("small") as b:
        x = b.input("x", TensorType(BF16, (2, 4)))
        y = rms_norm(x, b.param("gain", TensorType(BF16, (4,))), eps=1e-6, name="y")
        z = silu(reshape(y, shape=(8,), name="view"), name="z")
    text = dot(b.finish({"z": z}))
    at = launch_boxes(text)
    assert set(at) == {"rms_norm|40 B|y|gain", "silu|32 B|z"}
    assert (at["rms_norm|40 B|y|gain"], at["silu|32 B|z"]) in edges(text)
    assert len(edges(text)) == 2
    one = dot(b.finish({"z": z}), launches={"y": "both", "view": "both", "z": "both"})
    assert set(launch_boxes(one)) == {"rms_norm + reshape + silu|72 B|y|gain"}
    assert len(edges(one)) == 1


def test_what_every_layer_reads_is_named_in_its_boxes() -> None:
    text = dot(official("tiny"), layer=2)
    assert any("positions" in box for box in launch_boxes(text))
    assert 'label="positions' not in text


@NEEDS_DOT
def test_svg() -> None:
    root = ElementTree.fromstring(svg(folded("tiny"), layer=2))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    texts = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"viewed_norm_quantize", "attn_in_quantized", "attn_norm"} <= set(texts)
    assert int(root.get("width", "").removesuffix("pt")) < 1500


def test_svg_without_graphviz(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(GraphError, match="install the package graphviz"):
        svg(small())


# --- Model Explorer ---


def test_model_explorer_names_every_operand() -> None:
    (graph,) = model_explorer(small())["graphs"]
    assert graph["id"] == "small"
    nodes = {n["id"]: n for n in graph["nodes"]}
    assert nodes["inner.z"]["label"] == "add"
    assert nodes["inner.z"]["namespace"] == "inner"
    assert nodes["inner.z"]["incomingEdges"] == [
        {"sourceNodeId": "inner.s", "sourceNodeOutputId": "0", "targetNodeInputId": "0"},
        {"sourceNodeId": "y", "sourceNodeOutputId": "0", "targetNodeInputId": "1"},
    ]
    assert {"key": "eps", "value": "1e-06"} in nodes["y"]["attrs"]
    assert nodes["y"]["outputsMetadata"][0]["attrs"][0] == {"key": "tensor_shape", "value": "bf16[2,4]"}
    assert nodes["gain"]["label"] == "param"
    assert nodes["return/z"]["incomingEdges"][0]["sourceNodeId"] == "inner.z"


@pytest.mark.parametrize(("name", "fold"), [("tiny", False), ("tiny", True), ("deepseek-v4-flash", True)])
def test_model_explorer_is_closed(name: str, fold: bool) -> None:
    """Every edge leads to a node and an output that are there, in every stage."""
    text = json.dumps(model_explorer([("build", plain(name)), ("fold", folded(name))], fold))
    data = json.loads(text)
    if fold:
        assert len(text) < 5e6
    assert [g["id"] for g in data["graphs"]] == ["build", "fold"]
    for graph in data["graphs"]:
        outputs = {n["id"]: len(n["outputsMetadata"]) for n in graph["nodes"]}
        assert len(outputs) == len(graph["nodes"])
        for node in graph["nodes"]:
            assert node.keys() == {"id", "label", "namespace", "incomingEdges", "attrs", "outputsMetadata"}
            assert all(
                int(e["sourceNodeOutputId"]) < outputs[e["sourceNodeId"]] for e in node["incomingEdges"]
            )


def test_model_explorer_opens_fused_bodies() -> None:
    (graph,) = model_explorer(folded("tiny"), fold=False)["graphs"]
    inside = [n for n in graph["nodes"] if "viewed_norm_quantize" in n["namespace"]]
    assert Counter(n["label"] for n in inside) == {"rms_norm": 6, "quantize": 6}
    assert inside[0]["namespace"] == "layers/0/viewed_norm_quantize (attn_in_quantized)"
    reader = next(n for n in graph["nodes"] if n["id"] == "layers.0.attn.qa")
    assert reader["incomingEdges"][0]["sourceNodeId"] == "layers.0.attn_in_quantized/quantize"
