"""Text and JSON of graphs: they read back, and say where they do not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4c.buckets import Bucket, bucket_named
from dsv4c.config import Deployment, load_config
from dsv4c.errors import GraphError
from dsv4c.ir.graph import Builder, Graph
from dsv4c.ir.ops import add, cache_write, gather, quantize, reshape, rms_norm, scale, silu, sink_softmax
from dsv4c.ir.ops.math import Silu
from dsv4c.ir.text import (
    graph_to_json,
    make_op,
    parse_attribute,
    parse_graph,
    print_attribute,
    print_graph,
    print_op,
)
from dsv4c.ir.verify import verify
from dsv4c.models.deepseek_v4 import build
from dsv4c.passes.quantize import quantize as apply_recipe
from dsv4c.passes.recipes import RECIPES
from dsv4c.types import BF16, F32, FP8_ROW, I32, KV_FP8, NVFP4_ROW, DType, QuantType, TensorType
from tests.interpreted import deployment_of

WHOLE = """\
graph small
input %x: bf16[2,128]
input %scores: f32[2,4,3]
input %index: i32[2]
input %slots: i32[2]
state %layers.0.window: q[e4m3,ue8m0,1x64,tail=64][1,8,128]
param %layers.0.norm: bf16[128]
param %sink: f32[4]
@layers.0
%.normed: bf16[2,128] = rms_norm(%x, %.norm) {eps=1e-06, precision=f32}
%.row: q[e4m3,ue8m0,1x64,tail=64][2,128] = quantize(%.normed) {format=q[e4m3,ue8m0,1x64,tail=64]}
%.written: q[e4m3,ue8m0,1x64,tail=64][1,8,128] = cache_write(%.window, %.row, %index, %slots)
@layers.0.attn
%.p: bf16[2,4,3], %.p.1: f32[2,4] = sink_softmax(%scores, %sink) {out=bf16}
@
%fused: bf16[2,128] = silu(%layers.0.normed) from [layers.0.a layers.0.b]
return out=%fused, p=%layers.0.attn.p
"""


def small() -> Graph:
    with Builder("small") as b:
        x = b.input("x", TensorType(BF16, (2, 128)))
        scores = b.input("scores", TensorType(F32, (2, 4, 3)))
        index = b.input("index", TensorType(I32, (2,)))
        slots = b.input("slots", TensorType(I32, (2,)))
        window = b.state("layers.0.window", QuantType(KV_FP8, (1, 8, 128)))
        gain = b.param("layers.0.norm", TensorType(BF16, (128,)))
        sink = b.param("sink", TensorType(F32, (4,)))
        with b.scope("layers.0"):
            y = rms_norm(x, gain, eps=1e-6, name="normed")
            cache_write(window, quantize(y, format=KV_FP8, name="row"), index, slots, name="written")
            with b.scope("attn"):
                p, _ = sink_softmax(scores, sink, out=BF16, name="p")
        (z,) = b.emit(Silu(), (y,), names=["fused"], scope="", origin=("layers.0.a", "layers.0.b"))
    return b.finish({"out": z, "p": p})


def same(a: Graph, b: Graph) -> bool:
    """Equal, down to names, scopes and provenance."""
    ours = [[(n.name, n.scope, n.origin, [v.name for v in n.outputs]) for n in g.nodes] for g in (a, b)]
    return a == b and ours[0] == ours[1] and a.name == b.name


def test_the_whole_text() -> None:
    assert print_graph(small()) == WHOLE
    assert same(parse_graph(WHOLE), small())


def test_comments_and_blank_lines_do_not_count() -> None:
    text = WHOLE.replace("@layers.0\n", "\n# a comment\n   @layers.0\n")
    assert parse_graph(text) == small()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("bucket", ["decode-2", "verify-2x4.last", "prefill-64", "draft-3", "round-1x4"])
def test_models_read_back(recipe: str, bucket: str) -> None:
    asked = bucket_named(bucket)
    graph = apply_recipe(build(load_config("tiny"), deployment_of(asked, slots=2), asked), RECIPES[recipe])
    text = print_graph(graph)
    again = parse_graph(text)
    assert same(again, graph)
    assert print_graph(again) == text


def test_a_graph_without_results() -> None:
    with Builder("g") as b:
        silu(b.input("x", TensorType(BF16, (2,))))
    graph = b.finish({})
    assert same(parse_graph(print_graph(graph)), graph)


@pytest.mark.parametrize("name", ["deepseek-v4-flash", "deepseek-v4-pro"])
def test_the_releases_survive_their_text(name: str) -> None:
    text = print_graph(verify(build(load_config(name), Deployment(), Bucket("decode"))))
    assert print_graph(parse_graph(text)) == text


# --- attributes ---

integers = st.integers(-(1 << 62), 1 << 62)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    integers,
    st.floats(allow_nan=False),
    st.text(),
    st.sampled_from([*DType, FP8_ROW, KV_FP8, NVFP4_ROW]),
)


@settings(deadline=None)
@given(scalars)
def test_scalars_read_back(value: Any) -> None:
    again = parse_attribute(print_attribute(value))
    assert again == value
    assert type(again) is type(value)


@settings(deadline=None)
@given(
    st.lists(
        st.one_of(integers, st.floats(allow_nan=False), st.sampled_from([*DType, FP8_ROW])),
        max_size=4,
    )
)
def test_tuples_read_back(values: list[Any]) -> None:
    nested = (tuple(values), 1, tuple(values[:1]))
    assert parse_attribute(print_attribute(tuple(values))) == tuple(values)
    assert parse_attribute(print_attribute(nested)) == nested


@pytest.mark.parametrize("text", ["1x", "what", "--1", "0b1"])
def test_an_attribute_that_is_nothing(text: str) -> None:
    with pytest.raises(GraphError, match="cannot read the"):
        parse_attribute(text)


def test_an_attribute_without_a_text_form() -> None:
    with pytest.raises(GraphError, match=r"attribute \[1\] of type list has no text form"):
        print_attribute([1])


def test_an_op_as_text() -> None:
    assert print_op(small().nodes[0].op) == "rms_norm {eps=1e-06, precision=f32}"
    assert print_op(Silu()) == "silu"


# --- errors ---

ERRORS = [  # what to replace, by what, line, message
    ("graph small", "grape small", 1, "expected `graph NAME`"),
    ("input %x: bf16[2,128]", "input %x: bf17[2,128]", 2, "unknown element type 'bf17'"),
    ("input %index: i32[2]", "input %x: i32[2]", 4, "the name %x is already taken"),
    ("rms_norm(%x, %.norm)", "rms_norm(%x, %.gain)", 10, "%layers.0.gain is used before it is defined"),
    (
        "rms_norm(%x, %.norm)",
        "rms_norm(%x, norm)",
        10,
        "expected `%result: type = op(%operand, ...) {attribute=value}`",
    ),
    ("rms_norm(%x, %.norm)", "rms_norm(%x,, %.norm)", 10, "expected `%result: type = op("),
    ("rms_norm(%x", "rms_nrom(%x", 10, "unknown op 'rms_nrom'; did you mean rms_norm?"),
    ("{eps=1e-06, precision=f32}", "{precision=f32}", 10, "missing 1 required positional argument: 'eps'"),
    (
        "{eps=1e-06, precision=f32}",
        "{eps=1e-06, colour=f32}",
        10,
        "got an unexpected keyword argument 'colour'",
    ),
    ("{eps=1e-06, precision=f32}", "{eps=1e-06, eps=1e-06}", 10, "rms_norm: attribute eps is given twice"),
    ("{eps=1e-06, precision=f32}", "{eps=1e-06, precision=f33}", 10, "cannot read the attribute value 'f33'"),
    ("{eps=1e-06, precision=f32}", '{eps="a", precision=f32}', 10, 'attribute eps is "a", expected float'),
    ("{eps=1e-06, precision=f32}", "{eps=true, precision=f32}", 10, "attribute eps is true, expected float"),
    ("{eps=1e-06, precision=f32}", "{eps=1e-06, precision=(f32)}", 10, "precision is (f32), expected DType"),
    ("{eps=1e-06, precision=f32}", '{eps="a}', 10, "cannot read the attribute value '\"a'"),
    ("{eps=1e-06, precision=f32}", "{eps=q[e4m3]}", 10, "cannot read the attribute value 'q[e4m3]'"),
    ("{eps=1e-06, precision=f32}", "{eps=1e-06 precision}", 10, "cannot read the attributes"),
    (
        "%.normed: bf16[2,128] =",
        "%.normed: f32[2,128] =",
        10,
        "%layers.0.normed is written as f32[2,128] but rms_norm gives bf16[2,128]",
    ),
    ("%.normed: bf16[2,128] =", "%.normed: bf16[2,128] and more =", 10, "expected `%result: type = op("),
    ("%.p: bf16[2,4,3], %.p.1: f32[2,4] =", "%.p: bf16[2,4,3] =", 14, "sink_softmax has 2 results, not 1"),
    ("%.row:", "%.normed:", 11, "the name %layers.0.normed is already taken"),
    ("rms_norm(%x, %.norm)", "rms_norm(%x, %sink)", 10, "gain f32[4] does not fit bf16[2,128]"),
    ("param %sink: f32[4]", "param %sink: q[e4m3,ue8m0,128x128][4]", 8, "needs 2 dimensions, got (4,)"),
    ("return out=%fused", "return out=%fusion", 17, "%fusion is used before it is defined"),
    ("return out=%fused", "return %fused", 17, "expected `return label=%value, ...`"),
    ("out=%fused, p=", "out=%fused, out=", 17, "output out is returned twice"),
    ("p=%layers.0.attn.p\n", "p=%layers.0.attn.p\ngraph more\n", 18, "nothing may follow `return`"),
    ("return out=%fused, p=%layers.0.attn.p\n", "", 16, "the text ends without `return`; is it cut off?"),
    (WHOLE, "", 1, "the text ends without `return`"),
]


@pytest.mark.parametrize(("old", "new", "line", "message"), ERRORS)
def test_errors_name_the_line(old: str, new: str, line: int, message: str) -> None:
    assert old in WHOLE
    with pytest.raises(GraphError) as error:
        parse_graph(WHOLE.replace(old, new, 1))
    assert str(error.value).startswith(f"line {line}: ")
    assert message in str(error.value)


def test_errors_point_with_a_caret() -> None:
    with pytest.raises(GraphError) as error:
        parse_graph(WHOLE.replace("%.norm)", "%.gain)"))
    _, shown, caret = str(error.value).splitlines()
    assert shown[caret.index("^") :].startswith("%.gain")


def test_json_says_what_the_graph_is() -> None:
    graph = small()
    data = json.loads(json.dumps(graph_to_json(graph)))
    assert (data["schema"], data["name"]) == (1, graph.name)
    for key in ("inputs", "states", "params"):
        assert [(v["name"], v["type"]) for v in data[key]] == [
            (v.name, str(v.type)) for v in getattr(graph, key)
        ]
    assert data["outputs"] == {label: v.name for label, v in graph.outputs.items()}
    for record, node in zip(data["nodes"], graph.nodes, strict=True):
        attributes = ", ".join(f"{key}={value}" for key, value in record["attributes"].items())
        assert make_op(record["op"], attributes) == node.op
        assert record["inputs"] == [v.name for v in node.inputs]
        assert [(v["name"], v["type"]) for v in record["outputs"]] == [
            (v.name, str(v.type)) for v in node.outputs
        ]
        assert (record["scope"], tuple(record["origin"])) == (node.scope, node.origin)


# --- random graphs ---


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    with Builder("random") as b:
        values = [b.input("x", TensorType(BF16, (2, 4))), b.param("layers.1.w", TensorType(F32, (2, 4)))]
        cache = b.state("layers.1.cache", TensorType(BF16, (1, 8, 4)))
        index = b.input("index", TensorType(I32, (2,)))
        slots, places = b.input("slots", TensorType(I32, (2,))), b.input("places", TensorType(I32, (2, 1)))
        for _ in range(draw(st.integers(1, 12))):
            x, y = draw(st.sampled_from(values)), draw(st.sampled_from(values))
            with b.scope(draw(st.sampled_from(["layers.1", "layers.10", "layers.1.attn", "head"]))):
                match draw(st.integers(0, 4)):
                    case 0:
                        values.append(add(x, y))
                    case 1:
                        values.append(scale(x, factor=draw(st.floats(allow_nan=False)), name="named"))
                    case 2:
                        values.append(reshape(reshape(x, shape=(8,)), shape=(2, 4)))
                    case 3:
                        if x.type.dtype is BF16:
                            cache = cache_write(cache, x, index, slots)
                    case 4:
                        values.append(reshape(gather(cache, places, slots), shape=(2, 4)))
    return b.finish({"out": values[-1], "cache": cache} if draw(st.booleans()) else {"out": values[-1]})


@settings(deadline=None)
@given(graphs())
def test_any_graph_reads_back(graph: Graph) -> None:
    text = print_graph(graph)
    again = parse_graph(text)
    assert same(again, graph)
    assert print_graph(again) == text
