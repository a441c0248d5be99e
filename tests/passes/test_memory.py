"""Launch order and memory: values that may be alive together never share a byte, and the arena is small."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4c.buckets import Bucket
from dsv4c.config import Deployment, load_config
from dsv4c.errors import GraphError
from dsv4c.ir.graph import Builder, Graph, Kind, Node, Value
from dsv4c.ir.ops import add, cache_write, concat, linear, mul, reshape, scale, silu, slice_
from dsv4c.ir.verify import verify
from dsv4c.models.deepseek_v4 import build
from dsv4c.passes.memory import ALIGN, MemoryPlan, lay_out, plan_memory
from dsv4c.passes.quantize import quantize
from dsv4c.passes.recipes import recipe_named
from dsv4c.passes.schedule import Schedule, peak_bytes, schedule
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


def touchers(graph: Graph, plan: Schedule, value: Value) -> list[int]:
    """Launches that make or read a value or one of its views, found by looking at every node."""
    return [
        i
        for i, node in enumerate(plan.nodes)
        if value in node.outputs or any(plan.owner(v) is value for v in node.inputs)
    ]


def reachable(plan: Schedule) -> list[set[int]]:
    """For every launch, all launches that come before it."""
    before: list[set[int]] = []
    for waits in plan.after:
        before.append(set(waits).union(*(before[w] for w in waits)))
    return before


def check_disjoint(graph: Graph, plan: Schedule, memory: MemoryPlan, parallel: bool) -> None:
    """Every two values: apart in memory, or all touchers of one before the maker of the other."""
    before = reachable(plan) if parallel else [set(range(i)) for i in range(len(plan.nodes))]
    kept = {plan.owner(v) for v in graph.outputs.values()}
    owners = [v for node in plan.nodes for v in node.outputs if plan.owner(v) is v]
    touched = {v: touchers(graph, plan, v) for v in owners}

    def precedes(a: Value, b: Value) -> bool:
        return a not in kept and all(t in before[touched[b][0]] for t in touched[a])

    for i, a in enumerate(owners):
        start = memory.offsets[a]
        assert start % ALIGN == 0
        assert start + a.type.extent <= memory.bytes
        for b in owners[i + 1 :]:
            apart = start + a.type.extent <= memory.offsets[b] or memory.offsets[b] + b.type.extent <= start
            assert apart or precedes(a, b) or precedes(b, a), f"{a} and {b} share bytes"


@given(graphs(), st.booleans(), st.sampled_from(["source", "memory"]))
@settings(max_examples=150, deadline=None)
def test_values_alive_together_never_share_bytes(graph: Graph, parallel: bool, order: str) -> None:
    plan = schedule(graph, order)
    memory = plan_memory(graph, plan, parallel=parallel)
    check_disjoint(graph, plan, memory, parallel)
    assert memory.lower_bound <= memory.bytes
    for view, owner in plan.views.items():
        if owner.kind is Kind.RESULT:
            assert memory.offsets[view] == memory.offsets[owner]


@given(graphs(), st.sampled_from(["source", "memory"]))
@settings(max_examples=150, deadline=None)
def test_every_order_keeps_all_dependences(graph: Graph, order: str) -> None:
    plan = schedule(graph, order)
    assert sorted(n.name for n in plan.nodes) == sorted(
        n.name for n in graph.nodes if n.outputs[0] not in plan.views or n.op.alias
    )
    place = {node: i for i, node in enumerate(plan.nodes)}
    before = reachable(plan)

    def waits(later: Node, earlier: Node) -> bool:
        return place[earlier] in before[place[later]]

    source = [n for n in graph.nodes if n in place]
    for i, later in enumerate(source):
        writes = {plan.owner(later.inputs[o]) for o in later.op.alias.values()}
        reads = {plan.owner(v) for v in later.inputs}
        for earlier in source[:i]:
            earlier_writes = {plan.owner(earlier.inputs[o]) for o in earlier.op.alias.values()}
            earlier_reads = {plan.owner(v) for v in earlier.inputs}
            if reads & (set(earlier.outputs) | earlier_writes) or writes & earlier_reads:
                assert waits(later, earlier), f"{later} does not wait for {earlier}"


@given(graphs())
@settings(max_examples=100, deadline=None)
def test_waits_are_direct_and_the_thrifty_order_never_needs_more(graph: Graph) -> None:
    plan = schedule(graph)
    before = reachable(plan)
    for waits in plan.after:
        assert all(not any(w in before[o] for o in waits) for w in waits), "a wait that another implies"
    thrifty = schedule(graph, "memory")
    assert peak_bytes(graph, thrifty.nodes, thrifty.views) <= peak_bytes(graph, plan.nodes, plan.views)


def test_a_reshaped_state_is_copied_and_a_reshaped_result_is_not():
    with Builder("g") as b:
        x, index = b.input("x", TensorType(F32, (2, 4))), b.input("index", TensorType(I32, (2,)))
        slots = b.input("slots", TensorType(I32, (2,)))
        cache = b.state("cache", TensorType(F32, (1, 4, 4)))
        before = reshape(cache, shape=(16,))
        row = reshape(silu(x), shape=(8,))
        written = cache_write(cache, x, index, slots)
    graph = verify(b.finish({"before": before, "row": row, "written": written}))
    plan = schedule(graph)
    assert [n.op.name for n in plan.nodes] == ["reshape", "silu", "cache_write"]
    assert plan.after[2] == (0,)  # the copy is made before the state changes
    memory = plan_memory(graph, plan)
    assert memory.offsets[row] == memory.offsets[row.node.inputs[0]]
    assert written not in memory.offsets


def test_parallel_branches_do_not_share_bytes():
    with Builder("g") as b:
        x = b.input("x", vector(64))
        left, right = scale(silu(x), factor=1.0), scale(silu(x), factor=2.0)
        out = add(left, right)
    graph = b.finish({"out": out})
    plan = schedule(graph)
    assert plan_memory(graph, plan).bytes == 3 * ALIGN  # two alive, and the result of the op that reads them
    branches = [v for n in graph.nodes[:4] for v in n.outputs]
    offsets = plan_memory(graph, plan, parallel=True).offsets
    for a in (branches[0], branches[1]):
        for c in (branches[2], branches[3]):
            assert offsets[a] != offsets[c]


def test_the_memory_order_frees_before_it_makes():
    with Builder("g") as b:
        x, w = b.input("x", TensorType(F32, (1, 4))), b.param("w", TensorType(F32, (4096, 4)))
        wide = [linear(x, w, out=F32) for _ in range(4)]
        narrow = [slice_(v, axis=1, start=0, stop=4) for v in wide]
        out = mul(mul(narrow[0], narrow[1]), mul(narrow[2], narrow[3]))
    graph = b.finish({"out": out})
    source, thrifty = (plan_memory(graph, schedule(graph, order)).bytes for order in ("source", "memory"))
    assert source >= 4 * 4096 * 4
    assert thrifty < 2 * 4096 * 4


def test_an_unknown_order_is_refused():
    with Builder("g") as b:
        out = silu(b.input("x", vector(4)))
    with pytest.raises(GraphError, match="unknown order 'fast'"):
        schedule(b.finish({"out": out}), "fast")  # type: ignore[arg-type]


def test_blocks_are_laid_out_one_after_the_other():
    offsets, end = lay_out({"a": vector(1), "b": vector(100), "c": vector(64)})
    assert offsets == {"a": 0, "b": 256, "c": 768}
    assert end == 1024


@pytest.mark.parametrize("name", ["deepseek-v4-flash", "deepseek-v4-pro"])
@pytest.mark.parametrize("bucket", Deployment().buckets, ids=lambda bucket: bucket.name)
def test_the_full_models_fit_closely(name: str, bucket: Bucket) -> None:
    recipe = recipe_named("official")
    graph = quantize(build(load_config(name), Deployment(), bucket, recipe.activation), recipe)
    memory = plan_memory(graph, schedule(graph))
    assert memory.bytes <= 1.15 * memory.lower_bound
