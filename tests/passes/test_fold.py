"""Folding: what is found, what is refused and why, and that meaning survives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4c.errors import GraphError
from dsv4c.ir import fused as fused_module
from dsv4c.ir.declare import fused
from dsv4c.ir.fused import Fused, Neighborhood, dtype_of, trace
from dsv4c.ir.graph import Builder, Graph, Node, Value, rewrite
from dsv4c.ir.op import Op
from dsv4c.ir.ops import (
    add,
    advance,
    cache_write,
    cast,
    clamp,
    gather,
    linear,
    mul,
    normalize,
    quantize,
    reshape,
    rms_norm,
    scale,
    shift,
    sigmoid,
    silu,
    sink_softmax,
    slice_,
    softmax,
)
from dsv4c.ir.ops.math import Sigmoid, Silu
from dsv4c.ir.ops.norm import Normalize, Softmax
from dsv4c.ir.text import parse_graph, print_graph
from dsv4c.ir.verify import verify
from dsv4c.numerics.codec import Quantized
from dsv4c.passes.expand import expand
from dsv4c.passes.fold import FoldReport, Rule, fold
from dsv4c.passes.match import BUDGET, Search
from dsv4c.passes.work import Match, Work
from dsv4c.reference.interpret import interpret
from dsv4c.types import BF16, F32, FP8_ROW, I32, MXFP4, DType, QuantFormat, TensorType, parse_type

T = parse_type


@fused
class NormQuantTest(Fused):
    """A norm and its encoding; the norm is a second result."""

    literals = ("rms_norm.precision",)
    eps: float
    format: QuantFormat

    def body(self, x: Value, gain: Value) -> tuple[Value, ...]:
        y = rms_norm(x, gain, eps=self.eps)
        return quantize(y, format=self.format), y


@fused
class GatedTest(Fused):
    """silu(clamp(a)) * b."""

    literals = ("clamp.low",)
    limit: float

    def body(self, a: Value, b: Value) -> Value:
        return mul(silu(clamp(a, low=None, high=self.limit)), b)  # type: ignore[no-any-return]


@fused
class StoreTest(Fused):
    """Norm, then store; the write is a result."""

    literals = ("rms_norm.precision",)
    eps: float

    def body(self, cache: Value, x: Value, index: Value, slots: Value) -> Value:
        return cache_write(cache, rms_norm(x, eps=self.eps), index, slots)  # type: ignore[no-any-return]


@fused
class FlattenTest(Fused):
    """Geometry from types, an optional cast, an optional encoding, an optional operand."""

    literals = ("cast.to", "linear.out")
    format: QuantFormat | None

    def body(self, x: Value, w: Value, bias: Value | None = None) -> Value:
        n, s, h = x.type.shape
        y = linear(reshape(x, shape=(n, s * h)), w, out=F32)
        if bias is not None:
            y = add(y, bias)
        y = cast(y, to=BF16)
        return y if self.format is None else quantize(y, format=self.format)  # type: ignore[no-any-return]


@fused
class ChainTest(Fused):
    """A number of repetitions that no attribute tells."""

    literals = ("softmax.axis", "normalize.axis")
    anchor: ClassVar[type[Op]] = Softmax
    eps: float
    steps: int

    @classmethod
    def propose(cls, anchor: Node, around: Neighborhood) -> Iterator[Mapping[str, Any]]:
        steps, after = 0, around.users(anchor.outputs[0])
        while len(after) == 1 and isinstance(after[0].op, Normalize):
            steps, after = steps + 1, around.users(after[0].outputs[0])
        yield {"steps": steps}

    def body(self, x: Value) -> Value:
        y = softmax(x, axis=-1)
        for i in range(self.steps):
            y = normalize(y, axis=-1 if i % 2 else -2, eps=self.eps)
        return y  # type: ignore[no-any-return]


def graph_of(build: Any, **inputs: str) -> Graph:
    """A graph with these inputs (types as text; states begin with `state `), and `build(...)`'s outputs."""
    builder = Builder("g")
    values = [
        builder.state(n, T(t.removeprefix("state "))) if t.startswith("state ") else builder.input(n, T(t))
        for n, t in inputs.items()
    ]
    with builder, builder.scope("layers.0"):
        outputs = build(*values)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return verify(builder.finish({str(i): v for i, v in enumerate(outputs)}))


