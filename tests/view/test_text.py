"""Summaries, and texts with equal layers folded."""

from __future__ import annotations

import json
import math

import pytest

from dsv4c.buckets import Bucket
from dsv4c.config import Deployment
from dsv4c.errors import GraphError
from dsv4c.ir.graph import Builder, Graph
from dsv4c.ir.ops import add, rms_norm, scale, silu
from dsv4c.ir.text import parse_graph, print_graph, print_node
from dsv4c.ir.totals import compulsory
from dsv4c.models.deepseek_v4 import build
from dsv4c.models.layout import layout
from dsv4c.types import BF16, TensorType
from dsv4c.view.layers import body_of, find_section, folds, sections
from dsv4c.view.text import render, summarize, summary
from tests.view.graphs import config, folded, official, plain


def layered(factors: list[float], names: str = "y") -> Graph:
    """A graph of layers `x * factor + x`; equal factors make equal layers."""
    with Builder("layered") as b:
        x = b.input("x", TensorType(BF16, (4,)))
        x = silu(x, name="start")
        for i, factor in enumerate(factors):
            with b.scope(f"layers.{i}"):
                x = add(scale(x, factor=factor, name=f"{names}{i}"), x, name="out")
    return b.finish({"out": x})


def test_equal_layers_fold_into_the_first() -> None:
    groups = folds(layered([1.0, 1.0, 2.0, 1.0, 2.0]))
    assert [(g.shown.title, len(g.members), g.numbers) for g in groups] == [
        ("model", 1, ""),
        ("layers.0", 1, ""),
        ("layers.1", 2, "3"),
        ("layers.2", 2, "4"),
    ]


@pytest.mark.parametrize(
    ("second", "equal"),
    [
        (lambda a, b: add(scale(b, factor=1.0), a), True),
        (lambda a, b: add(scale(b, factor=2.0), a), False),  # an attribute
        (lambda a, b: add(scale(a, factor=1.0), a), False),  # the wiring
        (lambda a, b: add(scale(b, factor=1.0), silu(a)), False),  # a node more
    ],
)
def test_what_makes_layers_equal(second: object, equal: bool) -> None:
    with Builder("two") as b:
        x = b.input("x", TensorType(BF16, (4,)))
        y = b.input("y", TensorType(BF16, (4,)))
        with b.scope("layers.0"):
            add(scale(y, factor=1.0, name="any_name"), x, name="other_name")
        with b.scope("layers.1"):
            out = second(x, y)  # type: ignore[operator]
    assert (len(folds(b.finish({"out": out}))) == 1) is equal


def test_parameters_count_by_their_place_in_the_layer() -> None:
    def graph(second: str) -> Graph:
        with Builder("params") as b:
            x = b.input("x", TensorType(BF16, (2, 4)))
            for i, name in enumerate(("norm", second)):
                gain = b.param(f"layers.{i}.{name}", TensorType(BF16, (4,)))
                with b.scope(f"layers.{i}"):
                    x = rms_norm(x, gain, eps=1e-6)
        return b.finish({"x": x})

    assert len(folds(graph("norm"))) == 2  # the first reads an input, the second a layer
    with Builder("params") as b:
        x = b.input("x", TensorType(BF16, (2, 4)))
        for i, name in enumerate(("norm", "norm", "gain")):
            gain = b.param(f"layers.{i}.{name}", TensorType(BF16, (4,)))
            with b.scope(f"layers.{i}"):
                out = rms_norm(x, gain, eps=1e-6)
    assert [len(g.members) for g in folds(b.finish({"out": out}))] == [2, 1]


def test_sections_are_whole_where_nodes_interleave() -> None:
    with Builder("mixed") as b:
        x = b.input("x", TensorType(BF16, (4,)))
        for i in (0, 1, 0, 1):
            with b.scope(f"layers.{i}.attn"):
                x = silu(x)
    assert [(s.prefix, len(s.nodes)) for s in sections(b.finish({"x": x}))] == [
        ("layers.0", 2),
        ("layers.1", 2),
    ]


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("deepseek-v4-flash", {"layers.0": 2, "layers.2": 1, "layers.3": 20, "layers.4": 20}),
        ("deepseek-v4-pro", {"layers.0": 2, "layers.2": 1, "layers.3": 29, "layers.4": 29}),
    ],
)
def test_layers_of_the_releases(name: str, counts: dict[str, int]) -> None:
    for graph in (plain(name), official(name), folded(name)):
        assert summarize(graph, config(name)).layers == counts


