"""Nodes that share a launch: in an order that keeps every wait, with nothing in between."""

from __future__ import annotations

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4c.buckets import Bucket
from dsv4c.codegen.select import Kernels
from dsv4c.ir.graph import Builder, Graph, Node
from dsv4c.ir.ops import add, cache_write, reshape, scale, silu
from dsv4c.passes import schedule as scheduling
from dsv4c.passes.memory import plan_memory
from dsv4c.passes.schedule import Group, Schedule, schedule
from dsv4c.types import F32, I32, TensorType
from tests.passes.fusions.cases import folded

APART = (Group(("silu", "add")), Group(("scale", "cache_write")))
CHAINED = (Group(("scale", "silu", "add"), chained=True),)
KINDS = (APART, CHAINED, (*APART, *CHAINED), (*CHAINED, *APART))


@st.composite
def layered(draw: st.DrawFn) -> Graph:
    """Two layers of elementwise ops and state writes, wired at random."""
    with Builder("random") as b:
        values = [b.input("x", TensorType(F32, (4, 8)))]
        caches = [b.state("cache", TensorType(F32, (1, 4, 8)))]
        index, slots = b.input("index", TensorType(I32, (4,))), b.input("slots", TensorType(I32, (4,)))
        for layer in range(2):
            with b.scope(f"layers.{layer}"):
                for _ in range(draw(st.integers(1, 14))):
                    kind = draw(st.sampled_from(["add", "silu", "scale", "write", "read", "scale"]))
                    x = draw(st.sampled_from(values[-6:]))
                    match kind:
                        case "add":
                            values.append(add(x, draw(st.sampled_from(values))))
                        case "silu":
                            values.append(silu(x))
                        case "scale":
                            values.append(scale(x, factor=0.5))
                        case "write":
                            caches.append(cache_write(caches[-1], x, index, slots))
                        case "read":
                            values.append(reshape(caches[-1], shape=(4, 8)))
        out = silu(values[-1])
    return b.finish({"out": out})


def waits_of(graph: Graph, order: Schedule) -> dict[Node, set[Node]]:
    """For every node of a launch, all nodes that have to run before it, found pair by pair."""
    nodes = [n for n in graph.nodes if n.outputs[0] not in order.views or n.op.alias]
    known: dict[Node, set[Node]] = {}
    for i, later in enumerate(nodes):
        reads = {order.owner(v) for v in later.inputs}
        writes = {order.owner(later.inputs[o]) for o in later.op.alias.values()}
        direct = {
            earlier
            for earlier in nodes[:i]
            if reads & {order.owner(v) for v in earlier.outputs}
            or writes & {order.owner(v) for v in earlier.inputs}
        }
        known[later] = direct.union(*(known[n] for n in direct))
    return known


@given(layered(), st.sampled_from(KINDS))
@settings(max_examples=300, deadline=None)
def test_shared_launches_are_of_one_group_and_keep_every_wait(
    graph: Graph, groups: tuple[Group, ...]
) -> None:
    order = schedule(graph, groups)
    waits = waits_of(graph, order)
    assert sorted(n.name for nodes in order.launches for n in nodes) == sorted(n.name for n in waits)
    place = {n: (i, j) for i, nodes in enumerate(order.launches) for j, n in enumerate(nodes)}
    assert all(place[earlier] < place[later] for later in waits for earlier in waits[later])
    for nodes in order.launches:
        if len(nodes) == 1:
            continue
        group = next(g for g in groups if all(n.op.name in g.ops for n in nodes) and fits(g, nodes, waits))
        assert group.chained or len({n.place.layer for n in nodes} - {""}) == 1
        turns = [group.ops.index(n.op.name) for n in nodes]
        assert turns == sorted(turns)


def fits(group: Group, nodes: tuple[Node, ...], waits: dict[Node, set[Node]]) -> bool:
    """May these share a launch? None waits for another; or, chained, each waits for one before it, and none
    for anything else that waits for one of them.
    """
    if not group.chained:
        return not any(a in waits[b] for a in nodes for b in nodes)
    reads = all(set(nodes[:i]) & waits[n] for i, n in enumerate(nodes) if i)
    between = [n for n in waits if n not in nodes and set(nodes) & waits[n]]
    return reads and not any(n in waits[last] for n in between for last in nodes)


@given(layered(), st.sampled_from(KINDS))
@settings(max_examples=150, deadline=None)
def test_what_a_launch_touches_is_alive_at_once(graph: Graph, groups: tuple[Group, ...]) -> None:
    """Its CTAs run in any order: what it makes shares no byte with anything else that it makes or reads."""
    order = schedule(graph, groups)
    memory = plan_memory(graph, order)
    for nodes in order.launches:
        made = {v for n in nodes for v in n.outputs if v not in order.views}
        touched = made | {order.owner(v) for n in nodes for v in n.inputs}
        spans = {
            v: (memory.offsets[v], memory.offsets[v] + v.type.extent) for v in touched & memory.offsets.keys()
        }
        for v in made:
            for other in spans.keys() - {v}:
                apart = spans[v][1] <= spans[other][0] or spans[other][1] <= spans[v][0]
                assert apart, f"{v} and {other} of one launch share bytes"


