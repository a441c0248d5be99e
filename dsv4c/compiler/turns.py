"""What a plan's launches compute together, and what of it can be read in memory afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from dsv4c.ir.graph import Graph, Node, Value
from dsv4c.plan.records import Launch


@dataclass(frozen=True)
class Turn:
    """A few launches in a row, the nodes that they compute together, in order, and those of their results
    that are in memory after them: what others read, and what the last one stored for nobody. A selection and
    its weights come in an order of the kernel's own, so neither may be taken from memory without the other.
    `inner` are results that only nodes of the turn read: launches store them as far as these need them.
    """

    launches: tuple[Launch, ...]
    nodes: tuple[Node, ...]
    written: tuple[Value, ...]
    inner: tuple[Value, ...]


def turns_of(graph: Graph, launches: Sequence[Launch]) -> Iterator[Turn]:
    """The turns of a program, in order."""
    nodes = {node.name: node for node in graph.nodes}
    outputs = set(graph.outputs.values())
    for names, group in groupby(launches, key=lambda launch: launch.nodes):
        parts = tuple(group)
        own = tuple(nodes[name] for name in names)
        stored, last = (
            {a.value for launch in some for a in launch.arguments if "w" in a.access}
            for some in (parts, parts[-1:])
        )
        written: dict[Value, Value] = {}  # by the state whose bytes it is, or itself
        inner = []
        for node in own:
            for i, v in enumerate(node.outputs):
                overwritten = node.inputs[node.op.alias[i]].name if i in node.op.alias else v.name
                seen = v in graph.root_of or v in outputs or any(u not in own for u in graph.users[v])
                for_nobody = set[str]() if any(u in own for u in graph.users[v]) else last
                if not (stored if seen else for_nobody).isdisjoint((v.name, overwritten)):
                    written[graph.root_of.get(v, v)] = v
                elif v.name in stored:
                    inner.append(v)
        yield Turn(parts, own, tuple(written.values()), tuple(inner))
