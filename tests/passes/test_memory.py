"""Memory: values that may be alive together never share a byte, and the arena is small."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4c.buckets import Bucket
from dsv4c.config import Deployment, load_config
from dsv4c.ir.graph import Builder, Graph, Kind, Value
from dsv4c.ir.ops import add, cache_write, concat, reshape, scale, silu, slice_
from dsv4c.ir.verify import verify
from dsv4c.models.deepseek_v4 import build
from dsv4c.passes.memory import ALIGN, MemoryPlan, lay_out, plan_memory
from dsv4c.passes.quantize import quantize
from dsv4c.passes.recipes import recipe_named
from dsv4c.passes.schedule import Schedule, schedule
from dsv4c.types import F32, I32, TensorType


def vector(n: int) -> TensorType:
    return TensorType(F32, (n,))


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Elementwise ops, reshapes, slices, concatenations and state writes, wired at random."""
    with Builder("random") as b:
        values = [b.input("x", TensorType(F32, (4, 64))), b.param("w", TensorType(F32, (4, 64)))]
        caches = [b.state("cache", TensorType(F32, (1, 8, 64)))]
        index, slots = b.input("index", TensorType(I32, (4,))), b.input("slots", TensorType(I32, (4,)))
        for _ in range(draw(st.integers(1, 25))):
            kind = draw(st.sampled_from(["add", "silu", "reshape", "slice", "concat", "write", "read"]))
            x = draw(st.sampled_from(values))
            match kind:
                case "add":
                    same = [v for v in values if v.type == x.type]
                    values.append(add(x, draw(st.sampled_from(same))))
                case "silu":
                    values.append(silu(x))
                case "reshape":
                    n, m = x.type.shape
                    values.append(reshape(x, shape=(m, n) if draw(st.booleans()) else (n, m)))
                case "slice" if x.type.shape[0] > 1:
                    values.append(slice_(x, axis=0, start=0, stop=x.type.shape[0] // 2))
                case "concat":
                    values.append(concat(x, x, axis=0))
                case "write" if x.type.shape == (4, 64):
                    caches.append(cache_write(caches[-1], x, index, slots))
                case "read":
                    values.append(reshape(caches[-1], shape=(8, 64)))
        outputs = draw(st.lists(st.sampled_from(values), min_size=1, max_size=3, unique=True))
        final = scale(outputs[0], factor=2.0)
    return b.finish({"out": final, **{f"out{i}": v for i, v in enumerate(outputs)}})


def touchers(order: Schedule, value: Value) -> list[int]:
    """Launches that make or read a value or one of its views, found by looking at every node."""
    return [
        i
        for i, nodes in enumerate(order.launches)
        if any(value in n.outputs or any(order.owner(v) is value for v in n.inputs) for n in nodes)
    ]


def check_disjoint(graph: Graph, order: Schedule, memory: MemoryPlan) -> None:
    """Every two values: apart in memory, or all launches that touch one come before the other is made."""
    kept = {order.owner(v) for v in graph.outputs.values()}
    owners = [v for nodes in order.launches for n in nodes for v in n.outputs if order.owner(v) is v]
    touched = {v: touchers(order, v) for v in owners}

    def precedes(a: Value, b: Value) -> bool:
        return a not in kept and max(touched[a]) < min(touched[b])

    for i, a in enumerate(owners):
        start = memory.offsets[a]
        assert start % ALIGN == 0
        assert start + a.type.extent <= memory.bytes
        for b in owners[i + 1 :]:
            apart = start + a.type.extent <= memory.offsets[b] or memory.offsets[b] + b.type.extent <= start
            assert apart or precedes(a, b) or precedes(b, a), f"{a} and {b} share bytes"


@given(graphs())
@settings(max_examples=150, deadline=None)
def test_values_alive_together_never_share_bytes(graph: Graph) -> None:
    order = schedule(graph)
    memory = plan_memory(graph, order)
    check_disjoint(graph, order, memory)
    assert memory.lower_bound <= memory.bytes
    for view, owner in order.views.items():
        if owner.kind is Kind.RESULT:
            assert memory.offsets[view] == memory.offsets[owner]


@given(graphs())
@settings(max_examples=150, deadline=None)
def test_launches_are_all_nodes_but_views_in_the_order_of_the_graph(graph: Graph) -> None:
    order = schedule(graph)
    assert [n for (n,) in order.launches] == [
        n for n in graph.nodes if n.outputs[0] not in order.views or n.op.alias
    ]


def test_a_reshaped_state_is_copied_and_a_reshaped_result_is_not() -> None:
    with Builder("g") as b:
        x, index = b.input("x", TensorType(F32, (2, 4))), b.input("index", TensorType(I32, (2,)))
        slots = b.input("slots", TensorType(I32, (2,)))
        cache = b.state("cache", TensorType(F32, (1, 4, 4)))
        before = reshape(cache, shape=(16,))
        row = reshape(silu(x), shape=(8,))
        written = cache_write(cache, x, index, slots)
    graph = verify(b.finish({"before": before, "row": row, "written": written}))
    order = schedule(graph)
    assert [n.op.name for (n,) in order.launches] == ["reshape", "silu", "cache_write"]
    memory = plan_memory(graph, order)
    assert memory.offsets[row] == memory.offsets[row.node.inputs[0]]
    assert written not in memory.offsets


def test_an_operand_is_alive_while_it_is_read() -> None:
    """A result never takes the bytes of an operand of its own launch, not even of one that dies there."""
    with Builder("g") as b:
        x = b.input("x", vector(64))
        left, right = scale(silu(x), factor=1.0), scale(silu(x), factor=2.0)
        out = add(left, right)
    graph = b.finish({"out": out})
    memory = plan_memory(graph, schedule(graph))
    assert memory.bytes == memory.lower_bound == 3 * ALIGN
    assert len({memory.offsets[v] for v in (left, right, out)}) == 3


def test_blocks_are_laid_out_one_after_the_other() -> None:
    offsets, end = lay_out({"a": vector(1), "b": vector(100), "c": vector(64)})
    assert offsets == {"a": 0, "b": 256, "c": 768}
    assert end == 1024


@pytest.mark.parametrize("name", ["deepseek-v4-flash", "deepseek-v4-pro"])
@pytest.mark.parametrize("bucket", Deployment().buckets, ids=lambda bucket: bucket.name)
def test_the_full_models_fit_closely(name: str, bucket: Bucket) -> None:
    recipe = recipe_named("official")
    graph = quantize(build(load_config(name), Deployment(), bucket, recipe.activation), recipe)
    memory = plan_memory(graph, schedule(graph))
    assert memory.bytes == memory.lower_bound
