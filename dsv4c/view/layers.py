"""Folding: a graph cut into layers and what surrounds them, equal layers found and counted.

Two layers are equal when their nodes, written down in order with operands numbered inside the layer, agree.
Names of results and the layer's own number do not count; attributes, types, wiring and provenance do.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass

from dsv4c.errors import GraphError
from dsv4c.ir.fused import Fused, trace
from dsv4c.ir.graph import Builder, Graph, Kind, Node, Value
from dsv4c.scope import LAYERS, Scope


@dataclass(frozen=True, eq=False)
class Section:
    """The nodes of one layer, or a run of nodes outside of any (`prefix` is then empty)."""

    prefix: str
    nodes: tuple[Node, ...]

    @property
    def title(self) -> str:
        """The layer's name; outside of layers, the scope that its first node lies in."""
        return self.prefix or self.nodes[0].scope or "model"

    def relative(self, name: str) -> str:
        """`name` inside the section: `.attn.qa`; unchanged when it lies elsewhere."""
        return name[len(self.prefix) :] if Scope.of(name).layer == self.prefix else name

    def canonical(self, name: str) -> str:
        """`name` without the section's number: as `relative`, and in a neighbor by distance, `-1.ffn_out`."""
        scope, own = Scope.of(name), Scope.of(self.prefix)
        if not scope.block or scope.block != own.block:
            return name
        distance, inside = scope.number - own.number, name[len(scope.layer) :]
        return f"{distance:+d}{inside}" if distance else inside

    def declared(self, graph: Graph) -> Iterator[Value]:
        """States and params that live in the layer."""
        return (v for v in (*graph.states, *graph.params) if self.prefix and v.place.layer == self.prefix)

    def taken(self, graph: Graph) -> tuple[Value, ...]:
        """What its nodes read and neither make nor declare, in order of first use."""
        inside = {*self.declared(graph), *(v for node in self.nodes for v in node.outputs)}
        return tuple(dict.fromkeys(v for node in self.nodes for v in node.inputs if v not in inside))

    def given(self, graph: Graph) -> tuple[Value, ...]:
        """Its results that nodes elsewhere read, or that the graph returns."""
        own, returned = set(self.nodes), set(graph.outputs.values())
        results = (v for node in self.nodes for v in node.outputs)
        return tuple(v for v in results if v in returned or any(u not in own for u in graph.users[v]))


@dataclass(frozen=True, eq=False)
class Fold:
    """Equal sections, first to last; the first one stands for all."""

    members: tuple[Section, ...]

    @property
    def shown(self) -> Section:
        return self.members[0]

    @property
    def numbers(self) -> str:
        """Layer numbers of all members but the first: `4, 6, 8`."""
        return ", ".join(str(Scope.of(m.prefix).number) for m in self.members[1:])


def sections(graph: Graph) -> list[Section]:
    """The graph in order of first appearance: layers whole, even where their nodes interleave."""
    groups: dict[tuple[str, int], list[Node]] = {}
    run, outside = 0, False
    for node in graph.nodes:
        prefix = node.place.layer
        if not prefix and not outside:
            run += 1
        outside = not prefix
        groups.setdefault((prefix, 0 if prefix else run), []).append(node)
    return [Section(prefix, tuple(nodes)) for (prefix, _), nodes in groups.items()]


def folds(graph: Graph, fold: bool = True) -> list[Fold]:
    """Sections with equal layers put together, in order of first appearance."""
    groups: dict[Hashable, list[Section]] = {}
    for section in sections(graph):
        key = signature(section) if fold and section.prefix else section
        groups.setdefault(key, []).append(section)
    return [Fold(tuple(members)) for members in groups.values()]


def representatives(groups: Iterable[Fold]) -> dict[Value, Value]:
    """Results of folded layers, each to that of the layer shown in its place."""
    found: dict[Value, Value] = {}
    for group in groups:
        shown = [v for node in group.shown.nodes for v in node.outputs]
        for member in group.members[1:]:
            found.update(zip((v for node in member.nodes for v in node.outputs), shown, strict=True))
    return found


def signature(section: Section) -> Hashable:
    """What makes two layers equal."""
    return tuple(encode(section))


def encode(section: Section) -> Iterator[tuple[Hashable, ...]]:
    """Each node as (scope, op, operands, result types, origin), nothing in it naming the layer."""
    number: dict[Value, int] = {}
    foreign: dict[Value, int] = {}

    def operand(value: Value) -> Hashable:
        if value in number:
            return number[value]
        if not from_a_layer(value):
            return section.canonical(value.name), value.type
        return f"^{foreign.setdefault(value, len(foreign))}", value.type

    for node in section.nodes:
        operands = tuple([operand(v) for v in node.inputs])
        for value in node.outputs:
            number[value] = len(number)
        yield (
            section.canonical(node.scope),
            node.op,
            operands,
            tuple([v.type for v in node.outputs]),
            tuple([section.canonical(name) for name in node.origin]),
        )


def from_a_layer(value: Value) -> bool:
    """Is `value` the result of a layer, or of what a first layer has in place of one? Then its name depends
    on which layer reads it.
    """
    return value.node is not None and (bool(value.node.place.block) or value.node.op.name == "expand_streams")


def find_section(graph: Graph, layer: int | str) -> Section:
    """The section of layer 3, `layers.3` or `mtp.0`. Raises GraphError naming the layers there are."""
    prefix = Scope(LAYERS, layer).layer if isinstance(layer, int) else layer
    known = [s for s in sections(graph) if s.prefix]
    for section in known:
        if section.prefix == prefix:
            return section
    names = [section.prefix for section in known]
    there = f"{names[0]} to {names[-1]}" if len(names) > 2 else " and ".join(names) or "none"
    raise GraphError(f"graph {graph.name} has no layer {prefix!r}; its layers: {there}")


def layer_graph(graph: Graph, layer: int | str) -> Graph:
    """One layer as a graph of its own: results of other layers are inputs, what others read are outputs.

    Raises GraphError for a layer that is not there.
    """
    section = find_section(graph, layer)
    builder = Builder(f"{graph.name}.{section.prefix}")
    declare = {Kind.STATE: builder.state, Kind.PARAM: builder.param}
    outer = (*section.taken(graph), *section.declared(graph))
    values = {v: declare.get(v.kind, builder.input)(v.name, v.type) for v in outer}
    for node in section.nodes:
        made = builder.emit(
            node.op,
            tuple(values[v] for v in node.inputs),
            names=[v.name for v in node.outputs],
            scope=node.scope,
            origin=node.origin,
        )
        values.update(zip(node.outputs, made, strict=True))
    return builder.finish({v.name: values[v] for v in section.given(graph)})


def body_of(node: Node) -> Graph | None:
    """The ops that a fused node stands for, over its operands' types; None for a primitive."""
    if not isinstance(node.op, Fused):
        return None
    return trace(node.op, tuple(v.type for v in node.inputs)).graph


def body_results(node: Node, body: Graph) -> tuple[Value, ...]:
    """The body's value of each of the node's results."""
    assert isinstance(node.op, Fused)
    return node.op.kept(tuple(body.outputs.values()))


def family(node: Node) -> str:
    """The file that declares the op: `linear`, `norm`; of a fused op `fused`."""
    return "fused" if isinstance(node.op, Fused) else type(node.op).__module__.rpartition(".")[2]