def folded(graph: Graph, *ops: type[Fused]) -> tuple[list[str], FoldReport, Graph]:
    new, report = fold(graph, [Rule(op) for op in ops])
    verify(new)
    assert parse_graph(print_graph(new)) == new
    again, second = fold(new, [Rule(op) for op in ops])
    assert again == new, "folding twice changes something"
    assert not any(second.counts.values())
    back = verify(expand(new))
    assert fold(back, [Rule(op) for op in ops])[0] == new, "expand, then fold"
    return [n.op.name for n in new.nodes], report, new


def refused(report: FoldReport, op: type[Fused]) -> tuple[str, str, str]:
    (refusal,) = report.rules[op.name].refusals
    return refusal.cause, refusal.expected, refusal.found


# --- what is found ---


def test_fields_are_captured_and_an_unread_result_is_dropped() -> None:
    def build(x: Value, g: Value) -> Value:
        return quantize(rms_norm(x, g, eps=1e-5), format=MXFP4)  # type: ignore[no-any-return]

    names, report, new = folded(graph_of(build, x="bf16[2,64]", g="bf16[64]"), NormQuantTest)
    assert names == ["norm_quant_test"]
    assert new.nodes[0].op == NormQuantTest(eps=1e-5, format=MXFP4, keep=(0,))
    assert new.nodes[0].origin == ("layers.0.rms_norm", "layers.0.quantize")
    assert report.counts == {"norm_quant_test": 1}


def test_a_result_that_others_read_stays() -> None:
    def build(x: Value, g: Value) -> tuple[Value, ...]:
        y = rms_norm(x, g, eps=1e-5)
        return quantize(y, format=FP8_ROW), silu(y)

    names, _, new = folded(graph_of(build, x="bf16[2,128]", g="bf16[128]"), NormQuantTest)
    assert names == ["norm_quant_test", "silu"]
    assert [v.name for v in new.nodes[0].outputs] == ["layers.0.quantize", "layers.0.rms_norm"]
    assert new.nodes[0].op == NormQuantTest(eps=1e-5, format=FP8_ROW)


@pytest.mark.parametrize("swapped", [False, True])
def test_products_match_either_way(swapped: bool) -> None:
    def build(a: Value, b: Value) -> Value:
        gate = silu(clamp(a, low=None, high=7.0))
        return mul(b, gate) if swapped else mul(gate, b)  # type: ignore[no-any-return]

    names, _, new = folded(graph_of(build, a="f32[2,8]", b="f32[2,8]"), GatedTest)
    assert names == ["gated_test"]
    assert [v.name for v in new.nodes[0].inputs] == ["a", "b"]


def test_a_write_carries_its_alias() -> None:
    def build(cache: Value, x: Value, index: Value, slots: Value) -> Value:
        written = cache_write(cache, rms_norm(x, eps=1e-6), index, slots)
        return gather(written, reshape(index, shape=(2, 1)), slots)  # type: ignore[no-any-return]

    graph = graph_of(build, cache="state bf16[1,8,16]", x="bf16[2,16]", index="i32[2]", slots="i32[2]")
    names, _, new = folded(graph, StoreTest)
    assert names == ["reshape", "store_test", "gather"] or names == ["store_test", "reshape", "gather"]
    store = next(n for n in new.nodes if n.op.name == "store_test")
    assert store.op.alias == {0: 0}
    assert new.finals[new.states[0]] is store.outputs[0]
    assert trace(store.op, tuple(v.type for v in store.inputs)).alias == {0: 0}  # type: ignore[arg-type]


