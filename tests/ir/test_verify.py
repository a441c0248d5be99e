"""The verifier: one broken graph for every rule, and the message it gets."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dsv4c.buckets import bucket_named
from dsv4c.config import load_config
from dsv4c.errors import GraphError
from dsv4c.ir.graph import Builder, Graph, Kind, Node, Value
from dsv4c.ir.op import Op
from dsv4c.ir.ops import add, cache_write, gather, silu
from dsv4c.ir.ops.math import Add, Silu
from dsv4c.ir.ops.state import Advance, CacheWrite
from dsv4c.ir.verify import RULES, verify
from dsv4c.models.deepseek_v4 import build
from dsv4c.types import BF16, F32, I32, TensorType
from tests.interpreted import deployment_of

X = TensorType(BF16, (2, 4))
CACHE, INDEX = TensorType(BF16, (1, 8, 4)), TensorType(I32, (2,))


def node(op: Op, inputs: list[Value], *results: tuple[str, TensorType]) -> Node:
    made = Node(op, tuple(inputs), "")
    made.outputs = tuple(Value(n, t, Kind.RESULT, made, i) for i, (n, t) in enumerate(results))
    return made


def graph(
    nodes: list[Node],
    inputs: list[Value] | None = None,
    states: list[Value] | None = None,
    params: list[Value] | None = None,
    outputs: dict[str, Value] | None = None,
) -> Graph:
    return Graph("g", inputs or [], states or [], params or [], nodes, outputs or {})


def wrong_list() -> Graph:
    return graph([], inputs=[Value("x", X, Kind.PARAM)])


def a_result_declared() -> Graph:
    made = node(Silu(), [Value("x", X, Kind.INPUT)], ("y", X))
    return graph([], inputs=[made.outputs[0]])


def twice() -> Graph:
    x = Value("x", X, Kind.INPUT)
    return graph([node(Silu(), [x], ("x", X))], [x])


def undefined() -> Graph:
    x = Value("x", X, Kind.INPUT)
    late = node(Silu(), [x], ("late", X))
    return graph([node(Silu(), list(late.outputs), ("y", X)), late], [x])


def undefined_output() -> Graph:
    return graph([], outputs={"y": Value("y", X, Kind.INPUT)})


def undeclared() -> Graph:
    class Strange(Silu):
        name = "strange"

    x = Value("x", X, Kind.INPUT)
    return graph([node(Strange(), [x], ("y", X))], [x])


def wrong_type() -> Graph:
    x = Value("x", X, Kind.INPUT)
    return graph([node(Silu(), [x], ("y", TensorType(F32, (2, 4))))], [x])


def refused_type() -> Graph:
    x, y = Value("x", X, Kind.INPUT), Value("y", TensorType(BF16, (3,)), Kind.INPUT)
    return graph([node(Add(), [x, y], ("z", X))], [x, y])


def write_to_input() -> Graph:
    start, lengths = Value("start", INDEX, Kind.INPUT), Value("lengths", INDEX, Kind.INPUT)
    slots = Value("slots", INDEX, Kind.INPUT)
    return graph([node(Advance(), [start, slots, lengths], ("next", INDEX))], [start, slots, lengths])


def write_and_read_twice() -> Graph:
    start = Value("start", INDEX, Kind.STATE)
    return graph([node(Advance(), [start, start, start], ("next", INDEX))], states=[start])


def read_after_write() -> Graph:
    with Builder("g") as b:
        cache, rows = b.state("cache", CACHE), b.input("rows", X)
        index, slots = b.input("index", INDEX), b.input("slots", INDEX)
        places = b.input("places", TensorType(I32, (2, 1)))
        cache_write(cache, rows, index, slots, name="written")
        kept = gather(cache, places, slots, name="kept")
    return b.finish({"kept": kept})


def returned_after_write() -> Graph:
    with Builder("g") as b:
        cache = b.state("cache", CACHE)
        cache_write(
            cache, b.input("rows", X), b.input("index", INDEX), b.input("slots", INDEX), name="written"
        )
    return b.finish({"cache": cache})


def unused() -> Graph:
    with Builder("g") as b:
        y = silu(b.input("x", X))
        b.param("layers.0.forgotten", X)
    return b.finish({"y": y})


BROKEN = {
    wrong_list: ("kinds match their lists", "%x is listed as input but is a param"),
    a_result_declared: ("kinds match their lists", "%y is listed as input but is a result"),
    twice: ("names are unique", "%x is defined twice"),
    undefined: ("operands are defined before use", "y: operand %late is not defined before it"),
    undefined_output: ("operands are defined before use", "output y: %y is not defined"),
    undeclared: ("ops are declared", "y: op 'strange' is not declared"),
    wrong_type: ("types follow the rules", "y: silu gives bf16[2,4], the graph says f32[2,4]"),
    refused_type: ("types follow the rules", "z: add: bf16[2,4] and bf16[3] do not broadcast"),
    write_to_input: ("writes go to state", "next: advance overwrites %start, a input, not a state"),
    write_and_read_twice: (
        "an aliased operand is read once",
        "next: %start is overwritten and also another operand",
    ),
    read_after_write: ("overwritten values are not read", "kept: reads %cache after written overwrote it"),
    returned_after_write: (
        "overwritten values are not read",
        "output cache: %cache was overwritten by written",
    ),
    unused: ("declared values are used", "param %layers.0.forgotten is never used"),
}


@pytest.mark.parametrize("make", BROKEN, ids=lambda make: make.__name__)
def test_broken(make: Callable[[], Graph]) -> None:
    rule, message = BROKEN[make]
    with pytest.raises(GraphError) as error:
        verify(make())
    assert str(error.value) == f"graph g: {rule} does not hold:\n  {message}"


def test_an_alias_that_changes_its_type() -> None:
    """No op's rule allows it, so the rule is asked directly."""
    from dsv4c.ir.verify import aliases_keep_their_type

    cache, rows = Value("c", CACHE, Kind.STATE), Value("r", X, Kind.INPUT)
    index, slots = Value("i", INDEX, Kind.INPUT), Value("s", INDEX, Kind.INPUT)
    broken = node(CacheWrite(), [cache, rows, index, slots], ("w", TensorType(BF16, (1, 9, 4))))
    assert list(aliases_keep_their_type(graph([broken], [rows, index, slots], [cache]))) == [
        "w: overwrites %c: bf16[1,8,4] with bf16[1,9,4]"
    ]


