"""Turns a graph into launches: an order, and which nodes share a launch.

Launches run one after the other, in an order that keeps what data and shared bytes ask for: a result is read
after it is made, a state's old contents are read before they are overwritten. A reshape is no launch: its
result is a view of its operand's bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from dsv4c.ir.graph import Graph, Kind, Node, Value


@dataclass(frozen=True)
class Group:
    """Ops that may share a launch, in this order. `chained`: the later of them read what the first makes;
    otherwise none of them waits for another, and all are of one layer.
    """

    ops: tuple[str, ...]
    chained: bool = False

    def takes(self, names: Sequence[str]) -> bool:
        """May ops of these names, in the order of a graph, share a launch?"""
        turns = [self.ops.index(name) for name in names if name in self.ops]
        return len(turns) == len(names) and (not self.chained or turns == sorted(turns))


@dataclass(frozen=True)
class Schedule:
    """Launches in order, each a few nodes, most of them one. `views` maps every value that is another one's
    bytes to the value that owns them.
    """

    launches: tuple[tuple[Node, ...], ...]
    views: Mapping[Value, Value]

    def owner(self, value: Value) -> Value:
        """The value whose bytes `value` is: itself, what it reshapes, or the state it was written to."""
        return self.views.get(value, value)


def schedule(graph: Graph, groups: Sequence[Group] = ()) -> Schedule:
    """Launches of `graph` in the order of its nodes; those of one of `groups` share one where they may."""
    views = find_views(graph)
    nodes = tuple(node for node in graph.nodes if node.outputs[0] not in views or node.op.alias)
    if not groups:
        return Schedule(tuple((node,) for node in nodes), views)
    ops = tuple((node.place.layer, node.op.name) for node in nodes)
    launches = _grouped(ops, tuple(map(frozenset, _waits(nodes, views))), tuple(groups))
    return Schedule(tuple(tuple(nodes[i] for i in members) for members in launches), views)


@cache
def _grouped(
    ops: tuple[tuple[str, str], ...], waits: tuple[frozenset[int], ...], groups: tuple[Group, ...]
) -> tuple[tuple[int, ...], ...]:
    """Launches, as places among `ops` (layer, name), in an order that keeps all waits: each where its last
    member was. Graphs of several buckets differ in sizes alone, so that they share an answer.
    """
    import networkx as nx  # costs 0.1 s, and only GPU targets group

    order = nx.DiGraph()  # of launches, each by its first member
    order.add_nodes_from(range(len(ops)))
    order.add_edges_from((wait, index) for index, own in enumerate(waits) for wait in own)
    members = {i: [i] for i in range(len(ops))}
    kinds: dict[int, Group] = {}  # of launches of several nodes
    open_: dict[str, list[int]] = {}  # launches of a layer that may grow

    def joined(host: int, index: int) -> Group | None:
        """The group as whose a node may join a launch."""
        names = [ops[i][1] for i in (*members[host], index)]
        known = [kinds[host]] if host in kinds else groups
        for group in known:
            if group.takes(names) and _may_join(order, host, index, group):
                return group
        return None

    for index, (layer, name) in enumerate(ops):
        if not layer or not any(name in group.ops for group in groups):
            continue
        hosts = open_.setdefault(layer, [])
        before = [host for host in order.predecessors(index) if host not in hosts]  # of another layer
        for host in (*hosts, *before):
            if (group := joined(host, index)) is not None:
                kinds[host] = group
                members[host] += members.pop(index)
                nx.contracted_nodes(order, host, index, self_loops=False, copy=False)
                break
        else:
            hosts.append(index)
    last = {host: own[-1] for host, own in members.items()}
    for host, group in kinds.items():
        members[host].sort(key=lambda i: group.ops.index(ops[i][1]))
    ordered = nx.lexicographical_topological_sort(order, last.__getitem__)
    return tuple(tuple(members[host]) for host in ordered)


def _may_join(order: Any, host: int, index: int, group: Group) -> bool:
    """May a node join a launch? Not if it would wait for a third launch that waits for the host; and it reads
    the host's results if the group is chained, else nothing of it.
    """
    import networkx as nx

    if not group.chained:
        return not nx.has_path(order, host, index) and not nx.has_path(order, index, host)
    if not order.has_edge(host, index):
        return False
    others = [after for after in order.successors(host) if after != index]
    return not any(nx.has_path(order, after, index) for after in others)


def find_views(graph: Graph) -> dict[Value, Value]:
    """Values that take no bytes of their own, and the value that owns their bytes.

    Those are writes to a state (owned by the state) and reshapes. A reshaped state is copied: it is a value,
    which a later write to the state must not change.
    """
    views = {value: root for value, root in graph.root_of.items() if value is not root}
    for node in graph.nodes:
        if node.op.view and node.inputs[0] not in graph.root_of:
            views[node.outputs[0]] = views.get(node.inputs[0], node.inputs[0])
    return views


def _waits(nodes: tuple[Node, ...], views: Mapping[Value, Value]) -> list[set[int]]:
    """Every node's direct waits: makers of what it reads and, where it overwrites, earlier readers."""
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