@pytest.mark.parametrize("format_", [None, MXFP4])
@pytest.mark.parametrize("bias", [False, True])
def test_shapes_of_a_body(format_: QuantFormat | None, bias: bool) -> None:
    def build(x: Value, w: Value, b: Value) -> tuple[Value, ...]:
        y = linear(reshape(x, shape=(2, 64)), w, out=F32)
        y = cast(add(y, b) if bias else y, to=BF16)
        return (y if format_ is None else quantize(y, format=format_)), silu(b)

    graph = graph_of(build, x="bf16[2,4,16]", w="bf16[32,64]", b="f32[32]")
    names, _, new = folded(graph, FlattenTest)
    assert sorted(names) == ["flatten_test", "silu"]
    node = next(n for n in new.nodes if n.op.name == "flatten_test")
    assert node.op == FlattenTest(format=format_)
    assert len(node.inputs) == 2 + bias


def test_a_proposed_number() -> None:
    def build(x: Value) -> tuple[Value, ...]:
        y, z = softmax(x, axis=-1), softmax(silu(x), axis=-1)
        for i in range(5):
            y = normalize(y, axis=-1 if i % 2 else -2, eps=1e-6)
        return y, normalize(z, axis=-2, eps=1e-6)

    _, report, new = folded(graph_of(build, x="f32[3,4,4]"), ChainTest)
    assert report.counts == {"chain_test": 2}
    assert {n.op.attributes().get("steps") for n in new.nodes} == {5, 1, None}


def test_overlaps_go_to_the_earlier_rule_then_the_earlier_node() -> None:
    def build(x: Value, g: Value) -> tuple[Value, ...]:
        y = rms_norm(x, g, eps=1e-6)
        return quantize(y, format=MXFP4), quantize(y, format=FP8_ROW)

    _, report, new = folded(graph_of(build, x="bf16[1,128]", g="bf16[128]"), NormQuantTest)
    assert [n.op.name for n in new.nodes] == ["norm_quant_test", "quantize"]
    assert new.nodes[0].op.attributes()["format"] == MXFP4
    assert report.rules["norm_quant_test"].matched == 1


def test_expand_gives_names_back_and_takes_a_choice() -> None:
    def build(x: Value, g: Value) -> tuple[Value, ...]:
        q = quantize(rms_norm(x, g, eps=1e-6), format=FP8_ROW)
        return q, silu(clamp(x, low=None, high=1.0))

    graph = graph_of(build, x="f32[1,128]", g="f32[128]")
    new, _ = fold(graph, [Rule(NormQuantTest)])
    assert print_graph(expand(new)) == print_graph(graph)
    assert expand(new, ["norm_quant_test"]) == graph
    with pytest.raises(GraphError, match="no node is a gated_test"):
        expand(new, ["gated_test"])


# --- what is refused ---


def test_an_inner_value_that_is_read_outside() -> None:
    def build(a: Value, b: Value) -> tuple[Value, ...]:
        gate = silu(clamp(a, low=None, high=7.0))
        return mul(gate, b), sigmoid(gate)

    names, report, _ = folded(graph_of(build, a="f32[2,8]", b="f32[2,8]"), GatedTest)
    assert "gated_test" not in names
    cause, _, found = refused(report, GatedTest)
    assert (cause, found) == ("escape", "inner value %layers.0.silu escapes to sigmoid layers.0.sigmoid")
    assert report.rules["gated_test"].refusals[0].launches == 2


def test_an_inner_value_that_is_an_output() -> None:
    def build(a: Value, b: Value) -> tuple[Value, ...]:
        gate = silu(clamp(a, low=None, high=7.0))
        return mul(gate, b), gate

    _, report, _ = folded(graph_of(build, a="f32[2,8]", b="f32[2,8]"), GatedTest)
    assert refused(report, GatedTest)[2] == "inner value %layers.0.silu escapes to the graph's outputs"


