"""Equal nodes become one, and what nobody reads goes. Writes to state stay: a later call reads them."""

from __future__ import annotations

from dsv4c.ir.graph import Builder, Graph, Kind, Node, Value
from dsv4c.ir.op import Op


def tidy(graph: Graph) -> Graph:
    """`graph` without repeated and dead nodes, and without params and states that are then unused."""
    return drop_dead(merge_equal(graph))


def merge_equal(graph: Graph) -> Graph:
    """Nodes with the same op and operands become the first of them."""
    same = repeated(graph)
    if not same:
        return graph
    builder, values = Builder.like(graph)
    for node in graph.nodes:
        if node.outputs[0] in same:
            values.update({v: values[same[v]] for v in node.outputs})
        else:
            builder.copy(node, values)
    return builder.finish({label: values[v] for label, v in graph.outputs.items()})


def repeated(graph: Graph) -> dict[Value, Value]:
    """Results of nodes that have the op and operands of an earlier one, and that one's results."""
    first: dict[tuple[Op, tuple[Value, ...]], Node] = {}
    same: dict[Value, Value] = {}
    for node in graph.nodes:
        if node.op.alias:
            continue  # two writes are two writes
        kept = first.setdefault((node.op, tuple(same.get(v, v) for v in node.inputs)), node)
        if kept is not node:
            same.update(zip(node.outputs, kept.outputs, strict=True))
    return same


def drop_dead(graph: Graph) -> Graph:
    """Keep what outputs and writes to state depend on. Inputs stay: callers give them."""
    needed = set(graph.outputs.values())
    alive: list[Node] = []
    for node in reversed(graph.nodes):
        if node.op.alias or not needed.isdisjoint(node.outputs):
            alive.append(node)
            needed.update(node.inputs)
    unused = [v for v in (*graph.states, *graph.params) if v not in needed]
    if len(alive) == len(graph.nodes) and not unused:
        return graph
    builder = Builder(graph.name)
    values: dict[Value, Value] = {}
    declare = {Kind.INPUT: builder.input, Kind.STATE: builder.state, Kind.PARAM: builder.param}
    for value in (*graph.inputs, *graph.states, *graph.params):
        if value in needed or value.kind is Kind.INPUT:
            values[value] = declare[value.kind](value.name, value.type)
    for node in reversed(alive):
        builder.copy(node, values)
    return builder.finish({label: values[v] for label, v in graph.outputs.items()})