def test_rendering_names_the_folded_layers() -> None:
    text = render(official("deepseek-v4-flash"))
    assert "# layers.1 (x1) is equal to layers.0\n" in text
    assert f"# layers.{', '.join(map(str, range(6, 43, 2)))} (x19) are equal to layers.4\n" in text
    assert "%layers.4.attn.wq_a" in text
    assert "%layers.6.attn.wq_a" not in text
    assert len(text) < len(print_graph(official("deepseek-v4-flash"))) / 8


def test_unfolded_rendering_parses_back() -> None:
    graph = official("tiny")
    assert parse_graph(render(graph, fold=False)) == graph


def test_one_layer_is_whole() -> None:
    graph = official("deepseek-v4-flash")
    text = render(graph, layer=6)
    nodes = [n for n in graph.nodes if n.place.layer == "layers.6"]
    lines = text.splitlines()
    assert lines[0] == f"# layers.6 of graph deepseek-v4-flash.decode-1: {len(nodes)} nodes"
    assert all(print_node(n, n.scope) in lines for n in nodes)
    assert "# takes %layers.5.x_ffn: bf16[1,4,4096]" in lines
    assert "state %layers.6.attn.indexer.keys: q[e2m1,ue8m0,1x32][1,2048,128]" in lines
    assert lines[-1] == "# gives %layers.6.x_ffn: bf16[1,4,4096]"
    assert render(graph, layer="layers.6") == text


def test_a_layer_that_is_not_there() -> None:
    with pytest.raises(GraphError, match=r"has no layer 'layers\.43'; its layers: layers\.0 to layers\.42"):
        render(official("deepseek-v4-flash"), layer=43)
    with pytest.raises(GraphError, match=r"graph tiny\.decode-1 has no layer 'mtp\.0'"):
        find_section(plain("tiny"), "mtp.0")


def test_the_mtp_block_is_a_layer() -> None:
    graph = build(config("tiny"), Deployment(), Bucket("draft"))
    assert [g.shown.prefix for g in folds(graph) if g.shown.prefix] == ["mtp.0"]
    found = summarize(graph, config("tiny"))
    assert found.bytes_per_token["routed experts"] > found.bytes_per_token["state"] > 0


@pytest.mark.parametrize("name", ["deepseek-v4-flash", "deepseek-v4-pro"])
def test_summary_of_the_official_recipe(name: str) -> None:
    found = summarize(official(name), config(name))
    assert found.context == 8192
    assert sum(found.bytes_per_token.values()) == sum(compulsory(official(name)).values())
    assert found.parameters == sum(
        math.prod(p.shape) for p in layout(config(name)) if not p.name.startswith("mtp.")
    )
    assert sum(sum(ops.values()) for ops in found.ops.values()) == found.totals.nodes
    json.dumps(found.to_dict())


def test_summary_of_plain_weights_counts_plain_bytes() -> None:
    found = summarize(plain("deepseek-v4-flash"), config("deepseek-v4-flash"))
    quantized = summarize(official("deepseek-v4-flash"), config("deepseek-v4-flash"))
    ratio = found.bytes_per_token["routed experts"] / quantized.bytes_per_token["routed experts"]
    assert ratio == pytest.approx(2 / (0.5 + 1 / 32))
    assert found.bytes_per_token["state"] > 2 * quantized.bytes_per_token["state"]


def test_summary_reads_well() -> None:
    text = summary(official("deepseek-v4-flash"), config("deepseek-v4-flash"))
    lines = text.splitlines()
    assert lines[0].startswith("graph deepseek-v4-flash.decode-1: 9,")
    assert lines[1] == "layers        43, 4 different: layers.0 x2, layers.2 x1, layers.3 x20, layers.4 x20"
    assert "bytes/token   11.226 GB at least, at 8,192 tokens of context" in lines
    assert any(line.split()[0] == "norm" and "normalize" in line for line in lines)


def test_a_body_is_traced_over_the_nodes_operands() -> None:
    node = next(n for n in folded("tiny").nodes if n.op.name == "viewed_norm_quantize")
    body = body_of(node)
    assert body is not None
    assert [n.op.name for n in body.nodes] == ["rms_norm", "quantize"]
    assert [v.type for v in body.outputs.values()] == [v.type for v in node.outputs]
    assert body_of(folded("tiny").nodes[0]) is None