def shared(order: Schedule) -> list[set[str]]:
    return [{n.outputs[0].name for n in nodes} for nodes in order.launches]


def test_a_node_that_waits_for_another_never_joins_it_unless_chained() -> None:
    with Builder("chain") as b, b.scope("layers.0"):
        x = silu(b.input("x", TensorType(F32, (4,))))
        y = silu(scale(x, factor=2.0))
        z = silu(x)
    graph = b.finish({"y": y, "z": z})
    middle = y.node.inputs[0].name
    assert shared(schedule(graph, APART)) == [{x.name}, {middle}, {y.name, z.name}]
    assert shared(schedule(graph, CHAINED)) == [{x.name, z.name}, {middle, y.name}]


def test_a_chained_group_joins_only_when_no_third_launch_lies_between() -> None:
    """silu reads scale; add reads it too, and by way of a reshaped state write that cannot join."""

    def graph(between: bool) -> Graph:
        with Builder("between") as b:
            x, index = b.input("x", TensorType(F32, (4, 8))), b.input("index", TensorType(I32, (4,)))
            slots, cache = (
                b.input("slots", TensorType(I32, (4,))),
                b.state("cache", TensorType(F32, (1, 4, 8))),
            )
            with b.scope("layers.0"):
                first = scale(x, factor=2.0)
                other = cache_write(cache, first if between else x, index, slots)
                last = add(first, reshape(other, shape=(4, 8)))
        return b.finish({"last": last})

    ops = [[n.op.name for n in nodes] for nodes in schedule(graph(between=True), CHAINED).launches]
    assert ops == [["scale"], ["cache_write"], ["reshape"], ["add"]]
    ops = [[n.op.name for n in nodes] for nodes in schedule(graph(between=False), CHAINED).launches]
    assert ops == [["cache_write"], ["reshape"], ["scale", "add"]]


def test_a_chained_group_keeps_its_order() -> None:
    """silu does not come before scale in a launch where scale reads it."""
    with Builder("backwards") as b, b.scope("layers.0"):
        x = silu(b.input("x", TensorType(F32, (4,))))
        y = scale(x, factor=2.0)
    assert shared(schedule(b.finish({"y": y}), CHAINED)) == [{x.name}, {y.name}]


def test_a_launch_is_of_one_group() -> None:
    """What joined a launch of one group is no longer asked for another one's."""
    groups = (Group(("scale", "silu")), Group(("silu", "add")))
    with Builder("both") as b, b.scope("layers.0"):
        x = b.input("x", TensorType(F32, (4,)))
        values = [silu(x), scale(x, factor=2.0), add(x, x)]
    order = schedule(b.finish({str(i): v for i, v in enumerate(values)}), groups)
    assert [[n.op.name for n in nodes] for nodes in order.launches] == [["scale", "silu"], ["add"]]


def test_two_groups_that_would_wait_for_each_other_do_not_both_form() -> None:
    """a -> d and c -> b: joining a with b and c with d would close a cycle."""
    with Builder("crossed") as b, b.scope("layers.0"):
        x = b.input("x", TensorType(F32, (4,)))
        a, c = silu(x), scale(x, factor=3.0)
        d, e = scale(a, factor=2.0), silu(c)
    order = schedule(b.finish({"d": d, "e": e}), APART)
    assert sorted(map(len, order.launches)) == [1, 1, 2]


def test_without_the_check_launches_would_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    with Builder("chain") as b, b.scope("layers.0"):
        x = b.input("x", TensorType(F32, (4,)))
        y = silu(scale(silu(x), factor=2.0))
    graph = b.finish({"y": y})
    assert len(schedule(graph, APART).launches) == 3
    scheduling._grouped.cache_clear()
    monkeypatch.setattr(scheduling, "_may_join", lambda *_: True)
    with pytest.raises(nx.NetworkXUnfeasible, match="cycle"):
        schedule(graph, APART)


def test_layers_do_not_mix_and_nothing_outside_is_grouped() -> None:
    with Builder("apart") as b:
        x = b.input("x", TensorType(F32, (4,)))
        values = [silu(x), silu(x)]
        for layer in range(2):
            with b.scope(f"layers.{layer}"):
                values.append(silu(x))
    order = schedule(b.finish({str(i): v for i, v in enumerate(values)}), APART)
    assert list(map(len, order.launches)) == [1, 1, 1, 1]


def test_the_shared_launches_of_a_csa_layer() -> None:
    """What the kernels of a GPU target take together."""
    graph, _ = folded("tiny", "official", Bucket("decode"))
    order = schedule(graph, Kernels("sm_90a").groups)
    together = [
        [n.op.name for n in nodes]
        for nodes in order.launches
        if len(nodes) > 1 and nodes[0].place.layer == "layers.2"
    ]
    assert together == [
        ["in_proj", "in_proj"],
        ["q_norm_quantize", "kv_norm_rope_store", "compressor", "compressor"],
        ["indexer", "index_topk"],
        ["router", "swiglu", "experts_down"],
    ]
    assert len(schedule(graph).launches) - len(order.launches) == sum(len(n) - 1 for n in order.launches)
