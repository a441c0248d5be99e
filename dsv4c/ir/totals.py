"""A graph in figures."""

from __future__ import annotations

from dataclasses import dataclass

from dsv4c.ir.graph import Graph


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
