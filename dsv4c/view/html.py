"""The stages of a compile as one HTML file that needs nothing else: no network, no server, no other file.

Each stage shows its graph with equal layers folded, what its pass changed, and every fused op's body and
generated source. The file holds a graph's distinct layers once, however many layers and stages share them.
"""

from __future__ import annotations

import html as markup
import json
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dsv4c.ir.fused import Fused
from dsv4c.ir.graph import Graph, Node, Value
from dsv4c.ir.text import print_attribute
from dsv4c.ir.totals import totals
from dsv4c.types import Type
from dsv4c.view.diff import Difference, diff
from dsv4c.view.layers import Section, body_of, body_results, family, from_a_layer, sections

STATIC = Path(__file__).parent / "static"


def html(
    stages: Sequence[tuple[str, Graph]],
    *,
    title: str = "",
    sources: Mapping[str, str] | None = None,
    launches: Mapping[str, Any] | None = None,
) -> str:
    """One self-contained page. `stages` are (name, graph) in order; `sources` maps names of the last stage's
    nodes to the source of the kernel that runs them; `launches` (`dsv4c.view.launches.launched`) are those of
    a plan, shown behind the stages. Raises ValueError for no stages, or a name given twice.
    """
    names = [name for name, _ in stages]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"stages need distinct names, at least one; got {names}")
    data = _Page(sources or {}).page(stages) | {"launches": launches}
    parts = {
        "TITLE": markup.escape(title or stages[0][1].name),
        "STYLE": (STATIC / "style.css").read_text(encoding="utf-8"),
        "SCRIPT": "".join((STATIC / n).read_text(encoding="utf-8") for n in ("launches.js", "page.js")),
        # "</" and "<!--" would end, or never end, the script element that carries the data.
        "DATA": json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c"),
    }
    page = (STATIC / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda place: parts[place[1]], page)


@dataclass
class _Table:
    """Distinct rows in order; the page refers to them by index. Keys identify, `rows` is what is written."""

    rows: list[Any] = field(default_factory=list)
    index: dict[Hashable, int] = field(default_factory=dict)

    def add(self, key: Hashable, row: Any) -> int:
        if key not in self.index:
            self.index[key] = len(self.rows)
            self.rows.append(row() if callable(row) else row)
        return self.index[key]


