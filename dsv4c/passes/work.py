"""The graph while it is folded: who makes, reads and overwrites each value, kept up to date by each match.

A graph is frozen, and a fold replaces hundreds of subgraphs: nodes are exchanged here, values stay, and one
new graph is built at the end.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dsv4c.errors import GraphError
from dsv4c.ir.fused import Fused
from dsv4c.ir.graph import Builder, Graph, Node, Value
from dsv4c.ir.op import Op


@dataclass(frozen=True)
class Match:
    """One occurrence: the body's nodes in its order, and the graph's values for its operands and results."""

    op: Fused
    nodes: tuple[Node, ...]
    operands: tuple[Value, ...]
    results: tuple[Value, ...]

    @property
    def name(self) -> str:
        return self.op.kept(self.results)[0].name  # type: ignore[no-any-return]


class Work:
    """A graph being folded. Fused nodes produce the very values of the nodes they replace."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.outputs = set(graph.outputs.values())
        self._number(list(graph.nodes))
        self.made_by = {v: node for node in self.nodes for v in node.outputs}
        self.readers: dict[Value, list[Node]] = {}
        self.overwritten_by: dict[Value, Node] = {}
        self.by_op: dict[type[Op], list[Node]] = {}
        for node in self.nodes:
            self._enter(node)

    def _number(self, nodes: list[Node]) -> None:
        """Take this order: every node has one place in it."""
        self.nodes = nodes
        self.low = {node: i for i, node in enumerate(nodes)}
        self.high = dict(self.low)
        self.straddling: list[Node] = []

    def _enter(self, node: Node) -> None:
        for value in dict.fromkeys(node.inputs):
            self.readers.setdefault(value, []).append(node)
        for operand in node.op.alias.values():
            self.overwritten_by[node.inputs[operand]] = node
        self.by_op.setdefault(type(node.op), []).append(node)

    def producer(self, value: Value) -> Node | None:
        return self.made_by.get(value)

    def users(self, value: Value) -> Sequence[Node]:
        return self.readers.get(value, ())

    def after(self, node: Node) -> Iterator[Node]:
        """Nodes that must run after `node`: readers of its results, and writers over what it reads."""
        for value in node.outputs:
            yield from self.readers.get(value, ())
        for value in node.inputs:
            writer = self.overwritten_by.get(value)
            if writer is not None and writer is not node:
                yield writer

    def way_back(self, nodes: set[Node]) -> Node | None:
        """A node outside that must run after one of `nodes` and before another, if any."""
        bound = max(self.high[n] for n in nodes)
        # A path may leave a fused node at an earlier place than it came in.
        for group in sorted(self.straddling, key=self.low.__getitem__):
            if self.low[group] < bound:
                bound = max(bound, self.high[group])
        first: dict[Node, Node] = {}
        stack = [(n, n) for node in nodes for n in self.after(node) if n not in nodes]
        while stack:
            node, start = stack.pop()
            if node in first or self.low[node] > bound:
                continue
            first[node] = start
            for follower in self.after(node):
                if follower in nodes:
                    return start
                stack.append((follower, start))
        return None

    def replace(self, match: Match) -> Node:
        """Put the fused node in place of the match's nodes."""
        home = self.made_by[match.results[match.op.home]]
        origin = [name for node in match.nodes for name in node.provenance]
        new = Node(match.op, match.operands, home.scope, tuple(dict.fromkeys(origin)))
        new.outputs = match.op.kept(match.results)
        gone = set(match.nodes)
        self.low[new] = min(self.low[n] for n in gone)
        self.high[new] = max(self.high[n] for n in gone)
        self.straddling.append(new)
        for node in gone:
            for value in dict.fromkeys(node.inputs):
                self.readers[value].remove(node)
            for value in node.outputs:
                del self.made_by[value]
            for operand in node.op.alias.values():
                self.overwritten_by.pop(node.inputs[operand], None)
            self.by_op[type(node.op)].remove(node)
            del self.low[node], self.high[node]
        self.made_by.update(dict.fromkeys(new.outputs, new))
        self._enter(new)
        return new

    def sort(self) -> None:
        """Order the nodes again: each at its last member's place, unless it has to wait for another."""
        ordered = sorted(self.low, key=self.high.__getitem__)
        place = {node: i for i, node in enumerate(ordered)}
        if any(place[follower] < i for node, i in place.items() for follower in self.after(node)):
            ordered = self._waiting_for_others()
        self._number(ordered)
        for nodes in (*self.by_op.values(), *self.readers.values()):
            if len(nodes) > 1:
                nodes.sort(key=self.low.__getitem__)

    def _waiting_for_others(self) -> list[Node]:
        """The nodes, each as near to its last member's place as those that it waits for allow.

        By hand, for it may run once per rule on all nodes: networkx's sort takes three times as long.
        """
        waiting = dict.fromkeys(self.low, 0)
        for node in self.low:
            for follower in set(self.after(node)):
                waiting[follower] += 1
        ready = [(self.high[n], i, n) for i, (n, count) in enumerate(waiting.items()) if not count]
        heapq.heapify(ready)
        ordered: list[Node] = []
        serial = len(waiting)
        while ready:
            _, _, node = heapq.heappop(ready)
            ordered.append(node)
            for follower in dict.fromkeys(self.after(node)):
                waiting[follower] -= 1
                if not waiting[follower]:
                    serial += 1
                    heapq.heappush(ready, (self.high[follower], serial, follower))
        if len(ordered) != len(self.low):
            stuck = next(n for n, count in waiting.items() if count)
            raise GraphError(f"folding closed a cycle through {stuck.name}: a fault of fold itself")
        return ordered

    def rebuild(self) -> Graph:
        builder, values = Builder.like(self.graph)
        for node in self.nodes:
            builder.copy(node, values)
        return builder.finish({key: values[v] for key, v in self.graph.outputs.items()})
