"""What differs between two graphs: nodes gone, new and changed, and what that does to launches and bytes.

Nodes are matched by the name of their first result, which passes keep for what they leave alone. A node is
changed when its op, scope, result types or operands differ; an operand counts by its name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from dsv4c.ir.graph import Graph, Node
from dsv4c.ir.text import print_node
from dsv4c.ir.totals import totals
from dsv4c.scope import LAYERS, Scope


@dataclass(frozen=True, eq=False)
class Change:
    """A node that both graphs have under one name."""

    before: Node
    after: Node


@dataclass(frozen=True, eq=False)
class Difference:
    """From graph `a` to graph `b`; signature lists inputs, states, params and outputs that came, went or are
    another value, and whether nodes that both have stand in another order.
    """

    a: Graph
    b: Graph
    gone: tuple[Node, ...]
    new: tuple[Node, ...]
    changed: tuple[Change, ...]
    signature: tuple[str, ...]

    @property
    def empty(self) -> bool:
        return not (self.gone or self.new or self.changed or self.signature)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: node lines, and the totals of both sides."""
        return {
            "a": self.a.name,
            "b": self.b.name,
            "gone": [print_node(n) for n in self.gone],
            "new": [print_node(n) for n in self.new],
            "changed": [[print_node(c.before), print_node(c.after)] for c in self.changed],
            "signature": list(self.signature),
            "before": asdict(totals(self.a)),
            "after": asdict(totals(self.b)),
        }

    def text(self, limit: int = 20) -> str:
        """A report: totals, then by op name what came and went, then up to `limit` nodes of each sort."""
        if self.empty:
            return f"{self.a.name} and {self.b.name} are equal: {len(self.a.nodes)} nodes\n"
        before, after = totals(self.a), totals(self.b)
        lines = [
            f"{self.a.name} -> {self.b.name}",
            f"  nodes     {before.nodes:>16,} -> {after.nodes:>16,}",
            f"  launches  {before.launches:>16,} -> {after.launches:>16,}",
            f"  bytes     {before.bytes:>16,} -> {after.bytes:>16,}",
        ]
        lines += [f"  {line}" for line in self.signature]
        for word, sign, nodes in (("gone", "-", self.gone), ("new", "+", self.new)):
            if nodes:
                lines.append(f"{word}: {len(nodes)} ({_by_op(nodes)})")
                lines += _limited([f"  {sign} {print_node(n, origins=False)}" for n in nodes], limit)
        if self.changed:
            lines.append(f"changed: {len(self.changed)} ({_by_op(c.after for c in self.changed)})")
            pairs = [
                f"  ~ {print_node(c.before, origins=False)}\n    {print_node(c.after, origins=False)}"
                for c in self.changed
            ]
            lines += _limited(pairs, limit)
        return "\n".join(lines) + "\n"


def diff(a: Graph, b: Graph) -> Difference:
    """What happened to `a` to make it `b`."""
    before = {node.name: node for node in a.nodes}
    after = {node.name: node for node in b.nodes}
    changed = [
        Change(before[name], node)
        for name, node in after.items()
        if name in before and not alike(before[name], node)
    ]
    return Difference(
        a,
        b,
        tuple(node for name, node in before.items() if name not in after),
        tuple(node for name, node in after.items() if name not in before),
        tuple(changed),
        tuple(_signature(a, b)),
    )


def alike(a: Node, b: Node) -> bool:
    """Is it the same node in two graphs?"""
    if a is b:
        return True
    return (
        (a.op is b.op or a.op == b.op)
        and a.scope == b.scope
        and [v.name for v in a.inputs] == [v.name for v in b.inputs]
        and [v.name for v in a.outputs] == [v.name for v in b.outputs]
        and [v.type for v in a.outputs] == [v.type for v in b.outputs]
    )


def _signature(a: Graph, b: Graph) -> Iterable[str]:
    for word in ("inputs", "states", "params"):
        old = {v.name: v.type for v in getattr(a, word)}
        new = {v.name: v.type for v in getattr(b, word)}
        yield from _declarations(word.removesuffix("s"), old, new)
    for label, value in a.outputs.items():
        if label not in b.outputs:
            yield f"- output {label}"
        elif b.outputs[label].type != value.type:
            yield f"~ output {label}: {value.type} -> {b.outputs[label].type}"
        elif b.outputs[label].name != value.name:
            yield f"~ output {label}: %{value.name} -> %{b.outputs[label].name}"
    yield from (f"+ output {label}" for label in b.outputs if label not in a.outputs)
    names = {node.name for node in a.nodes} & {node.name for node in b.nodes}
    orders = [[node.name for node in graph.nodes if node.name in names] for graph in (a, b)]
    moved = sum(one != other for one, other in zip(*orders, strict=True))
    if moved:
        yield f"~ order: {moved:,} nodes stand elsewhere"


def _declarations(word: str, old: dict[str, Any], new: dict[str, Any]) -> Iterable[str]:
    """Declarations that differ, those of equal layers folded into one line with a count."""
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for name in {**old, **new}:
        scope = Scope.of(name)
        rest = f"{LAYERS}.*{name[len(scope.layer) :]}" if scope.block == LAYERS else name
        if name not in new:
            grouped.setdefault(("-", rest, str(old[name])), []).append(name)
        elif name not in old:
            grouped.setdefault(("+", rest, str(new[name])), []).append(name)
        elif old[name] != new[name]:
            grouped.setdefault(("~", rest, f"{old[name]} -> {new[name]}"), []).append(name)
    for (sign, rest, type_), names in grouped.items():
        count = f" (x{len(names)})" if len(names) > 1 else ""
        yield f"{sign} {word} %{rest if len(names) > 1 else names[0]}: {type_}{count}"


def _by_op(nodes: Iterable[Node]) -> str:
    counts: dict[str, int] = {}
    for node in nodes:
        counts[node.op.name] = counts.get(node.op.name, 0) + 1
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name} {count}" for name, count in ordered)


def _limited(lines: list[str], limit: int) -> list[str]:
    more = len(lines) - limit
    return [*lines[:limit], f"  ... and {more} more"] if more > 0 else lines