class _Page:
    def __init__(self, sources: Mapping[str, str]) -> None:
        self.given = sources
        self.names, self.types, self.ops, self.sources = _Table(), _Table(), _Table(), _Table()
        self.blocks, self.bodies, self.changes = _Table(), _Table(), _Table()
        self.costs: dict[tuple[int, ...], tuple[int, int]] = {}
        # Objects seen before, by identity: passes share ops and types of what they leave alone, and hashing
        # them takes longer than all the rest. The graphs outlive the page, so no identity is reused.
        self.seen: dict[int, int] = {}
        self.canonical: dict[tuple[str, str], int] = {}

    def page(self, stages: Sequence[tuple[str, Graph]]) -> dict[str, Any]:
        written: list[dict[str, Any]] = []
        before: tuple[Graph, Places] | None = None
        for position, (name, graph) in enumerate(stages):
            stage, places = self.stage(name, graph, before, last=position == len(stages) - 1)
            written.append(stage)
            before = graph, places
        return {
            "names": self.names.rows,
            "types": self.types.rows,
            "ops": self.ops.rows,
            "blocks": self.blocks.rows,
            "bodies": self.bodies.rows,
            "changes": self.changes.rows,
            "sources": self.sources.rows,
            "stages": written,
        }

    def stage(
        self, name: str, graph: Graph, before: tuple[Graph, Places] | None, last: bool
    ) -> tuple[dict[str, Any], Places]:
        """One stage, and where each of its nodes is."""
        cut = [(section, *self.block(section)) for section in sections(graph)]
        places = {
            node.name: (section.prefix, block, i)
            for section, block, _ in cut
            for i, node in enumerate(section.nodes)
        }
        changes = _Changes(diff(before[0], graph), before[1]) if before else None
        groups: dict[Hashable, dict[str, Any]] = {}
        for section, block, foreign in cut:
            change = None
            if changes is not None:
                row = changes.of(section)
                change = self.changes.add(repr(row), row)
            key = (block, change) if section.prefix else section
            group = groups.setdefault(
                key, {"title": section.title, "block": block, "change": change, "members": [], "foreign": []}
            )
            group["members"].append(section.prefix)
            group["foreign"].append(foreign)
            if last and len(group["members"]) == 1:
                self.attach(group, section)
        stage = {
            "name": name,
            "graph": graph.name,
            "totals": asdict(totals(graph)),
            "counts": changes.counts if changes else None,
            "groups": list(groups.values()),
            "vanished": [layer for layer in changes.gone if layer] if changes else [],
            "inputs": [[v.name, str(v.type)] for v in graph.inputs],
            "outputs": [[label, v.name] for label, v in graph.outputs.items()],
            "params": len(graph.params),
            "states": len(graph.states),
        }
        return stage, places

    def attach(self, group: dict[str, Any], section: Section) -> None:
        """Generated sources of the group's nodes, those of its first member."""
        found = {
            i: self.sources.add(self.given[node.name], self.given[node.name])
            for i, node in enumerate(section.nodes)
            if node.name in self.given
        }
        if found:
            group["sources"] = found

    def block(self, section: Section) -> tuple[int, list[str]]:
        """The section's block, and the names of the values it takes from elsewhere, in the block's order."""
        rows, outside, foreign = self.nodes(section.nodes, section)
        key = (tuple(rows), tuple(outside))
        return self.blocks.add(key, lambda: {"nodes": rows, "outside": outside}), foreign

    def nodes(
        self, nodes: Iterable[Node], section: Section
    ) -> tuple[list[tuple[Any, ...]], list[tuple[str, int, str]], list[str]]:
        """Rows (op, scope, operands, results, origin, body, bytes, flops); what operands below zero stand
        for, -1-i being outside[i]; and the names of those that other layers make.
        """
        number: dict[Value, int] = {}
        outside: dict[Value, int] = {}
        described: list[tuple[str, int, str]] = []
        foreign: list[str] = []
        rows: list[tuple[Any, ...]] = []

        def operand(value: Value) -> int:
            if value in number:
                return number[value]
            if value not in outside:
                outside[value] = len(described)
                made_elsewhere = bool(section.prefix) and from_a_layer(value)
                name = f"^{len(foreign)}" if made_elsewhere else section.canonical(value.name)
                if made_elsewhere:
                    foreign.append(value.name)
                described.append((name, self.type(value.type), value.kind.value))
            return -1 - outside[value]

        for node in nodes:
            operands = tuple([operand(v) for v in node.inputs])
            results: list[int] = []
            for value in node.outputs:
                number[value] = len(number)
                results += (self.name(value.name, section), self.type(value.type))
            origin = tuple([self.name(n, section) for n in node.origin])
            scope, op = self.name(node.scope, section), self.op(node)
            rows.append((op, scope, operands, tuple(results), origin, self.body(node), *self.cost(node, op)))
        return rows, described, foreign

    def name(self, name: str, section: Section) -> int:
        key = (section.prefix, name)
        if key not in self.canonical:
            canonical = section.canonical(name)
            self.canonical[key] = self.names.add(canonical, canonical)
        return self.canonical[key]

    def type(self, type_: Type) -> int:
        if id(type_) not in self.seen:
            self.seen[id(type_)] = self.types.add(type_, lambda: str(type_))
        return self.seen[id(type_)]

    def op(self, node: Node) -> int:
        def row() -> list[Any]:
            attributes = {k: print_attribute(v) for k, v in node.op.attributes().items()}
            return [
                node.op.name,
                family(node),
                attributes,
                (type(node.op).__doc__ or "").partition("\n\n")[0],
            ]

        if id(node.op) not in self.seen:
            self.seen[id(node.op)] = self.ops.add((type(node.op), node.op), row)
        return self.seen[id(node.op)]

    def cost(self, node: Node, op: int) -> tuple[int, int]:
        key = (op, *[self.type(v.type) for v in node.inputs])
        if key not in self.costs:
            cost = node.cost
            self.costs[key] = cost.bytes, cost.flops
        return self.costs[key]

    def body(self, node: Node) -> int:
        """Index of the fused op's body, -1 for a primitive."""
        if not isinstance(node.op, Fused):
            return -1
        key = (node.op, tuple([v.type for v in node.inputs]))
        if key not in self.bodies.index:
            body = body_of(node)
            assert body is not None
            rows, outside, _ = self.nodes(body.nodes, Section("", body.nodes))
            made = [v for part in body.nodes for v in part.outputs]
            results = [made.index(v) for v in body_results(node, body)]
            self.bodies.add(key, {"nodes": rows, "outside": outside, "results": results})
        return self.bodies.index[key]


Places = dict[str, tuple[str, int, int]]
"""Where a stage's nodes are, by name: layer, block, index in it."""


class _Changes:
    """What a pass changed, section by section."""

    def __init__(self, difference: Difference, places: Places) -> None:
        self.new = set(difference.new)
        self.changed = {change.after for change in difference.changed}
        self.counts = [len(self.new), len(self.changed), len(difference.gone)]
        # layer -> old block -> indices; a layer's first section takes its own
        self.gone: dict[str, dict[int, list[int]]] = {}
        for node in difference.gone:
            layer, block, index = places[node.name]
            self.gone.setdefault(layer, {}).setdefault(block, []).append(index)

    def of(self, section: Section) -> list[Any]:
        """[new nodes, changed nodes, gone nodes as [old block, index, ...]], nodes by index."""
        new = [i for i, node in enumerate(section.nodes) if node in self.new]
        changed = [i for i, node in enumerate(section.nodes) if node in self.changed]
        gone = self.gone.pop(section.prefix, {})
        return [new, changed, [[block, *indices] for block, indices in gone.items()]]