def test_a_cycle_through_the_outside() -> None:
    @fused
    class TwoResultsTest(Fused):
        """y leaves, comes back through b."""

        factor: float

        def body(self, x: Value, b: Value) -> tuple[Value, ...]:
            y = scale(x, factor=self.factor)
            return mul(y, b), y

    def around(x: Value) -> Value:
        y = scale(x, factor=2.0)
        return mul(y, sigmoid(y))  # type: ignore[no-any-return]

    _, report, _ = folded(graph_of(around, x="f32[4]"), TwoResultsTest)
    assert refused(report, TwoResultsTest) == (
        "cycle",
        "no path out of the body and back in",
        "one through sigmoid layers.0.sigmoid",
    )


def test_a_read_that_must_come_before_the_write_closes_a_cycle() -> None:
    @fused
    class NormAndStoreTest(Fused):
        """The norm is a result, and is stored."""

        literals = ("rms_norm.precision",)
        eps: float

        def body(self, cache: Value, x: Value, index: Value, slots: Value) -> tuple[Value, ...]:
            y = rms_norm(x, eps=self.eps)
            return cache_write(cache, y, index, slots), y

    def build(cache: Value, x: Value, index: Value, slots: Value) -> Value:
        y = rms_norm(x, eps=1e-6)
        old = gather(cache, cast(y, to=I32), slots)  # reads the cache before it is written, needs the norm
        cache_write(cache, y, index, slots)
        return old  # type: ignore[no-any-return]

    graph = graph_of(build, cache="state f32[1,8,16]", x="f32[2,16]", index="i32[2]", slots="i32[2]")
    _, report, _ = folded(graph, NormAndStoreTest)
    assert refused(report, NormAndStoreTest)[0] == "cycle"


def test_attributes_that_are_literals_must_agree() -> None:
    def build(a: Value, b: Value) -> Value:
        return mul(silu(clamp(a, low=-7.0, high=7.0)), b)  # type: ignore[no-any-return]

    _, report, _ = folded(graph_of(build, a="f32[2,8]", b="f32[2,8]"), GatedTest)
    assert refused(report, GatedTest) == ("attribute", "none", "-7.0")


def test_a_disagreement_ends_a_partial_match() -> None:
    """What is reported is the place of the first disagreement, not of a match that went on in spite of it."""

    def literal(a: Value, b: Value) -> Value:
        return mul(silu(clamp(a, low=-7.0, high=7.0)), b)  # type: ignore[no-any-return]

    @fused
    class SquareTest(Fused):
        """silu(x) * sigmoid(x)."""

        def body(self, x: Value) -> Value:
            return mul(silu(x), sigmoid(x))  # type: ignore[no-any-return]

    def wired(a: Value, b: Value) -> Value:
        return mul(silu(a), sigmoid(b))  # type: ignore[no-any-return]

    for build, op, cause in ((literal, GatedTest, "attribute"), (wired, SquareTest, "operand")):
        _, report, _ = folded(graph_of(build, a="f32[2,8]", b="f32[2,8]"), op)
        (refusal,) = report.rules[op.name].refusals
        assert refusal.cause == cause
        assert refusal.matched < refusal.of == 3


def test_an_operand_too_many() -> None:
    def build(cache: Value, x: Value, g: Value, index: Value) -> Value:
        return cache_write(cache, rms_norm(x, g, eps=1e-6), index, index)  # type: ignore[no-any-return]

    types = {"cache": "state bf16[1,8,16]", "x": "bf16[2,16]", "g": "bf16[16]", "index": "i32[2]"}
    _, report, _ = folded(graph_of(build, **types), StoreTest)
    assert refused(report, StoreTest) == ("operand", "1 operands and 1 results", "2 and 1")


def test_an_inner_value_as_an_operand() -> None:
    def build(a: Value) -> Value:
        gate = silu(clamp(a, low=None, high=7.0))
        return mul(gate, gate)  # type: ignore[no-any-return]

    _, report, _ = folded(graph_of(build, a="f32[2,8]"), GatedTest)
    assert refused(report, GatedTest) == (
        "cycle",
        "an operand made outside",
        "%layers.0.silu is an inner value",
    )