def test_every_rule_is_broken_by_some_graph() -> None:
    broken = {rule for rule, _ in BROKEN.values()} | {"aliases keep their type"}
    assert {rule.__name__.replace("_", " ") for rule in RULES} == broken


def test_ten_violations_are_shown() -> None:
    x = Value("x", X, Kind.INPUT)
    nodes = [node(Silu(), [x], (f"y{i}", TensorType(F32, (2, 4)))) for i in range(13)]
    with pytest.raises(GraphError) as error:
        verify(graph(nodes, [x]))
    lines = str(error.value).splitlines()
    assert len(lines) == 12
    assert lines[-1] == "  and 3 more"


def test_a_sound_graph_comes_back() -> None:
    with Builder("g") as b:
        cache, rows = b.state("cache", CACHE), b.input("rows", X)
        index, slots = b.input("index", INDEX), b.input("slots", INDEX)
        places = b.input("places", TensorType(I32, (2, 1)))
        before = gather(cache, places, slots, name="before")
        written = cache_write(cache, rows, index, slots)
        after = gather(written, places, slots, name="after")
        z = add(before, after)
    sound = b.finish({"z": z})
    assert verify(sound) is sound


@pytest.mark.parametrize(
    "bucket", ["decode-3", "verify-2x4", "prefill-8.last", "prefill-64", "draft-2x3", "round-2x3"]
)
def test_models_are_sound(bucket: str) -> None:
    asked = bucket_named(bucket)
    model = build(load_config("tiny"), deployment_of(asked, slots=3), asked)
    assert verify(model) is model
