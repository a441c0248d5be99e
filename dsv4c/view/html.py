"""The stages of a compile as one HTML file that needs nothing else: no network, no server, no other file.

Each stage shows its graph with equal layers folded, what its pass changed, and every fused op's body and
generated source. The file holds a graph's distinct layers once, however many layers and stages share them.
"""

from __future__ import annotations

import html as markup
import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dsv4c.ir.fused import Fused
from dsv4c.ir.graph import Graph, Kind, Node, Value
from dsv4c.ir.op import Op
from dsv4c.ir.text import print_attribute
from dsv4c.types import Type
from dsv4c.view.diff import totals
from dsv4c.view.layers import Section, body_of, body_results, cost_of, family, layer_of, sections

STATIC = Path(__file__).parent / "static"


def html(
    stages: Sequence[tuple[str, Graph]], *, title: str = "", sources: Mapping[str, str] | None = None
) -> str:
    """One self-contained page. `stages` are (name, graph) in order; `sources` maps names of the last stage's
    nodes to the source of the kernel that runs them. Raises ValueError for no stages, or a name given twice.
    """
    names = [name for name, _ in stages]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"stages need distinct names, at least one; got {names}")
    data = _Page(sources or {}).page(stages)
    parts = {
        "TITLE": markup.escape(title or stages[0][1].name),
        "STYLE": (STATIC / "style.css").read_text(encoding="utf-8"),
        "SCRIPT": (STATIC / "page.js").read_text(encoding="utf-8"),
        # "</" would end the script element that carries the data.
        "DATA": json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("</", "<\\/"),
    }
    page = (STATIC / "page.html").read_text(encoding="utf-8")
    for name, text in parts.items():
        before, _, after = page.partition(f"{{{{{name}}}}}")
        page = before + text + after
    return page


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
        self.lines: list[dict[str, tuple[int, Any]]] = []  # block -> node name -> (index, description)
        self.costs: dict[tuple[Op, tuple[Type, ...]], tuple[int, int]] = {}

    def page(self, stages: Sequence[tuple[str, Graph]]) -> dict[str, Any]:
        written: list[dict[str, Any]] = []
        before: dict[str, list[int]] | None = None
        for position, (name, graph) in enumerate(stages):
            stage, before = self.stage(name, graph, before, last=position == len(stages) - 1)
            written.append(stage)
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
        self, name: str, graph: Graph, before: dict[str, list[int]] | None, last: bool
    ) -> tuple[dict[str, Any], dict[str, list[int]]]:
        """One stage, and its blocks by layer for the next one to be compared with."""
        groups: dict[Hashable, dict[str, Any]] = {}
        now: dict[str, list[int]] = {}
        cut = [(section, *self.block(section)) for section in sections(graph)]
        for section, block, _ in cut:
            now.setdefault(section.prefix, []).append(block)
        counts = [0, 0, 0]
        seen: set[str] = set()
        for section, block, foreign in cut:
            change = None
            if before is not None:
                old = before.get(section.prefix, [])
                current = now[section.prefix]
                first = section.prefix not in seen
                change = self.change(block, tuple(old), tuple(current), gone=first)
                for i, nodes in enumerate(self.changes.rows[change]):
                    counts[i] += sum(len(b) - 1 for b in nodes) if i == 2 else len(nodes)
            seen.add(section.prefix)
            key = (block, change) if section.prefix else section
            group = groups.setdefault(
                key, {"title": section.title, "block": block, "change": change, "members": [], "foreign": []}
            )
            group["members"].append(section.prefix)
            group["foreign"].append(foreign)
            if last and len(group["members"]) == 1:
                self.attach(group, section)
        vanished = [layer for layer in (before or {}) if layer and layer not in now]
        stage = {
            "name": name,
            "graph": graph.name,
            "totals": asdict(totals(graph)),
            "counts": counts if before is not None else None,
            "groups": list(groups.values()),
            "vanished": vanished,
            "inputs": [[v.name, str(v.type)] for v in graph.inputs],
            "outputs": [[label, v.name] for label, v in graph.outputs.items()],
            "params": len(graph.params),
            "states": len(graph.states),
        }
        return stage, now

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
        index = self.blocks.add(key, lambda: {"nodes": rows, "outside": outside})
        if index == len(self.lines):
            self.lines.append(self.described(rows, outside))
        return index, foreign

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
                made_elsewhere = value.kind is Kind.RESULT and bool(section.prefix) and _moves(value)
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
                results += (self.name(section.canonical(value.name)), self.type(value.type))
            origin = tuple([self.name(section.canonical(n)) for n in node.origin])
            scope = self.name(section.canonical(node.scope))
            cost = self.cost(node)
            rows.append((self.op(node), scope, operands, tuple(results), origin, self.body(node), *cost))
        return rows, described, foreign

    def name(self, name: str) -> int:
        return self.names.add(name, name)

    def type(self, type_: Type) -> int:
        return self.types.add(type_, lambda: str(type_))

    def op(self, node: Node) -> int:
        def row() -> list[Any]:
            attributes = {k: print_attribute(v) for k, v in node.op.attributes().items()}
            return [
                node.op.name,
                family(node),
                attributes,
                (type(node.op).__doc__ or "").partition("\n\n")[0],
            ]

        return self.ops.add((type(node.op), node.op), row)

    def cost(self, node: Node) -> tuple[int, int]:
        key = (node.op, tuple([v.type for v in node.inputs]))
        if key not in self.costs:
            cost = cost_of(node)
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

    # --- what a pass changed ---

    def described(self, rows: list[tuple[Any, ...]], outside: list[tuple[str, int, str]]) -> dict[str, Any]:
        """By name of its first result, each node's index and what must agree for it to be unchanged."""
        made = [row[3][i] for row in rows for i in range(0, len(row[3]), 2)]

        def operand(number: int) -> Any:
            if number >= 0:
                return made[number]
            name, type_, _ = outside[-1 - number]
            return ("^", type_) if name.startswith("^") else name

        return {
            self.names.rows[row[3][0]]: (i, (row[0], row[1], tuple(map(operand, row[2])), row[3]))
            for i, row in enumerate(rows)
        }

    def change(self, block: int, old: tuple[int, ...], current: tuple[int, ...], gone: bool) -> int:
        """Index of [new nodes, changed nodes, gone nodes by old block], nodes by index in their blocks."""

        def row() -> list[Any]:
            before = {name: line for b in old for name, (_, line) in self.lines[b].items()}
            here = self.lines[block]
            new = [i for name, (i, _) in here.items() if name not in before]
            changed = [i for name, (i, line) in here.items() if name in before and before[name] != line]
            kept = {name for b in current for name in self.lines[b]}
            left = (
                [[b, i] for b in old for name, (i, _) in self.lines[b].items() if name not in kept]
                if gone
                else []
            )
            by_block: dict[int, list[int]] = {}
            for b, i in left:
                by_block.setdefault(b, [b]).append(i)
            return [new, changed, list(by_block.values())]

        return self.changes.add((block, old, current, gone), row)


def _moves(value: Value) -> bool:
    """Does the value's name depend on which layer reads it? Also true of what the first layer reads."""
    assert value.node is not None
    return bool(layer_of(value.node.scope)) or value.node.op.name == "expand_streams"