def test_results_that_nobody_reads() -> None:
    def build(a: Value, b: Value) -> Value:
        mul(silu(clamp(a, low=None, high=7.0)), b)
        return sigmoid(a)  # type: ignore[no-any-return]

    _, report, _ = folded(graph_of(build, a="f32[2,8]", b="f32[2,8]"), GatedTest)
    assert refused(report, GatedTest) == ("dead", "a reader of a result", "nobody")


def test_an_overwritten_operand_that_is_also_another() -> None:
    @fused
    class AdvanceTest(Fused):
        """A write alone."""

        def body(self, start: Value, slots: Value, lengths: Value) -> Value:
            return advance(start, slots, lengths)  # type: ignore[no-any-return]

    builder = Builder("g")
    start = builder.state("start", T("i32[2]"))
    with builder:
        graph = builder.finish({"next": advance(start, start, start)})
    _, report = fold(graph, [Rule(AdvanceTest)])
    assert refused(report, AdvanceTest)[::2] == ("alias", "%start is two operands")


def test_what_only_the_real_types_tell() -> None:
    """A body may decide by a type. It is laid over the graph both ways, then traced with the types found."""

    @fused
    class DecidingTest(Fused):
        """Which operand goes where depends on their type."""

        def body(self, x: Value, y: Value) -> Value:
            a, b = (x, y) if dtype_of(x) == F32 else (y, x)
            return mul(silu(a), sigmoid(b))  # type: ignore[no-any-return]

    @fused
    class RoundedTest(Fused):
        """A cast where there is something to cast."""

        literals = ("cast.to",)

        def body(self, x: Value) -> Value:
            y = silu(x)
            return sigmoid(cast(y, to=F32) if dtype_of(x) == BF16 else y)  # type: ignore[no-any-return]

    @fused
    class HalfTest(Fused):
        """The second half of a row."""

        literals = ("slice.axis",)

        def body(self, x: Value) -> Value:
            n = x.type.shape[1]
            return silu(slice_(x, axis=1, start=n // 2, stop=n))  # type: ignore[no-any-return]

    product = graph_of(lambda u, v: mul(silu(u), sigmoid(v)), u="f32[4]", v="f32[4]")
    names, _, new = folded(product, DecidingTest)
    assert [v.name for v in new.nodes[0].inputs] == ["u", "v"]
    assert names == ["deciding_test"]
    _, report, _ = folded(graph_of(lambda x: sigmoid(cast(silu(x), to=F32)), x="f32[4]"), RoundedTest)
    assert refused(report, RoundedTest) == ("type", "silu sigmoid", "silu cast sigmoid")
    first = graph_of(lambda x: silu(slice_(x, axis=1, start=0, stop=4)), x="f32[2,8]")
    _, report, _ = folded(first, HalfTest)
    (refusal,) = report.rules["half_test"].refusals
    assert (refusal.cause, refusal.at) == ("attribute", "layers.0.slice slice.start")


def test_a_field_that_this_shape_of_the_body_does_not_use() -> None:
    @fused
    class SometimesTest(Fused):
        """Without a bias nothing says what the factor is."""

        factor: float

        def body(self, x: Value, bias: Value | None = None) -> Value:
            return silu(x) if bias is None else silu(add(scale(x, factor=self.factor), bias))  # type: ignore[no-any-return]

    _, report, _ = folded(graph_of(lambda x: silu(x), x="f32[4]"), SometimesTest)
    assert refused(report, SometimesTest) == ("field", "factor to follow from the graph", "nothing")


def test_a_search_ends() -> None:
    """Equal siblings would be tried in every order, 13,700 steps, before a refusal; the budget ends it."""

    @fused
    class SiblingsTest(Fused):
        """Eight times silu(x), and a sum that is not there."""

        anchor = Silu
        offset: float

        def body(self, x: Value) -> tuple[Value, ...]:
            return (*[silu(x) for _ in range(8)], shift(x, offset=self.offset))

    def build(x: Value) -> tuple[Value, ...]:
        return tuple(silu(x) for _ in range(8))

    search = Search(Work(graph_of(build, x="f32[4]")), SiblingsTest)
    assert list(search.matches()) == []
    assert BUDGET < search.steps < BUDGET + 10


def test_one_field_that_would_need_two_values() -> None:
    @fused
    class SameEpsTest(Fused):
        """Two steps with one eps."""

        eps: float

        def body(self, x: Value) -> Value:
            return shift(silu(shift(x, offset=self.eps)), offset=self.eps)  # type: ignore[no-any-return]

    def build(x: Value) -> Value:
        return shift(silu(shift(x, offset=0.5)), offset=0.25)  # type: ignore[no-any-return]

    _, report, _ = folded(graph_of(build, x="f32[4]"), SameEpsTest)
    assert refused(report, SameEpsTest)[0] == "attribute"


def test_the_furthest_partial_match_is_reported() -> None:
    def build(a: Value, b: Value) -> tuple[Value, ...]:
        return add(silu(clamp(a, low=None, high=7.0)), b), mul(a, b), mul(b, b)

    _, report, _ = folded(graph_of(build, a="f32[2,8]", b="f32[2,8]"), GatedTest)
    assert refused(report, GatedTest) == ("op", "mul reading %layers.0.silu", "add")
    (refusal,) = report.rules["gated_test"].refusals
    assert (refusal.matched, refusal.of, refusal.at) == (2, 3, "layers.0.silu")


def test_a_maker_that_is_another_op() -> None:
    """Searched from the end of the body: the maker of an operand must be the op that the body has there."""

    @fused
    class LatestTest(Fused):
        """sigmoid(silu(x))."""

        anchor = Sigmoid

        def body(self, x: Value) -> Value:
            return sigmoid(silu(x))  # type: ignore[no-any-return]

    def build(a: Value, b: Value) -> tuple[Value, ...]:
        return sigmoid(mul(a, b)), sigmoid(a)

    _, report, _ = folded(graph_of(build, a="f32[4]", b="f32[4]"), LatestTest)
    found = [(r.cause, r.expected, r.found) for r in report.rules["latest_test"].refusals]
    assert found == [("op", "silu", "mul"), ("op", "silu", "input %a: f32[4]")]


def test_a_guard_refuses_with_its_reason() -> None:
    def build(x: Value, g: Value) -> Value:
        return quantize(rms_norm(x, g, eps=1e-6), format=FP8_ROW)  # type: ignore[no-any-return]

    def guard(match: Match) -> str | None:
        return f"width {match.operands[0].type.shape[-1]} is not a multiple of 256"

    graph = graph_of(build, x="bf16[1,128]", g="bf16[128]")
    new, report = fold(graph, [Rule(NormQuantTest, guard)])
    assert new is graph
    assert refused(report, NormQuantTest)[::2] == ("guard", "width 128 is not a multiple of 256")


def test_a_refusal_does_not_stop_the_next_occurrence() -> None:
    def build(a: Value, b: Value) -> tuple[Value, ...]:
        one = silu(clamp(a, low=None, high=7.0))
        return mul(one, b), one, mul(silu(clamp(b, low=None, high=5.0)), a)

    names, report, _ = folded(graph_of(build, a="f32[2,8]", b="f32[2,8]"), GatedTest)
    assert names.count("gated_test") == 1
    assert refused(report, GatedTest)[0] == "escape"


def test_two_rules_of_one_name() -> None:
    graph = graph_of(lambda x: silu(x), x="f32[4]")
    with pytest.raises(GraphError, match="two rules fold gated_test"):
        fold(graph, [Rule(GatedTest), Rule(GatedTest)])


# --- registration ---


def declare(**members: Any) -> type[Fused]:
    annotations = members.pop("fields", {})
    return fused(type("BrokenTest", (Fused,), {"__annotations__": annotations, **members}))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"body": lambda self, x: rms_norm(x, eps=1e-6)}, r"rms_norm\.eps is 1e-06 in the body"),
        (
            {"body": lambda self, x: rms_norm(x, eps=self.eps), "fields": {"eps": "float"}},
            r"rms_norm\.precision is f32 in the body",
        ),
        (
            {"body": lambda self, x: silu(x), "fields": {"eps": "float"}},
            "the field eps reaches no attribute",
        ),
        ({"body": lambda self, x, y: (silu(x), silu(y))}, "falls into parts"),
        ({"body": lambda self, x: x}, "returns its operand x unchanged"),
        ({"body": lambda self, x: (silu(x), 3)}, "returns 3, which is no value"),
        ({"body": lambda self, x, y: silu(x)}, "never reads y"),
        (
            {"body": lambda self, cache, rows, i, s: gather(cache_write(cache, rows, i, s), i, s)},
            "the write %cache_write is not among the body's results",
        ),
        ({}, "declares no body"),
        ({"body": lambda self: ()}, "has an empty body"),
        ({"body": lambda self, x: (y := silu(x), y)}, "the body returns a value twice"),
        ({"body": lambda self, *xs: silu(xs[0])}, "has a variadic body; propose the number of operands"),
        (
            {"body": lambda self, x: silu(x), "propose": classmethod(lambda cls, anchor, around: ({},))},
            "proposes fields; say at which op in `anchor`",
        ),
        (
            {"body": lambda self, x: silu(x)[0]},
            r"the body cannot be traced: .*test_fold\.py:\d+: TypeError: 'Value' object",
        ),
    ],
)
def test_a_body_that_cannot_be_registered(members: dict[str, Any], message: str) -> None:
    with pytest.raises(GraphError, match=message):
        declare(**members)


