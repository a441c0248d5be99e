"""Turns a graph into launches: an order, what each waits for, and which independent nodes share a launch.

Waits come from data (a result is read after it is made) and from shared bytes (a state's old contents are
read before they are overwritten). A reshape is no launch: its result is a view of its operand's bytes.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal

from dsv4c.errors import GraphError
from dsv4c.ir.graph import Graph, Kind, Node, Value
from dsv4c.ir.ops.shape import Reshape

Order = Literal["source", "memory"]
LAYERS = ("layers", "mtp")  # scopes that count layers

GROUPS: tuple[tuple[str, ...], ...] = (
    ("in_proj", "linear"),  # one row in two encodings, weights streamed together
    ("q_norm_quantize", "kv_norm_rope_store", "compressor"),  # small work beside a large stream
)
"""Ops of one layer that share a launch, as CTAs of their own, when none of them waits for another.

A launch has them in this order; GPU plans name it after the first.
"""


@dataclass(frozen=True)
class Schedule:
    """Nodes in order. `after[i]` are the nodes that node `i` waits for, without those that one of them
    already waits for. `views` maps every value that is another one's bytes to the value that owns them.
    `groups` are the launches: nodes by index, next to each other in order, most of them alone. Those that no
    wait joins may run beside each other. Whether an edge may be programmatic depends on where the kernel
    behind it waits, so `codegen.lower` decides that, and `dsv4c verify` checks it.
    """

    nodes: tuple[Node, ...]
    after: tuple[tuple[int, ...], ...]
    views: Mapping[Value, Value]
    groups: tuple[tuple[int, ...], ...]

    @cached_property
    def launch_of(self) -> tuple[int, ...]:
        """Which launch each node is in."""
        return tuple(launch for launch, members in enumerate(self.groups) for _ in members)

    @cached_property
    def launches(self) -> dict[str, int]:
        """How many launches each layer has, by its scope; "" is what lies outside. Constants are none."""
        counts: dict[str, int] = {}
        for members in self.groups:
            first = self.nodes[members[0]]
            if first.inputs:
                layer = layer_of(first)
                counts[layer] = counts.get(layer, 0) + 1
        return counts

    def owner(self, value: Value) -> Value:
        """The value whose bytes `value` is: itself, what it reshapes, or the state it was written to."""
        return self.views.get(value, value)


def layer_of(node: Node) -> str:
    """The layer that a node belongs to ("layers.3", "mtp.0"), or "" outside of layers."""
    return layer_in(node.scope)


def layer_in(scope: str) -> str:
    """The layer that a scope lies in, or ""."""
    kind, _, rest = scope.partition(".")
    number = rest.partition(".")[0]
    return f"{kind}.{number}" if kind in LAYERS and number.isdecimal() else ""


def schedule(graph: Graph, order: Order = "source", groups: Sequence[Sequence[str]] = GROUPS) -> Schedule:
    """Launches of `graph` in the order of its nodes, or in one that needs less memory where there is one.

    Ops of a set in `groups` share a launch where they may. Raises GraphError for an unknown order.
    """
    views = find_views(graph)
    nodes = tuple(node for node in graph.nodes if node.outputs[0] not in views or node.op.alias)
    waits = _waits(nodes, views)
    if order == "memory":
        nodes, waits = _saving(graph, nodes, waits, views)
    elif order != "source":
        raise GraphError(f"unknown order {order!r}; expected 'source' or 'memory'")
    members = _grouped(nodes, waits, groups)
    picked = [i for group in members for i in group]
    nodes, waits = _reordered(nodes, waits, picked)
    ends = list(accumulate(len(group) for group in members))
    launches = tuple(tuple(range(end - len(group), end)) for end, group in zip(ends, members, strict=True))
    return Schedule(nodes, tuple(_reduce(waits)), views, launches)


def _saving(
    graph: Graph, nodes: tuple[Node, ...], waits: list[set[int]], views: Mapping[Value, Value]
) -> tuple[tuple[Node, ...], list[set[int]]]:
    """The thrifty order, if it has a lower peak than the given one."""
    better, moved = _reordered(nodes, waits, _thrifty(graph, nodes, waits, views))
    if peak_bytes(graph, better, views) >= peak_bytes(graph, nodes, views):
        return nodes, waits
    return better, moved


def _reordered(
    nodes: tuple[Node, ...], waits: list[set[int]], picked: list[int]
) -> tuple[tuple[Node, ...], list[set[int]]]:
    place = {old: new for new, old in enumerate(picked)}
    return tuple(nodes[i] for i in picked), [{place[w] for w in waits[old]} for old in picked]


def _grouped(
    nodes: tuple[Node, ...], waits: list[set[int]], kinds: Sequence[Sequence[str]]
) -> list[list[int]]:
    """Launches as lists of nodes, in an order that keeps all waits: each where its last member was."""
    import networkx as nx

    order = nx.DiGraph()  # of launches, each by its first member
    order.add_nodes_from(range(len(nodes)))
    order.add_edges_from((wait, index) for index, own in enumerate(waits) for wait in own)
    members = {i: [i] for i in range(len(nodes))}
    open_: dict[tuple[str, int], list[int]] = {}  # launches of a layer that may grow
    for index, node in enumerate(nodes):
        layer = layer_of(node)
        for kind, names in enumerate(kinds):
            if not layer or node.op.name not in names:
                continue
            hosts = open_.setdefault((layer, kind), [])
            host = next((h for h in hosts if not _ordered(order, h, index)), None)
            if host is None:
                hosts.append(index)
                continue
            members[host] += members.pop(index)
            nx.contracted_nodes(order, host, index, copy=False)
    turn = {name: i for names in kinds for i, name in enumerate(names)}
    return [
        sorted(members[host], key=lambda i: turn.get(nodes[i].op.name, 0))
        for host in nx.lexicographical_topological_sort(order, lambda launch: members[launch][-1])
    ]


def _ordered(order: Any, a: int, b: int) -> bool:
    """Does one of two launches have to wait for the other, directly or through others?"""
    import networkx as nx

    return bool(nx.has_path(order, a, b) or nx.has_path(order, b, a))


def find_views(graph: Graph) -> dict[Value, Value]:
    """Values that take no bytes of their own, and the value that owns their bytes.

    Those are writes to a state (owned by the state) and reshapes. A reshaped state is copied: it is a value,
    which a later write to the state must not change.
    """
    views = {value: root for value, root in graph.root_of.items() if value is not root}
    for node in graph.nodes:
        if isinstance(node.op, Reshape) and node.inputs[0] not in graph.root_of:
            views[node.outputs[0]] = views.get(node.inputs[0], node.inputs[0])
    return views


def peak_bytes(graph: Graph, nodes: tuple[Node, ...], views: Mapping[Value, Value]) -> int:
    """The most bytes of results alive at once when `nodes` run one after the other."""
    change = [0] * (len(nodes) + 1)
    for value, (first, last) in lifetimes(graph, nodes, views).items():
        change[first] += value.type.extent
        change[last + 1] -= value.type.extent
    peak = alive = 0
    for delta in change:
        alive += delta
        peak = max(peak, alive)
    return peak


def lifetimes(
    graph: Graph, nodes: tuple[Node, ...], views: Mapping[Value, Value]
) -> dict[Value, tuple[int, int]]:
    """For every result that owns bytes outside of states: the launch that makes it and the last that reads it
    or a view of it. Outputs of the graph live to the end."""
    spans: dict[Value, tuple[int, int]] = {}
    for index, node in enumerate(nodes):
        for value in node.inputs:
            owner = views.get(value, value)
            if owner in spans:
                spans[owner] = (spans[owner][0], index)
        for value in node.outputs:
            if value not in views:
                spans[value] = (index, index)
    for value in graph.outputs.values():
        owner = views.get(value, value)
        if owner in spans:
            spans[owner] = (spans[owner][0], len(nodes) - 1)
    return spans


def _waits(nodes: tuple[Node, ...], views: Mapping[Value, Value]) -> list[set[int]]:
    """Every launch's direct waits: makers of what it reads and, where it overwrites, earlier readers."""
    maker: dict[Value, int] = {}  # of a value that owns bytes: its last writer
    readers: dict[Value, list[int]] = {}  # of a state, since its last write
    waits: list[set[int]] = []
    for index, node in enumerate(nodes):
        own: set[int] = set()
        for value in node.inputs:
            owner = views.get(value, value)
            if owner in maker:
                own.add(maker[owner])
        overwritten = {views.get(node.inputs[o], node.inputs[o]) for o in node.op.alias.values()}
        for owner in overwritten:
            own.update(readers.pop(owner, ()))
            maker[owner] = index
        for value in node.inputs:
            owner = views.get(value, value)
            if owner.kind is Kind.STATE and owner not in overwritten:
                readers.setdefault(owner, []).append(index)
        for value in node.outputs:
            if value not in views:
                maker[value] = index
        waits.append(own)
    return waits


