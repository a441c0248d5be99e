"""Tidy and prepack: what goes, what stays, and what moves to load time."""

from __future__ import annotations

from dsv4c.ir.graph import Builder, Graph
from dsv4c.ir.ops import add, cache_write, cast, gather, mul, reshape, rope_frequencies, scale, silu
from dsv4c.ir.verify import verify
from dsv4c.passes.prepack import prepack
from dsv4c.passes.tidy import drop_dead, merge_equal, tidy
from dsv4c.types import BF16, F32, I32, TensorType

X = TensorType(F32, (2, 8))
CACHE = TensorType(F32, (1, 4, 8))


def ops(graph: Graph) -> list[str]:
    return [n.op.name for n in graph.nodes]


def test_equal_nodes_become_one_through_chains() -> None:
    b = Builder("g")
    x = b.input("x", X)
    with b:
        left, right = (mul(silu(scale(x, factor=2.0)), x) for _ in range(2))
        other = mul(silu(scale(x, factor=3.0)), x)
        graph = b.finish({"y": add(add(left, right), other), "z": right})
    new = verify(merge_equal(graph))
    assert ops(new).count("mul") == 2
    assert [v.name for v in new.outputs.values()] == ["add_2", "mul"]
    assert tidy(new) is new


def test_writes_are_never_merged_and_never_dead() -> None:
    b = Builder("g")
    x, cache = b.input("x", X), b.state("c", CACHE)
    index, slots = b.input("i", TensorType(I32, (2,))), b.input("s", TensorType(I32, (2,)))
    with b:
        once = cache_write(cache, x, index, slots)
        twice = cache_write(once, x, index, slots)
        silu(x)  # nobody reads it
        graph = b.finish({"x": scale(x, factor=2.0)})
    new = verify(tidy(graph))
    assert ops(new) == ["cache_write", "cache_write", "scale"]
    assert new.finals[new.states[0]].name == twice.name


def test_reads_on_either_side_of_a_write_stay_two() -> None:
    b = Builder("g")
    x, cache = b.input("x", X), b.state("c", CACHE)
    index, rows = b.input("i", TensorType(I32, (2,))), b.input("r", TensorType(I32, (2, 2)))
    slots = b.input("s", TensorType(I32, (2,)))
    with b:
        before = gather(cache, rows, slots)
        after = gather(cache_write(cache, x, index, slots), rows, slots)
        graph = verify(b.finish({"before": before, "after": after}))
    assert tidy(graph) is graph


def test_dead_nodes_take_their_params_and_states_along_but_no_inputs() -> None:
    b = Builder("g")
    x = b.input("x", X)
    b.input("unread", X)
    weight, dead_weight = b.param("w", X), b.param("dead", X)
    state, rows = b.state("s", CACHE), b.input("r", TensorType(I32, (2, 2)))
    slots = b.input("slots", TensorType(I32, (2,)))
    with b:
        mul(
            add(x, dead_weight),
            reshape(gather(state, rows, slots), shape=(4, 8)).node.inputs[0].node.inputs[0] and x,
        )
        graph = b.finish({"y": mul(x, weight)})
    new = verify(drop_dead(graph))
    assert ops(new) == ["mul"]
    assert [v.name for v in new.params] == ["w"]
    assert new.states == ()
    assert [v.name for v in new.inputs] == ["x", "unread", "r", "slots"]


def test_what_depends_on_weights_alone_moves_to_load_time() -> None:
    b = Builder("g")
    x, weight, both = b.input("x", X), b.param("w", X), b.param("b", X)
    with b:
        packed = cast(scale(weight, factor=2.0), to=BF16)
        frequencies = rope_frequencies(
            theta=1e4, dims=16, factor=1.0, original_max_position=1, beta_fast=1.0, beta_slow=1.0
        )
        y = add(mul(x, cast(packed, to=F32)), mul(frequencies, both))
        graph = verify(b.finish({"y": y}))
    main, load = prepack(graph)
    assert load is not None
    verify(main)
    verify(load)
    assert ops(main) == ["mul", "add"]
    assert [v.name for v in main.params] == ["cast_2", "mul_2"]
    assert ops(load) == ["scale", "cast", "rope_frequencies", "cast", "mul"]
    assert list(load.outputs) == ["cast_2", "mul_2"]
    assert [v.name for v in load.params] == ["w", "b"]
    assert load.inputs == load.states == ()
    again, nothing = prepack(main)
    assert nothing is None
    assert again is main


def test_a_returned_weight_is_still_computed() -> None:
    b = Builder("g")
    weight = b.param("w", X)
    with b:
        graph = b.finish({"y": scale(silu(weight), factor=2.0)})
    assert prepack(graph) == (graph, None)
