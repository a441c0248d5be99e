"""Graphs: building, names, scopes, state chains, structural equality, rewriting."""

from __future__ import annotations

import pytest

from dsv4c.errors import GraphError
from dsv4c.ir.graph import Builder, Graph, Kind, Node, Value, current_builder, rewrite
from dsv4c.ir.ops import add, cache_write, gather, reshape, rms_norm, scale, silu, sink_softmax
from dsv4c.ir.ops.math import Scale, Silu
from dsv4c.types import BF16, F32, I32, TensorType

X = TensorType(BF16, (2, 4))


def small(factor: float = 2.0, name: str = "y", label: str = "out", gain: str = "gain") -> Graph:
    with Builder("small") as b:
        x = b.input("x", X)
        y = rms_norm(x, b.param(gain, TensorType(BF16, (4,))), eps=1e-6, name="normed")
        with b.scope("inner"):
            y = scale(y, factor=factor, name=name)
    return b.finish({label: y})


def test_values_and_nodes() -> None:
    graph = small()
    assert [v.name for v in graph.values()] == ["x", "gain", "normed", "inner.y"]
    assert [v.kind for v in graph.values()] == [Kind.INPUT, Kind.PARAM, Kind.RESULT, Kind.RESULT]
    normed, scaled = graph.nodes
    assert (scaled.name, scaled.scope, scaled.provenance) == ("inner.y", "inner", ("inner.y",))
    assert scaled.inputs == normed.outputs
    assert graph.by_name["normed"].node is normed
    assert repr(graph) == "<graph small: 2 nodes, 1 params, 0 states>"
    assert repr(scaled) == "%inner.y = scale(...)"
    assert repr(graph.by_name["x"]) == "%x: bf16[2,4]"


def test_users_are_listed_once_per_node() -> None:
    with Builder("g") as b:
        x = b.input("x", X)
        y = add(x, x)
        z = add(y, x)
    graph = b.finish({"z": z})
    assert graph.users[x] == [y.node, z.node]
    assert graph.users[z] == []


def test_names_are_made_unique_below_their_scope() -> None:
    with Builder("g") as b:
        x = b.input("x", X)
        with b.scope("layers.0"), b.scope("attn"):
            values = [silu(x), silu(x), silu(x, name="q"), silu(x, name="q")]
        outside = silu(x)
        with b.scope("heads"):
            p, denominator = sink_softmax(
                b.input("s", TensorType(F32, (1, 2, 3))),
                b.param("sink", TensorType(F32, (2,))),
                out=BF16,
                name="p",
            )
    names = [v.name for v in (*values, outside, p, denominator)]
    assert names == [
        "layers.0.attn.silu",
        "layers.0.attn.silu_2",
        "layers.0.attn.q",
        "layers.0.attn.q_2",
        "silu",
        "heads.p",
        "heads.p.1",
    ]
    assert (p.index, denominator.index) == (0, 1)


def test_a_fresh_name_skips_taken_ones() -> None:
    b = Builder("g")
    for name in ("y", "y_2", "y_3"):
        b.input(name, X)
    assert b.fresh("y") == "y_4"
    assert b.fresh("z") == "z"


def test_a_result_gets_another_name() -> None:
    with Builder("g") as b, b.scope("layers.0"):
        x = b.input("x", X)
        y, z = silu(x, name="sum"), silu(x, name="out")
        b.rename(y, "out")
    assert (y.name, z.name) == ("layers.0.out_2", "layers.0.out")
    assert b.fresh("layers.0.sum") == "layers.0.sum"  # free again


def test_a_name_is_taken_once() -> None:
    b = Builder("g")
    b.input("x", X)
    with pytest.raises(GraphError, match="the name %x is already taken in graph g"):
        b.param("x", X)


def test_a_refused_op_names_the_place() -> None:
    with Builder("g") as b, b.scope("layers.0.attn"):
        x, y = b.input("x", X), b.input("y", TensorType(BF16, (3,)))
        with pytest.raises(GraphError) as error:
            add(x, y, name="sum")
    assert str(error.value) == (
        "at layers.0.attn.sum: add(%x: bf16[2,4], %y: bf16[3]): bf16[2,4] and bf16[3] do not broadcast"
    )


def test_builders_nest() -> None:
    with Builder("outer") as outer:
        with Builder("inner") as inner:
            assert current_builder() is inner
        assert current_builder() is outer
    with pytest.raises(GraphError, match="no graph is being built"):
        current_builder()


def test_the_scope_closes_after_an_error() -> None:
    with Builder("g") as b:
        x = b.input("x", X)
        with pytest.raises(RuntimeError), b.scope("lost"):
            raise RuntimeError
        assert silu(x).name == "silu"


# --- equality ---


def test_equality_ignores_names_of_results() -> None:
    assert small(name="y") == small(name="z")
    assert hash(small(name="y")) == hash(small(name="z"))
    assert small() != "small"


@pytest.mark.parametrize("other", [{"factor": 3.0}, {"label": "result"}, {"gain": "weight"}])
def test_equality_sees(other: dict[str, object]) -> None:
    assert small() != small(**other)  # type: ignore[arg-type]


