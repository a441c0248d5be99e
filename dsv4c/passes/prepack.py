"""Prepack: whatever depends on weights alone is computed when they are loaded, not at every call."""

from __future__ import annotations

from dsv4c.ir.graph import Builder, Graph, Kind, Node, Value


def prepack(graph: Graph) -> tuple[Graph, Graph | None]:
    """(main, load-time graph or None). Outputs of the second, under their names, are params of the first.

    The load-time graph has params and no inputs or states. A graph that gives a weight-only value as its own
    output keeps computing it.
    """
    packed: set[Node] = set()
    constant: set[Value] = set(graph.params)
    for node in graph.nodes:
        if not node.op.alias and constant.issuperset(node.inputs):
            packed.add(node)
            constant.update(node.outputs)
    returned = {v.node for v in graph.outputs.values() if v.node in packed}
    while returned:  # outputs must come from nodes, so these and what they read stay
        packed -= returned
        returned = {v.node for n in returned if n for v in n.inputs if v.node in packed}
    if not packed:
        return graph, None
    crossing = [
        v
        for n in graph.nodes
        if n in packed
        for v in n.outputs
        if any(u not in packed for u in graph.users[v])
    ]
    return _main(graph, packed, crossing), _load(graph, packed, crossing)


def _main(graph: Graph, packed: set[Node], crossing: list[Value]) -> Graph:
    builder = Builder(graph.name)
    values: dict[Value, Value] = {}
    read = {v for node in graph.nodes if node not in packed for v in node.inputs} | set(
        graph.outputs.values()
    )
    declare = {Kind.INPUT: builder.input, Kind.STATE: builder.state, Kind.PARAM: builder.param}
    for value in (*graph.inputs, *graph.states, *graph.params):
        if value.kind is not Kind.PARAM or value in read:
            values[value] = declare[value.kind](value.name, value.type)
    for value in crossing:
        values[value] = builder.param(value.name, value.type)
    for node in graph.nodes:
        if node not in packed:
            builder.copy(node, values)
    return builder.finish({label: values[v] for label, v in graph.outputs.items()})


def _load(graph: Graph, packed: set[Node], crossing: list[Value]) -> Graph:
    builder = Builder(f"{graph.name}.prepack")
    read = {v for node in packed for v in node.inputs}
    values = {p: builder.param(p.name, p.type) for p in graph.params if p in read}
    for node in graph.nodes:
        if node in packed:
            builder.copy(node, values)
    return builder.finish({v.name: values[v] for v in crossing})
