"""Nodes that share a launch: independent of each other, of one layer, in an order that keeps every wait."""

from __future__ import annotations

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4c.ir.graph import Builder, Graph
from dsv4c.ir.ops import add, cache_write, reshape, scale, silu
from dsv4c.passes import schedule as scheduling
from dsv4c.passes.memory import plan_memory
from dsv4c.passes.schedule import GROUPS, Schedule, layer_of, schedule
from dsv4c.types import F32, I32, TensorType
from tests.passes.fusions.cases import DECODE, folded

KINDS = (("silu", "add"), ("scale", "cache_write"))


@st.composite
def layered(draw: st.DrawFn) -> Graph:
    """Two layers of elementwise ops and state writes, wired at random."""
    with Builder("random") as b:
        values = [b.input("x", TensorType(F32, (4, 8)))]
        caches = [b.state("cache", TensorType(F32, (1, 4, 8)))]
        index = b.input("index", TensorType(I32, (4,)))
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
                            caches.append(cache_write(caches[-1], x, index))
                        case "read":
                            values.append(reshape(caches[-1], shape=(4, 8)))
        out = silu(values[-1])
    return b.finish({"out": out})


def before(plan: Schedule) -> list[set[int]]:
    """For every node, all nodes that come before it, by waits alone."""
    known: list[set[int]] = []
    for waits in plan.after:
        known.append(set(waits).union(*(known[w] for w in waits)))
    return known


@given(layered())
@settings(max_examples=150, deadline=None)
def test_groups_are_independent_and_in_order(graph: Graph) -> None:
    alone = schedule(graph, groups=())
    plan = schedule(graph, groups=KINDS)
    assert {n.name for n in plan.nodes} == {n.name for n in alone.nodes}
    assert [i for members in plan.groups for i in members] == list(range(len(plan.nodes)))
    turn = {name: i for kind in KINDS for i, name in enumerate(kind)}
    known = before(plan)
    for members in plan.groups:
        nodes = [plan.nodes[i] for i in members]
        assert len({layer_of(n) for n in nodes}) == 1
        turns = [turn.get(n.op.name, 0) for n in nodes]
        assert turns == sorted(turns)
        assert len(members) == 1 or any(all(n.op.name in kind for n in nodes) for kind in KINDS)
        assert not any(i in known[j] for i in members for j in members)
    # the same waits as without groups, in an order that respects them
    names = [n.name for n in plan.nodes]
    wanted = {
        n.name: {alone.nodes[w].name for w in b} for n, b in zip(alone.nodes, before(alone), strict=True)
    }
    assert {name: {names[w] for w in b} for name, b in zip(names, known, strict=True)} == wanted
    # whole launches can be put in a line
    for i, waits in enumerate(plan.after):
        assert all(plan.launch_of[w] < plan.launch_of[i] for w in waits)


@given(layered())
@settings(max_examples=60, deadline=None)
def test_nodes_of_one_launch_share_no_byte(graph: Graph) -> None:
    plan = schedule(graph, groups=KINDS)
    memory = plan_memory(graph, plan, parallel=True)
    for members in plan.groups:
        spans = [
            (memory.offsets[v], memory.offsets[v] + v.type.nbytes, i)
            for i in members
            for v in (*plan.nodes[i].inputs, *plan.nodes[i].outputs)
            if v in memory.offsets
        ]
        made = {v for i in members for v in plan.nodes[i].outputs}
        for v in made & memory.offsets.keys():
            start, stop = memory.offsets[v], memory.offsets[v] + v.type.nbytes
            maker = next(i for i in members if v in plan.nodes[i].outputs)
            assert not any(a < stop and start < b for a, b, i in spans if i != maker)


def test_a_node_that_waits_for_another_never_joins_it() -> None:
    with Builder("chain") as b, b.scope("layers.0"):
        x = silu(b.input("x", TensorType(F32, (4,))))
        y = silu(scale(x, factor=2.0))
        z = silu(x)
    plan = schedule(b.finish({"y": y, "z": z}), groups=KINDS)
    shared = [{plan.nodes[i].outputs[0].name for i in members} for members in plan.groups]
    assert shared == [{x.name}, {y.node.inputs[0].name}, {y.name, z.name}]  # type: ignore[union-attr]


def test_two_groups_that_would_wait_for_each_other_do_not_both_form() -> None:
    """a -> d and c -> b: joining a with b and c with d would close a cycle."""
    with Builder("crossed") as b, b.scope("layers.0"):
        x = b.input("x", TensorType(F32, (4,)))
        a, c = silu(x), scale(x, factor=3.0)
        d, e = scale(a, factor=2.0), silu(c)
    plan = schedule(b.finish({"d": d, "e": e}), groups=KINDS)
    sizes = sorted(len(members) for members in plan.groups)
    assert sizes == [1, 1, 2]


def test_without_the_check_groups_would_close_a_cycle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "_ordered", lambda *_: False)
    with Builder("chain") as b, b.scope("layers.0"):
        x = b.input("x", TensorType(F32, (4,)))
        y = silu(scale(silu(x), factor=2.0))
    graph = b.finish({"y": y})
    with pytest.raises(nx.NetworkXUnfeasible, match="cycle"):
        schedule(graph, groups=KINDS)


def test_layers_do_not_mix_and_nothing_outside_is_grouped() -> None:
    with Builder("apart") as b:
        x = b.input("x", TensorType(F32, (4,)))
        values = [silu(x), silu(x)]
        for layer in range(2):
            with b.scope(f"layers.{layer}"):
                values.append(silu(x))
    plan = schedule(b.finish({str(i): v for i, v in enumerate(values)}), groups=KINDS)
    assert [len(members) for members in plan.groups] == [1, 1, 1, 1]
    assert plan.launches == {"": 2, "layers.0": 1, "layers.1": 1}


def test_constants_are_no_launches() -> None:
    graph, _ = folded("tiny", "official", DECODE)
    plan = schedule(graph)
    outside = [n.op.name for n in plan.nodes if not layer_of(n)]
    assert outside.count("rope_frequencies") == 2
    assert plan.launches[""] == len(outside) - 2 == 6


def test_the_shared_launches_of_a_csa_layer() -> None:
    graph, _ = folded("tiny", "official", DECODE)
    plan = schedule(graph)
    shared = [
        [plan.nodes[i].op.name for i in members]
        for members in plan.groups
        if len(members) > 1 and layer_of(plan.nodes[members[0]]) == "layers.2"
    ]
    assert shared == [
        ["in_proj", "in_proj"],
        ["q_norm_quantize", "kv_norm_rope_store", "compressor", "compressor"],
    ]
    assert len(schedule(graph, groups=()).groups) - len(plan.groups) == 16
    assert all(any(set(names) <= set(group) for group in GROUPS) for names in shared)


def test_the_thrifty_order_is_grouped_too() -> None:
    graph, _ = folded("tiny", "official", DECODE)
    plan = schedule(graph, "memory")
    assert plan.launches == schedule(graph).launches