def _reduce(waits: list[set[int]]) -> list[tuple[int, ...]]:
    """Drops every wait that another wait implies. Sets of launches are bits of an integer."""
    before: list[int] = []
    reduced = []
    for own in waits:
        covered, kept = 0, []
        for wait in sorted(own, reverse=True):
            if not covered >> wait & 1:
                kept.append(wait)
                covered |= before[wait] | 1 << wait
        before.append(covered)
        reduced.append(tuple(reversed(kept)))
    return reduced


def _thrifty(
    graph: Graph, nodes: tuple[Node, ...], waits: list[set[int]], views: Mapping[Value, Value]
) -> list[int]:
    """A list schedule: of the launches that may go, the one that adds the fewest bytes (source order decides
    between equals). Costs are looked up when a launch becomes ready and again when it is taken."""
    spans = lifetimes(graph, nodes, views)
    kept = {views.get(v, v) for v in graph.outputs.values()}
    reads = [{views.get(v, v) for v in node.inputs} & spans.keys() for node in nodes]
    left = dict.fromkeys(spans, 0)
    for owners in reads:
        for owner in owners:
            left[owner] += 1
    blocked = [len(own) for own in waits]
    followers: list[list[int]] = [[] for _ in nodes]
    for index, own in enumerate(waits):
        for wait in own:
            followers[wait].append(index)

    def growth(index: int) -> int:
        made = sum(v.type.extent for v in nodes[index].outputs if v in spans)
        freed = sum(v.type.extent for v in reads[index] if left[v] == 1 and v not in kept)
        return made - freed

    ready = [(growth(i), i) for i, count in enumerate(blocked) if not count]
    heapq.heapify(ready)
    picked: list[int] = []
    while ready:
        cost, index = heapq.heappop(ready)
        now = growth(index)
        if now != cost and ready and (now, index) > ready[0]:
            heapq.heappush(ready, (now, index))
            continue
        picked.append(index)
        for owner in reads[index]:
            left[owner] -= 1
        for follower in followers[index]:
            blocked[follower] -= 1
            if not blocked[follower]:
                heapq.heappush(ready, (growth(follower), follower))
    return picked
