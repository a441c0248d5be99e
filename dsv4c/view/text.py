"""A graph to read in a terminal: a summary in figures, and its text with equal layers folded into one."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from dsv4c.config import ModelConfig
from dsv4c.ir.graph import Graph, Kind
from dsv4c.ir.text import print_graph, print_nodes
from dsv4c.ir.totals import Totals, compulsory, totals
from dsv4c.models.layout import part_of
from dsv4c.scope import Scope
from dsv4c.view.layers import Fold, Section, family, find_section, folds


@dataclass(frozen=True)
class Summary:
    """A graph in figures. Bytes per token are compulsory ones: a call's with full caches, over its rows."""

    graph: str
    totals: Totals
    ops: dict[str, dict[str, int]]  # family -> op -> nodes
    layers: dict[str, int]  # first of its kind -> how many are equal
    parameters: int
    parameter_bytes: int
    state_bytes: int  # of one sequence
    context: int  # tokens that the state holds room for
    bytes_per_token: dict[str, int]  # by part of the model, largest first

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        lines = [f"graph {self.graph}: {self.totals.nodes:,} nodes, {self.totals.launches:,} of them do work"]
        if self.layers:
            kinds = ", ".join(f"{name} x{count}" for name, count in self.layers.items())
            lines.append(f"layers        {sum(self.layers.values())}, {len(self.layers)} different: {kinds}")
        lines.append(f"parameters    {self.parameters:,} in {amount(self.parameter_bytes)}")
        lines.append(f"state         {amount(self.state_bytes)} per sequence of {self.context:,} tokens")
        gflop, moved = self.totals.flops / 1e9, amount(self.totals.bytes)
        lines.append(f"work          {gflop:,.2f} GFLOP, moves {moved} node by node")
        total = sum(self.bytes_per_token.values())
        lines.append(f"bytes/token   {amount(total)} at least, at {self.context:,} tokens of context")
        for part, count in self.bytes_per_token.items():
            lines.append(f"  {part:24}{amount(count):>12}  {100 * count / max(total, 1):5.1f} %")
        lines.append("ops by family")
        for name, ops in self.ops.items():
            counts = ", ".join(f"{op} {count}" for op, count in ops.items())
            lines.append(f"  {name:12}{sum(ops.values()):>7,}  {counts}")
        return "\n".join(lines) + "\n"


def summarize(graph: Graph, config: ModelConfig) -> Summary:
    """Figures of a graph of this model."""
    ops: dict[str, dict[str, int]] = {}
    for node in graph.nodes:
        counts = ops.setdefault(family(node), {})
        counts[node.op.name] = counts.get(node.op.name, 0) + 1
    by_size = sorted(ops.items(), key=lambda item: -sum(item[1].values()))
    return Summary(
        graph=graph.name,
        totals=totals(graph),
        ops={name: dict(sorted(counts.items(), key=lambda item: -item[1])) for name, counts in by_size},
        layers={f.shown.prefix: len(f.members) for f in folds(graph) if f.shown.prefix},
        parameters=sum(math.prod(p.type.shape) for p in graph.params),
        parameter_bytes=sum(p.type.nbytes for p in graph.params),
        state_bytes=sum(s.type.nbytes // s.type.shape[0] for s in graph.states),
        context=room(graph, config),
        bytes_per_token=_bytes_per_token(graph),
    )


def summary(graph: Graph, config: ModelConfig) -> str:
    """`summarize` as text."""
    return summarize(graph, config).text()


def room(graph: Graph, config: ModelConfig) -> int:
    """Tokens that the graph's caches hold: entries times ratio; the window where nothing is compressed."""
    most = config.sliding_window
    for state in graph.states:
        if state.place.path == "attn.entries":
            ratio = config.compress_ratios[state.place.number]
            most = max(most, state.type.shape[1] * ratio)
    return most


def _bytes_per_token(graph: Graph) -> dict[str, int]:
    counted = graph.by_name.get("tokens") or graph.by_name.get("positions")  # a layer by itself has no tokens
    rows = 1 if counted is None else counted.type.shape[0]
    found: dict[str, int] = {}
    for value, count in compulsory(graph).items():
        part = "state" if value.kind is Kind.STATE else part_of(value.name)
        found[part] = found.get(part, 0) + count
    return dict(sorted(((part, n // rows) for part, n in found.items()), key=lambda item: -item[1]))


def amount(count: int) -> str:
    """A number of bytes to read."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.3f} {unit}"
    return f"{count} B"


def render(graph: Graph, layer: int | str | None = None, fold: bool = True, *, origins: bool = True) -> str:
    """The graph's text with equal layers folded: the first is written out, the others are named in a comment.

    `layer` selects one layer (3, "layers.3" or "mtp.0"), whole, with what it declares and what it takes from
    elsewhere. With `fold=False` the text is the whole graph's and parses back. Without `origins` a line says
    only how many unfused results its node stands for. Raises GraphError for a layer that is not there.
    """
    if layer is not None:
        return _one_layer(graph, find_section(graph, layer), origins)
    if not fold:
        return print_graph(graph, origins=origins)
    groups = folds(graph)
    hidden = {member.prefix for group in groups for member in group.members[1:]}
    lines = [f"graph {graph.name}"]
    for values in (graph.inputs, graph.states, graph.params):
        for value in values:
            if value.place.layer not in hidden:
                lines.append(f"{value.kind.value} %{value.name}: {value.type}")
    for group in groups:
        lines += [*_folded(group), *print_nodes(group.shown.nodes, origins=origins)]
    lines.append("return " + ", ".join(f"{name}=%{v.name}" for name, v in graph.outputs.items()))
    return "\n".join(lines) + "\n"


def _folded(group: Fold) -> list[str]:
    if len(group.members) == 1:
        return [f"# {group.shown.prefix}"] if group.shown.prefix else []
    kind = Scope.of(group.shown.prefix).block
    others = len(group.members) - 1
    verb = "is" if others == 1 else "are"
    return [f"# {kind}.{group.numbers} (x{others}) {verb} equal to {group.shown.prefix}"]


def _one_layer(graph: Graph, section: Section, origins: bool) -> str:
    lines = [f"# {section.prefix} of graph {graph.name}: {len(section.nodes)} nodes"]
    lines += [f"# takes %{v.name}: {v.type}" for v in section.taken(graph)]
    lines += [f"{v.kind.value} %{v.name}: {v.type}" for v in section.declared(graph)]
    lines += print_nodes(section.nodes, origins=origins)
    lines += [f"# gives %{v.name}: {v.type}" for v in section.given(graph)]
    return "\n".join(lines) + "\n"
