"""A graph as DOT, for Graphviz: a box for each launch with the bytes it moves, equal layers once. With
`bodies` every node by scope, fused ops as clusters of what they stand for.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from types import MappingProxyType

from dsv4c.ir.graph import Graph, Kind, Node, Value
from dsv4c.ir.text import print_attribute, print_node
from dsv4c.view.layers import (
    body_of,
    body_results,
    family,
    find_section,
    folds,
    from_a_layer,
    representatives,
)
from dsv4c.view.text import amount

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

STRIPES = {
    "attention": "#5fae53",
    "moe": "#d1699a",
    "index": "#b3b03a",
    "compress": "#8db84a",
    "hyper": "#3fa9a0",
    "sample": "#d1699a",
    "linear": "#5b8def",
    "rope": "#a67fd1",
    "quant": "#e07f4f",
    "norm": "#d9b13b",
    "state": "#8a8a86",
}
"""Color of a launch, as the HTML page has them: the first that it has some work of."""

MOST_NAMED = 8
"""Values that a box names."""


def dot(
    graph: Graph,
    layer: int | str | None = None,
    fold: bool = True,
    bodies: bool = False,
    launches: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """DOT source. `layer` draws one layer (3, "layers.3", "mtp.0"); otherwise equal layers are drawn once.

    A box is a launch: nodes that `launches` gives one name, or else a node that moves bytes. With `bodies` a
    fused op is a cluster of the ops it stands for. Raises GraphError for a missing layer.
    """
    return "\n".join(_Drawing(graph, layer, fold, bodies, launches).lines()) + "\n"


class _Drawing:
    def __init__(
        self,
        graph: Graph,
        layer: int | str | None,
        fold: bool,
        bodies: bool,
        launches: Mapping[str, str],
    ) -> None:
        self.graph, self.bodies, self.launches = graph, bodies, launches
        self.same: dict[Value, Value] = {}  # what a view gives -> the value whose bytes it is
        self.whole = layer is None
        if layer is not None:
            section = find_section(graph, layer)
            self.groups = [(section.title, section.nodes)]
        else:
            self.groups = [
                (f"{f.shown.title} x{len(f.members)}" if len(f.members) > 1 else f.shown.title, f.shown.nodes)
                for f in folds(graph, fold)
            ]
        self.stands_for = representatives(folds(graph, fold)) if self.whole else {}
        self.port: dict[Value, str] = {}  # value -> id of the drawn node that makes it
        self.edges: list[tuple[Place, str]] = []
        self.ids = 0

    def fresh(self) -> str:
        self.ids += 1
        return f"n{self.ids}"

    def lines(self) -> Iterator[str]:
        yield f"digraph {json.dumps(self.graph.name, ensure_ascii=False)} {{"
        yield '  graph [fontname="Helvetica", fontsize=12, color="#bbbbbb", labeljust=l];'
        yield "  graph [nodesep=0.2, ranksep=0.3];"
        yield '  node [fontname="Helvetica", fontsize=10, shape=box, style="filled,rounded"];'
        yield '  node [fillcolor=white, color="#555555", margin="0.08,0.04"];'
        yield '  edge [color="#777777", arrowsize=0.6];'
        if self.whole:
            yield from (self._source(v) for v in self.graph.inputs)
        for title, nodes in self.groups:
            inner = self._scoped(nodes) if self.bodies else self._launched(nodes)
            yield from self._cluster(title, inner, "  ")
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

    def _launched(self, nodes: Iterable[Node]) -> Iterator[str]:
        """A box for each launch; views are none, their readers read on."""
        together: dict[str, list[Node]] = {}
        for node in nodes:
            if node.op.view and node.name not in self.launches:
                self.same[node.outputs[0]] = node.inputs[0]
            else:
                together.setdefault(self.launches.get(node.name, node.name), []).append(node)
        for members in together.values():
            name = self.fresh()
            layer = members[0].place.layer
            named = list(dict.fromkeys(v for n in members for v in n.inputs if self._is_named(v, layer)))
            self.edges += [(value, name) for n in members for value in n.inputs if value not in named]
            self.port |= {value: name for node in members for value in node.outputs}
            told = "\n".join(print_node(node, origins=False) for node in members)
            box = _box(members, named, layer)
            yield f'{name} [shape=plain, style="", label=<{box}>, tooltip={_label(told)}];'

    def _is_named(self, value: Value, layer: str) -> bool:
        """Is it named in the boxes that read it? Weights are, and in a layer what many read, positions."""
        if value.kind is Kind.PARAM:
            return True
        readers = {node.place.layer for node in self.graph.users[value]} if layer else set()
        return value.kind is not Kind.STATE and not from_a_layer(value) and len(readers) > 1

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
                value = place
                while value in self.same or value in self.stands_for:
                    value = self.same[value] if value in self.same else self.stands_for[value]
                if value not in self.port and (value.kind is not Kind.RESULT or self.whole):
                    continue  # params and states are named in the box
                if value not in self.port:
                    yield self._outside(value)
                place = self.port[value]
            if place != target and (place, target) not in drawn:
                drawn.add((place, target))
                yield f"  {place} -> {target};"

    def _outside(self, value: Value) -> str:
        """A value that another layer makes, as a plain name."""
        self.port[value] = name = self.fresh()
        return f'  {name} [shape=plaintext, style="", label={_label(value.name, str(value.type))}];'


def _box(members: Sequence[Node], read: Sequence[Value], layer: str) -> str:
    """A launch: a stripe in the color of its work, its ops and bytes, its name, and what it reads that no
    edge shows.
    """
    moved = sum(node.cost.bytes for node in members)
    name, *names = (v.removeprefix(f"{layer}.") for v in (members[0].name, *(v.name for v in read)))
    small = [name, *_wrapped(names)]
    stripe, ops = _stripe(members), " + ".join(node.op.name for node in members)
    rows = [
        f'<TR><TD BGCOLOR="{stripe}" WIDTH="5" ROWSPAN="{1 + len(small)}"></TD>'
        f'<TD ALIGN="LEFT"><B>{escape(ops)}</B></TD><TD ALIGN="RIGHT">{amount(moved)}</TD></TR>'
    ]
    for i, line in enumerate(small):
        font = f'POINT-SIZE="8" COLOR="{"#8a7a55" if i else "#666666"}"'
        rows.append(f'<TR><TD ALIGN="LEFT" COLSPAN="2"><FONT {font}>{escape(line)}</FONT></TD></TR>')
    table = 'BORDER="1" COLOR="#bbbbbb" CELLBORDER="0" CELLSPACING="0" CELLPADDING="3" BGCOLOR="white"'
    return f"<TABLE {table}>{''.join(rows)}</TABLE>"


def _wrapped(names: Sequence[str]) -> list[str]:
    """Names on lines; many are counted."""
    shown = list(names) if len(names) <= MOST_NAMED else [*names[:MOST_NAMED], f"{len(names):,} in all"]
    return textwrap.wrap(", ".join(shown), 44)


def _stripe(nodes: Sequence[Node]) -> str:
    there = {family(part) for node in nodes for part in _primitives(node)}
    return next((color for name, color in STRIPES.items() if name in there), "#9a9a95")


def _primitives(node: Node) -> Iterator[Node]:
    body = body_of(node)
    if body is None:
        yield node
    else:
        yield from (part for inner in body.nodes for part in _primitives(inner))


def _label(*lines: str) -> str:
    return json.dumps("\n".join(line for line in lines if line))