def test_what_is_overwritten_must_not_depend_on_types() -> None:
    @fused
    class MaybeStoreTest(Fused):
        """Stores rows of one type, and adds those of another."""

        def body(self, cache: Value, rows: Value) -> Value:
            return advance(cache, rows, rows) if dtype_of(rows) == BF16 else add(cache, rows)  # type: ignore[no-any-return]

    op = MaybeStoreTest()
    trace(op, (T("f32[2]"), T("f32[2]")))
    fused_module._ALIASES[op] = {0: 0}  # as a trace with the other type would have left it
    with pytest.raises(GraphError, match="which operands it overwrites must not depend on their types"):
        trace(op, (T("f32[3]"), T("f32[3]")))


def test_several_results_without_types() -> None:
    @fused
    class SinkTest(Fused):
        """The number of results of an op is known before its operands are."""

        out: DType

        def body(self, scores: Value, sink: Value) -> tuple[Value, ...]:
            p, denominator = sink_softmax(scores, sink, out=self.out)
            return silu(p), denominator

    def build(scores: Value, sink: Value) -> tuple[Value, ...]:
        p, denominator = sink_softmax(scores, sink, out=BF16)
        return silu(p), denominator

    names, _, _ = folded(graph_of(build, scores="f32[1,2,8]", sink="f32[2]"), SinkTest)
    assert names == ["sink_test"]


