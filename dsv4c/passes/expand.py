"""Expand: fused ops replaced by their bodies, the undo of fold; values get back the names they had."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from dsv4c.errors import GraphError
from dsv4c.ir.fused import Fused, trace
from dsv4c.ir.graph import Builder, Graph, Node, Value, rewrite


def expand(graph: Graph, names: Iterable[str] | None = None) -> Graph:
    """`graph` with fused ops (those of these names, or all) replaced by their bodies, down to primitives.

    Nodes get the names that their `origin` kept. Raises GraphError for a name no node has.
    """
    wanted = None if names is None else set(names)
    if wanted is not None:
        unknown = wanted - {node.op.name for node in graph.nodes}
        if unknown:
            raise GraphError(f"no node is a {' or a '.join(sorted(unknown))}; nothing to expand")
    return _expanded(graph, wanted, lambda node: wanted is None or node.op.name in wanted)


def unfold(graph: Graph, nodes: Iterable[Node]) -> Graph:
    """`graph` with these fused nodes replaced by their bodies, whose own fused ops stay."""
    chosen = set(nodes)
    return _expanded(graph, set(), lambda node: node in chosen)


def _expanded(graph: Graph, wanted: set[str] | None, chosen: Callable[[Node], bool]) -> Graph:
    """The chosen fused nodes replaced by their bodies; in those, fused ops of the names in `wanted`, too."""
    reserved = {v.name for v in graph.values()}

    def visit(builder: Builder, node: Node, values: dict[Value, Value]) -> bool:
        if not isinstance(node.op, Fused) or not chosen(node):
            return False
        results = _emit_body(builder, node, [values[v] for v in node.inputs], wanted, reserved)
        values.update(zip(node.outputs, results, strict=True))
        return True

    return rewrite(graph, visit)


def _emit_body(
    builder: Builder, node: Node, operands: Sequence[Value], wanted: set[str] | None, reserved: set[str]
) -> list[Value]:
    """Emit the body of a fused node; kept results take the node's names, others those in its origin."""
    op = node.op
    assert isinstance(op, Fused)
    body = trace(op, tuple(v.type for v in node.inputs))
    labels = {v: w.name for v, w in zip(op.kept(body.results), node.outputs, strict=True)}
    origin = iter(node.origin) if len(node.origin) == body.size else None
    values = dict(zip(body.graph.inputs, operands, strict=True))
    for inner in body.graph.nodes:
        places: Sequence[int] = range(len(inner.outputs))
        size = 0
        if isinstance(inner.op, Fused):
            nested = trace(inner.op, tuple(v.type for v in inner.inputs))
            places, size = inner.op.kept(nested.places), nested.size
        own = [next(origin) for _ in range(size or len(inner.outputs))] if origin is not None else []
        names = []
        for i, value in enumerate(inner.outputs):
            if value in labels:
                name = labels[value]
            else:
                name = own[places[i]] if own else f"{node.name}.{value.name}"
                name = _fresh(builder, name, reserved)
            reserved.add(name)
            names.append(name)
        inputs = tuple(values[v] for v in inner.inputs)
        provenance = tuple(own) if size or (own and own != names) else ()
        stand_in = Node(inner.op, inner.inputs, node.scope, provenance)
        stand_in.outputs = tuple(
            Value(n, v.type, v.kind, stand_in, v.index) for n, v in zip(names, inner.outputs, strict=True)
        )
        if isinstance(inner.op, Fused) and (wanted is None or inner.op.name in wanted):
            made: Sequence[Value] = _emit_body(builder, stand_in, inputs, wanted, reserved)
        else:
            made = builder.emit(inner.op, inputs, names=names, scope=node.scope, origin=provenance)
        values.update(zip(inner.outputs, made, strict=True))
    return [values[v] for v in op.kept(body.results)]


def _fresh(builder: Builder, name: str, reserved: set[str]) -> str:
    fresh, n = name, 1
    while fresh in reserved:
        n += 1
        fresh = f"{name}_{n}"
    return builder.fresh(fresh)
