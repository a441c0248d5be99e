"""A graph as DOT, for Graphviz: nodes by scope, fused ops as clusters of their bodies, equal layers once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping

from dsv4c.ir.graph import Graph, Kind, Node, Value
from dsv4c.ir.text import print_attribute
from dsv4c.view.layers import body_of, body_results, family, find_section, folds

Place = Value | str
"""Where an edge starts: a value of the graph, or the id of a drawn node inside a body."""

EMPTY: Mapping[Value, Place] = {}

COLORS = {
    "linear": "#cfe0f5",
    "attention": "#d9ead0",
    "compress": "#e3eed2",
    "index": "#eaf0cf",
    "quant": "#f7ddd0",
    "norm": "#f6eccb",
    "rope": "#e9def2",
    "hyper": "#d5ebe9",
    "moe": "#f3d9e4",
    "state": "#e4e4e4",
}
"""Fill of a node by the family of its op; other families are white."""


def dot(graph: Graph, layer: int | str | None = None, fold: bool = True, bodies: bool = True) -> str:
    """DOT source. `layer` draws one layer (3, "layers.3", "mtp.0"); otherwise equal layers are drawn once.

    With `bodies` a fused op is a cluster of the ops it stands for. Raises GraphError for a missing layer.
    """
    return "\n".join(_Drawing(graph, layer, fold, bodies).lines()) + "\n"


class _Drawing:
    def __init__(self, graph: Graph, layer: int | str | None, fold: bool, bodies: bool) -> None:
        self.graph, self.bodies = graph, bodies
        self.whole = layer is None
        if layer is not None:
            section = find_section(graph, layer)
            self.groups = [(section.title, section.nodes)]
        else:
            self.groups = [
                (f"{f.shown.title} x{len(f.members)}" if len(f.members) > 1 else f.shown.title, f.shown.nodes)
                for f in folds(graph, fold)
            ]
        self.stands_for = self._representatives(fold) if self.whole else {}
        self.port: dict[Value, str] = {}  # value -> id of the drawn node that makes it
        self.edges: list[tuple[Place, str]] = []
        self.ids = 0

    def _representatives(self, fold: bool) -> dict[Value, Value]:
        """Results of folded layers, each to that of the layer drawn in its place."""
        found: dict[Value, Value] = {}
        for group in folds(self.graph, fold):
            shown = [v for node in group.shown.nodes for v in node.outputs]
            for member in group.members[1:]:
                found.update(zip((v for node in member.nodes for v in node.outputs), shown, strict=True))
        return found

    def fresh(self) -> str:
        self.ids += 1
        return f"n{self.ids}"

    def lines(self) -> Iterator[str]:
        yield f"digraph {json.dumps(self.graph.name, ensure_ascii=False)} {{"
        yield '  graph [fontname="Helvetica", fontsize=12, color="#999999", nodesep=0.2, ranksep=0.3];'
        yield '  node [fontname="Helvetica", fontsize=10, shape=box, style="filled,rounded"];'
        yield '  node [fillcolor=white, color="#555555", margin="0.08,0.04"];'
        yield '  edge [color="#777777", arrowsize=0.6];'
        if self.whole:
            yield from (self._source(v) for v in self.graph.inputs)
        for title, nodes in self.groups:
            yield from self._cluster(title, self._scoped(nodes), "  ")
        yield from self._drawn_edges()
        yield "}"

    def _source(self, value: Value) -> str:
        self.port[value] = name = self.fresh()
        return f"  {name} [shape=ellipse, label={_label(value.name, str(value.type))}];"

    def _cluster(self, title: str, inner: Iterable[str], indent: str) -> Iterator[str]:
        yield f"{indent}subgraph cluster_{self.fresh()} {{"
        yield f"{indent}  label={json.dumps(title)};"
        yield from (f"{indent}  {line}" for line in inner)
        yield f"{indent}}}"

    def _scoped(self, nodes: Iterable[Node]) -> Iterator[str]:
        """Nodes of one scope in one cluster; nested scopes get clusters of their own beside it."""
        by_scope: dict[str, list[Node]] = {}
        for node in nodes:
            by_scope.setdefault(node.scope, []).append(node)
        for scope, members in by_scope.items():
            inner = [line for node in members for line in self._node(node, f"{scope}." if scope else "")]
            yield from inner if not scope else self._cluster(scope, inner, "")

    def _node(self, node: Node, prefix: str = "", inside: Mapping[Value, Place] = EMPTY) -> Iterator[str]:
        """A box, or a fused op's cluster; `inside` a body, where its values come from."""
        inputs = [inside.get(value, value) for value in node.inputs]
        body = body_of(node) if self.bodies else None
        if body is not None:
            places: dict[Value, Place] = dict(zip(body.inputs, inputs, strict=True))
            inner: list[str] = []
            for part in body.nodes:
                inner += self._node(part, "", places)
                places.update((v, self.port.pop(v)) for v in part.outputs)
            yield from self._cluster(f"{node.op.name}  {node.name.removeprefix(prefix)}", inner, "")
            for result, value in zip(node.outputs, body_results(node, body), strict=True):
                place = places[value]
                assert isinstance(place, str)
                self.port[result] = place
            return
        name = self.fresh()
        self.edges += [(place, name) for place in inputs]
        for value in node.outputs:
            self.port[value] = name
        attributes = ", ".join(f"{k}={print_attribute(v)}" for k, v in node.op.attributes().items())
        declared = [v.name for v in inputs if isinstance(v, Value) and v.kind in (Kind.PARAM, Kind.STATE)]
        text = [f"{node.op.name}  {node.name.removeprefix(prefix)}", attributes, ", ".join(declared)]
        shapes = ", ".join(str(v.type) for v in node.outputs)
        yield f'{name} [fillcolor="{COLORS.get(family(node), "white")}", label={_label(*text, shapes)}];'

    def _drawn_edges(self) -> Iterator[str]:
        drawn: set[tuple[str, str]] = set()
        for place, target in self.edges:
            if isinstance(place, Value):
                value = self.stands_for.get(place, place)
                if value not in self.port and (value.kind is not Kind.RESULT or self.whole):
                    continue  # params and states are named in the box
                if value not in self.port:
                    yield self._outside(value)
                place = self.port[value]
            if (place, target) not in drawn:
                drawn.add((place, target))
                yield f"  {place} -> {target};"

    def _outside(self, value: Value) -> str:
        """A value that another layer makes, as a plain name."""
        self.port[value] = name = self.fresh()
        return f'  {name} [shape=plaintext, style="", label={_label(value.name, str(value.type))}];'


def _label(*lines: str) -> str:
    return json.dumps("\n".join(line for line in lines if line))