def test_cost_counts_what_crosses_the_edge_once() -> None:
    op = NormQuantTest(eps=1e-6, format=FP8_ROW, keep=(0,))
    x, gain = TensorType(BF16, (4, 256)), TensorType(BF16, (256,))
    results = op.results((x, gain))
    cost = op.cost((x, gain), results)
    assert cost.reads == (x.nbytes, gain.nbytes)
    assert cost.writes == (results[0].nbytes,)
    store = StoreTest(eps=1e-6)
    cache, index = TensorType(BF16, (1, 512, 256)), TensorType(I32, (4,))
    assert store.cost((cache, x, index, index), (cache,)).writes == (x.nbytes,)  # four rows, not the cache


# --- meaning ---

RULES = [Rule(op) for op in (GatedTest, ChainTest, NormQuantTest, StoreTest)]


CHOICES = ["gate", "gate", "mul", "add", "norm", "quantize", "soft", "normalize", "write", "silu"]


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Graphs of the ops that the test fusions contain, wired at random over one state and two inputs."""
    builder = Builder("random")
    x, y = (builder.input(n, TensorType(F32, (2, 32))) for n in "xy")
    cache = builder.state("cache", TensorType(F32, (1, 4, 32)))
    index, slots = (builder.input(n, TensorType(I32, (2,))) for n in ("index", "slots"))
    values = [x, y]
    quantized: list[Value] = []
    with builder:
        for _ in range(draw(st.integers(1, 16))):
            a, b = (draw(st.sampled_from(values)) for _ in range(2))
            match draw(st.sampled_from(CHOICES)):
                case "gate":
                    values.append(mul(silu(clamp(a, low=None, high=draw(st.sampled_from([1.0, 2.0])))), b))
                case "mul":
                    values.append(mul(a, b))
                case "add":
                    values.append(add(a, b))
                case "norm":
                    values.append(rms_norm(a, eps=draw(st.sampled_from([1e-5, 1e-6]))))
                case "quantize":
                    quantized.append(quantize(rms_norm(a, eps=1e-6), format=MXFP4))
                case "soft":
                    values.append(softmax(a, axis=-1))
                case "normalize":
                    values.append(normalize(softmax(a, axis=-1), axis=-2, eps=1e-6))
                case "silu":
                    values.append(silu(a))
                case "write":
                    cache = cache_write(cache, rms_norm(a, eps=1e-6), index, slots)
        if cache.node is None:
            cache = cache_write(cache, x, index, slots)
    outputs = draw(st.sets(st.sampled_from([*values[2:], *quantized, cache]), min_size=1))
    ordered = [v for v in [*values[2:], *quantized, cache] if v in outputs]
    return verify(builder.finish({v.name: v for v in ordered}))


def run(graph: Graph) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    given = {
        v.name: torch.randn(v.type.shape, generator=generator) for v in graph.inputs if v.type.dtype is F32
    }
    given |= {"index": torch.tensor([1, 3]).int(), "slots": torch.tensor([0, 0]).int()}
    states = {v.name: torch.zeros(v.type.shape) for v in graph.states}
    return {
        **interpret(graph, given, states, {}),
        **states,
    }


def parts(value: Any) -> list[torch.Tensor]:
    return list(value.parts) if isinstance(value, Quantized) else [value]


def commuted(graph: Graph) -> Graph:
    """The operands of sums and products in the order of their names, for a match may take them either way."""

    def visit(builder: Builder, node: Node, values: dict[Value, Value]) -> bool:
        if not node.op.commutative:
            return False
        operands = tuple(values[v] for v in sorted(node.inputs, key=lambda v: v.name))
        values.update(zip(node.outputs, builder.emit(node.op, operands, names=[node.name]), strict=True))
        return True

    return rewrite(graph, visit)


@settings(max_examples=120, deadline=None)
@given(graphs())
def test_random_graphs_keep_their_meaning(graph: Graph) -> None:
    new, report = fold(graph, RULES)
    verify(new)
    expected, found = run(graph), run(new)
    assert expected.keys() == found.keys()
    for name in expected:
        for a, b in zip(parts(expected[name]), parts(found[name]), strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name
    assert fold(new, RULES)[0] == new
    back = verify(expand(new))
    assert commuted(back) == commuted(graph)
    assert fold(back, RULES)[0] == new
    assert sum(report.counts.values()) == sum(isinstance(n.op, Fused) for n in new.nodes)


def test_a_fused_op_keeps_results_that_its_body_has() -> None:
    @fused
    class TwoResults(Fused):
        """Both signs of x."""

        literals = ("scale.factor",)
        example: ClassVar[Mapping[str, Any]] = {"x": "f32[2,4]"}

        def body(self, x: Value) -> tuple[Value, Value]:
            return scale(x, factor=1.0), scale(x, factor=-1.0)

    with Builder("two") as b:
        x = b.input("x", parse_type("f32[2,4]"))
        assert TwoResults(keep=(1,))(x).type == x.type
        with pytest.raises(GraphError, match="two_results keeps result 2, its body has 2"):
            TwoResults(keep=(2,))(x)
