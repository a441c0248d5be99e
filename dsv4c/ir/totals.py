"""A graph in figures."""

from __future__ import annotations

from dataclasses import dataclass

from dsv4c.ir.graph import Graph, Kind, Value


@dataclass(frozen=True)
class Totals:
    """Nodes, those of them that launch something, bytes they read and write, floating-point operations."""

    nodes: int
    launches: int
    bytes: int
    flops: int


def totals(graph: Graph) -> Totals:
    costs = [node.cost for node in graph.nodes if not node.op.view]
    return Totals(len(graph.nodes), len(costs), sum(c.bytes for c in costs), sum(c.flops for c in costs))


def compulsory(graph: Graph) -> dict[Value, int]:
    """Bytes that a call must touch of every parameter and state, whatever runs it: what it reads, once
    however many ops do, and what it writes. Slices are read beside each other.
    """
    reads: dict[Value, int] = {}
    slices: dict[Value, int] = {}
    writes: dict[Value, int] = {}
    for node in graph.nodes:
        if node.op.view:
            continue
        cost = node.cost
        for value, count in zip(node.inputs, cost.reads, strict=True):
            root = graph.root_of.get(value, value)
            if root.kind in (Kind.PARAM, Kind.STATE) and node.op.addressed:
                slices[root] = slices.get(root, 0) + count
            elif root.kind in (Kind.PARAM, Kind.STATE):
                reads[root] = max(reads.get(root, 0), count)
        for value, count in zip(node.outputs, cost.writes, strict=True):
            if value in graph.root_of:
                root = graph.root_of[value]
                writes[root] = writes.get(root, 0) + count

    def touched(value: Value) -> int:
        read = min(max(reads.get(value, 0), slices.get(value, 0)), value.type.nbytes)
        return read + writes.get(value, 0)

    return {value: touched(value) for value in (*graph.params, *graph.states)}