def test_equality_sees_wiring() -> None:
    def graph(swap: bool) -> Graph:
        with Builder("g") as b:
            x, y = b.input("x", X), b.input("y", X)
            z = add(y, x) if swap else add(x, y)
        return b.finish({"z": z})

    assert graph(False) != graph(True)


def branches(order: str, crossed: bool = False, dead: str = "") -> Graph:
    """Two chains that meet, a state that one reads and then the other writes, nodes emitted in `order`."""
    with Builder("g") as b:
        x, index = b.input("x", X), b.input("index", TensorType(I32, (2,)))
        slots = b.input("slots", TensorType(I32, (2,)))
        cache = b.state("cache", TensorType(BF16, (1, 8, 4)))
        made: dict[str, Value] = {"x": x}
        steps = {
            "a": lambda: silu(x),
            "A": lambda: scale(made["b" if crossed else "a"], factor=2.0),
            "b": lambda: silu(x),
            "B": lambda: scale(made["b"], factor=3.0),
            "r": lambda: gather(cache, reshape(index, shape=(2, 1)), slots),
            "w": lambda: cache_write(cache, made["B"], index, slots),
            "d": lambda: silu(made["A"]),
            "D": lambda: scale(made["A"], factor=5.0),
        }
        for step in order + dead:
            made[step] = steps[step]()
    return b.finish({"A": made["A"], "B": made["B"], "r": made["r"]})


def test_equality_ignores_the_order_that_no_operand_tells() -> None:
    orders = ["aAbBrw", "bBaArw", "abABrw", "rbBwaA"]
    assert {branches(order) for order in orders} == {branches("aAbBrw")}
    assert branches("abABrw", crossed=True) != branches("abABrw")  # equal nodes, another wiring
    assert branches("abABrw", dead="d") != branches("abABrw")
    assert branches("abABrw", dead="d") != branches("abABrw", dead="D")


def test_equality_sees_a_write_that_no_output_shows() -> None:
    assert branches("aAbBr") != branches("aAbBrw")


def test_equality_sees_types_of_declarations() -> None:
    def graph(dtype: object) -> Graph:
        b = Builder("g")
        x = b.input("x", TensorType(dtype, (2,)))  # type: ignore[arg-type]
        return b.finish({"x": x})

    assert graph(F32) != graph(BF16)


# --- state ---


def stateful(writes: int) -> tuple[Graph, list[Value]]:
    with Builder("g") as b:
        cache = b.state("cache", TensorType(BF16, (1, 8, 4)))
        rows, index = b.input("rows", X), b.input("index", TensorType(I32, (2,)))
        slots = b.input("slots", TensorType(I32, (2,)))
        chain = [cache]
        for _ in range(writes):
            chain.append(cache_write(chain[-1], rows, index, slots, name="written"))
        b.state("other", TensorType(BF16, (1,)))
    return b.finish({"cache": chain[-1]}), chain


def test_every_write_belongs_to_its_state() -> None:
    graph, chain = stateful(3)
    assert {graph.root_of[v] for v in chain} == {chain[0]}
    assert graph.finals[chain[0]] is chain[-1]
    other = graph.by_name["other"]
    assert graph.finals[other] is other


def test_a_state_that_nothing_writes_is_its_own_end() -> None:
    graph, (cache,) = stateful(0)
    assert graph.finals[cache] is cache


# --- rewriting ---


def test_like_declares_the_same_signature() -> None:
    graph, _ = stateful(1)
    builder, values = Builder.like(graph)
    assert [(v.name, v.type, v.kind) for v in values.values()] == [
        (v.name, v.type, v.kind) for v in (*graph.inputs, *graph.states, *graph.params)
    ]
    assert builder.name == graph.name


def test_a_rewrite_that_touches_nothing_is_a_copy() -> None:
    graph = small()
    copy = rewrite(graph, lambda builder, node, values: False)
    assert copy == graph
    assert copy is not graph
    assert [n.name for n in copy.nodes] == [n.name for n in graph.nodes]
    assert [n.scope for n in copy.nodes] == ["", "inner"]


def test_a_rewrite_replaces_nodes_and_keeps_the_rest() -> None:
    def visit(builder: Builder, node: Node, values: dict[Value, Value]) -> bool:
        if not isinstance(node.op, Scale):
            return False
        made = builder.emit(
            Silu(), (values[node.inputs[0]],), names=[node.name], scope=node.scope, origin=node.provenance
        )
        values[node.outputs[0]] = made[0]
        return True

    graph = rewrite(small(), visit, name="after")
    assert (graph.name, [n.op.name for n in graph.nodes]) == ("after", ["rms_norm", "silu"])
    assert graph.nodes[1].origin == ("inner.y",)
    assert graph.outputs["out"] is graph.nodes[1].outputs[0]


def test_a_copy_keeps_provenance() -> None:
    with Builder("g") as b:
        x = b.input("x", X)
        (y,) = b.emit(Silu(), (x,), names=["y"], scope="s", origin=("a", "b"))
    again = rewrite(b.finish({"y": y}), lambda *_: False)
    assert again.nodes[0].provenance == ("a", "b")
    assert again.nodes[0].scope == "s"
