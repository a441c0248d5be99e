"""Graphs as JSON for Google's Model Explorer: a graph per stage, namespaces from scopes and fused bodies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dsv4c.ir.graph import Graph, Node, Value
from dsv4c.ir.text import print_attribute
from dsv4c.view.layers import body_of, body_results, folds, representatives

Source = tuple[str, str]
"""Id of a node and the number of its output."""


def model_explorer(stages: Iterable[tuple[str, Graph]] | Graph, fold: bool = True) -> dict[str, Any]:
    """`{"graphs": [...]}`: write it as JSON and open it with `model-explorer FILE`.

    Operands and results keep their names; a fused op becomes a namespace that holds its body. With `fold`
    equal layers are there once, and what reads one of the others reads that one.
    """
    named = [(stages.name, stages)] if isinstance(stages, Graph) else list(stages)
    return {"graphs": [{"id": name, "nodes": list(_nodes(graph, fold))} for name, graph in named]}


def _nodes(graph: Graph, fold: bool) -> Iterator[dict[str, Any]]:
    groups = folds(graph, fold)
    hidden = {member.prefix for group in groups for member in group.members[1:]}
    stands_for = representatives(groups)
    sources = _Sources(stands_for)
    for value in (*graph.inputs, *graph.states, *graph.params):
        if value.place.layer in hidden:
            continue
        sources[value] = (value.name, "0")
        namespace = "/".join(value.name.split(".")[:-1])
        yield _record(value.name, value.kind.value, namespace, [], {"name": value.name}, [value])
    for node in (node for group in groups for node in group.shown.nodes):
        yield from _node(node, node.name, node.scope.replace(".", "/"), sources)
    for label, value in graph.outputs.items():
        yield _record(f"return/{label}", "output", "", [(sources[value], "0")], {"name": value.name}, [])


class _Sources(dict[Value, Source]):
    """Where values come from; those of layers that are not there, from the one that stands for them."""

    def __init__(self, stands_for: Mapping[Value, Value]) -> None:
        super().__init__()
        self.stands_for = stands_for

    def __missing__(self, value: Value) -> Source:
        return self[self.stands_for[value]]


def _node(node: Node, id_: str, namespace: str, sources: dict[Value, Source]) -> Iterator[dict[str, Any]]:
    body = body_of(node)
    if body is None:
        for index, value in enumerate(node.outputs):
            sources[value] = (id_, str(index))
        edges = [(sources[value], str(i)) for i, value in enumerate(node.inputs)]
        yield _record(id_, node.op.name, namespace, edges, _attributes(node), node.outputs)
        return
    inside = {operand: sources[value] for operand, value in zip(body.inputs, node.inputs, strict=True)}
    name = f"{node.op.name} ({node.name.rpartition('.')[2]})"
    for part in body.nodes:
        yield from _node(part, f"{id_}/{part.name}", f"{namespace}/{name}".lstrip("/"), inside)
    for result, value in zip(node.outputs, body_results(node, body), strict=True):
        sources[result] = inside[value]


def _attributes(node: Node) -> dict[str, str]:
    cost = node.cost
    found = {key: print_attribute(value) for key, value in node.op.attributes().items()}
    found |= {"name": node.name, "bytes": str(cost.bytes), "flops": str(cost.flops)}
    return found | ({"origin": " ".join(node.origin)} if node.origin else {})


def _record(
    id_: str,
    label: str,
    namespace: str,
    edges: Iterable[tuple[Source, str]],
    attributes: dict[str, str],
    outputs: Iterable[Value],
) -> dict[str, Any]:
    return {
        "id": id_,
        "label": label,
        "namespace": namespace,
        "incomingEdges": [
            {"sourceNodeId": source, "sourceNodeOutputId": output, "targetNodeInputId": operand}
            for (source, output), operand in edges
        ],
        "attrs": _pairs(attributes),
        "outputsMetadata": [
            {"id": str(index), "attrs": _pairs({"tensor_shape": str(value.type), "name": value.name})}
            for index, value in enumerate(outputs)
        ],
    }


def _pairs(attributes: dict[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in attributes.items()]
