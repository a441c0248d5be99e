"""Match: find the occurrences of a fused body in a working graph.

A search starts at the body's rarest op and follows the wiring, capturing fields; then the body is traced with
what was found, and every op and attribute compared. A match is refused where a reader outside, a cycle, an
alias or the guard forbids it; the furthest failure of a search is kept as its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, replace
from itertools import product
from typing import Any

from dsv4c.errors import GraphError
from dsv4c.ir.fused import (
    OPERANDS,
    Fused,
    Pattern,
    operand_counts,
    optional_fields,
    own_fields,
    sketches,
    trace,
)
from dsv4c.ir.graph import Node, Value
from dsv4c.ir.holes import holes_in, is_hole
from dsv4c.passes.work import Match, Work

Guard = Callable[[Match], str | None]
"""Looks at a finished match and may refuse it, by returning the reason."""


@dataclass
class Failure:
    """The furthest point of a search from one anchor, and the constraint that did not hold there."""

    matched: int = -1
    of: int = 0
    cause: str = ""
    at: str = ""
    expected: Any = ""
    found: Any = ""
    match: Match | None = None


BUDGET = 4000  # steps of one search; equal siblings would otherwise be tried in every order before a refusal


class Search:
    """The occurrences of one fused op in a working graph, and where each search that found none failed."""

    def __init__(self, work: Work, op: type[Fused], guard: Guard | None = None) -> None:
        self.work, self.op, self.guard = work, op, guard
        self.tried: set[Node] = set()
        self.failures: dict[Node, Failure] = {}
        self.failure = Failure()
        self.steps = 0

    def matches(self) -> Iterator[Match]:
        """One occurrence after the other; each is to be replaced before the next is asked for."""
        for count, fields in self.shapes():
            for anchor in self.anchors(count, fields):
                if anchor not in self.work.low:
                    continue  # taken by a match since
                self.failure, self.steps = Failure(), 0
                match = self.search_from(anchor, count, fields)
                if match is None and not self.failure.cause:
                    continue  # nothing was proposed
                self.tried.add(anchor)
                if match is None:
                    if anchor not in self.failures or self.failures[anchor].matched < self.failure.matched:
                        self.failures[anchor] = self.failure
                    continue
                yield match

    def shapes(self) -> Iterator[tuple[int | None, dict[str, Any]]]:
        """The shapes of the body: counts of operands (None: proposed), optional fields present or None."""
        optional = optional_fields(self.op)
        for count in operand_counts(self.op) or (None,):
            for absent in product((False, True), repeat=len(optional)):
                yield count, {name: None for name, gone in zip(optional, absent, strict=True) if gone}

    def anchors(self, count: int | None, fields: dict[str, Any]) -> list[Node]:
        """Nodes to start from: of the declared anchor, else of the body's rarest op in this graph."""
        kind = self.op.anchor
        if kind is None:
            ways = [
                {type(n.op): None for n in p.nodes}
                for p in sketches(self.op, count or 0, tuple(sorted(fields.items())))
            ]
            shared = [k for k in ways[0] if all(k in way for way in ways)]
            kind = min(shared, key=lambda k: len(self.work.by_op.get(k, ())))
        return list(self.work.by_op.get(kind, ()))

    def search_from(self, anchor: Node, count: int | None, fields: dict[str, Any]) -> Match | None:
        for proposal in self.op.propose(anchor, self.work):
            shape = {name for name in optional_fields(self.op) if proposal.get(name, 0) is None}
            if not shape <= fields.keys() or any(proposal.get(name) is not None for name in fields):
                continue  # it belongs to another shape
            known = {**proposal, **fields}
            operands = known.pop(OPERANDS, count)
            given = {label: known.pop(label) for label in self.op.apart}
            if count not in (None, operands):
                continue  # it belongs to another shape
            for pattern in sketches(self.op, operands, tuple(sorted(known.items()))):
                places = [i for i, n in enumerate(pattern.nodes) if type(n.op) is type(anchor.op)]
                if not places:
                    continue
                match = _Wiring(self, pattern, anchor, places[0], given).step(0)
                if match is not None:
                    return match
        return None

    def finish(self, match: Match) -> Match | None:
        """The last refusals: escapes, aliases, guard, cycles. Returns the match with `keep` set, or None."""
        inside = set(match.nodes)
        kept = self.keep(match, inside)
        reason = self.objection(match, inside) if kept is None else self.objection(kept, inside)
        if reason is None:
            return kept
        self.fail(len(match.nodes), len(match.nodes), *reason, match)
        return None

    def keep(self, match: Match, inside: set[Node]) -> Match | None:
        """The match with only those results that somebody reads; None when nobody reads any."""
        keep = tuple(
            i
            for i, value in enumerate(match.results)
            if i in match.op.alias or value in self.work.outputs or self.outside(value, inside)
        )
        if not keep:
            return None
        return match if len(keep) == len(match.results) else replace(match, op=replace(match.op, keep=keep))

    def outside(self, value: Value, inside: set[Node]) -> list[Node]:
        return [n for n in self.work.users(value) if n not in inside]

    def objection(self, match: Match, inside: set[Node]) -> tuple[str, str, str, str] | None:
        """Why a complete match must not be replaced: (cause, at, expected, found)."""
        work, results = self.work, set(match.results)
        for value in match.operands:
            if work.producer(value) in inside:
                return "cycle", value.name, "an operand made outside", f"%{value.name} is an inner value"
        for node in match.nodes:
            for value in node.outputs:
                readers = self.outside(value, inside)
                if value not in results and (readers or value in work.outputs):
                    reader = f"{readers[0].op.name} {readers[0].name}" if readers else "the graph's outputs"
                    found = f"inner value %{value.name} escapes to {reader}"
                    return "escape", value.name, "no reader outside", found
        if self.keep(match, inside) is None:
            return "dead", match.results[0].name, "a reader of a result", "nobody"
        for operand in match.op.alias.values():
            if match.operands.count(match.operands[operand]) > 1:
                name = match.operands[operand].name
                return "alias", name, "one use of the overwritten operand", f"%{name} is two operands"
        refused = self.guard(match) if self.guard else None
        if refused:
            return "guard", match.name, "the rule's guard to agree", refused
        detour = work.way_back(inside)
        if detour is not None:
            expected = "no path out of the body and back in"
            return "cycle", detour.name, expected, f"one through {detour.op.name} {detour.name}"
        return None

    def fail(
        self,
        matched: int,
        of: int,
        cause: str,
        at: str,
        expected: Any,
        found: Any,
        match: Match | None = None,
    ) -> None:
        if matched > self.failure.matched:
            self.failure = Failure(matched, of, cause, at, expected, found, match)


class _Wiring:
    """One pattern laid over the graph around an anchor, by depth-first search with undo."""

    def __init__(
        self, search: Search, pattern: Pattern, anchor: Node, place: int, given: Mapping[str, Value]
    ) -> None:
        self.search, self.pattern, self.anchor = search, pattern, anchor
        self.bound = {v: given[v.name] for v in pattern.operands if v.name in given}
        if place not in pattern.plans:
            pattern.plans[place] = _plan(pattern, place, self.bound)
        self.plan = pattern.plans[place]
        self.assigned: dict[int, Node] = {}
        self.fields: dict[str, Any] = dict(pattern.fields)

    def step(self, i: int) -> Match | None:
        if i == len(self.plan):
            return self.matched()
        place, via, made = self.plan[i]
        wanted = self.pattern.nodes[place]
        for node in self.candidates(i, wanted, via, made):
            if any(node is n for n in self.assigned.values()):
                continue
            for inputs in _orders(node):
                self.search.steps += 1
                if self.search.steps > BUDGET:
                    return None
                undo = self.bind(place, wanted, node, inputs)
                if undo is None:
                    continue
                match = self.step(i + 1)
                if match is not None:
                    return match
                self.unbind(place, undo)
        return None

    def candidates(self, i: int, wanted: Node, via: Value | None, made: bool) -> list[Node]:
        work = self.search.work
        if via is None:
            return [self.anchor]
        value = self.bound[via]
        if made:
            maker = work.producer(value)
            if maker is not None and type(maker.op) is type(wanted.op):
                return [maker]
            found = maker.op.name if maker else f"{value.kind.value} {value!r}"
            self.fail("op", value.name, wanted.op.name, found)
            return []
        readers = work.users(value)
        fitting = [n for n in readers if type(n.op) is type(wanted.op)]
        if not any(n not in self.assigned.values() for n in fitting):
            names = sorted({n.op.name for n in readers if n not in self.assigned.values()})
            found = ", ".join(names) or ("the graph's outputs" if value in work.outputs else "nobody")
            self.fail("op", value.name, f"{wanted.op.name} reading %{value.name}", found)
        return fitting

    def bind(self, place: int, wanted: Node, node: Node, inputs: tuple[Value, ...]) -> list[Any] | None:
        """Let pattern node `place` stand for `node`; returns what to undo, or None on disagreement."""
        if len(inputs) != len(wanted.inputs) or len(node.outputs) != len(wanted.outputs):
            expected = f"{len(wanted.inputs)} operands and {len(wanted.outputs)} results"
            self.fail("operand", node.name, expected, f"{len(inputs)} and {len(node.outputs)}")
            return None
        undo: list[Any] = []
        for theirs, ours in zip((*wanted.inputs, *wanted.outputs), (*inputs, *node.outputs), strict=True):
            known = self.bound.get(theirs)
            if known is None:
                self.bound[theirs] = ours
                undo.append(theirs)
            elif known is not ours:
                self.fail("operand", node.name, f"%{known.name} as {theirs.name}", f"%{ours.name}")
                self.unbind(place, undo)
                return None
        actual = node.op.attributes()
        for name, attribute in wanted.op.attributes().items():
            wrong = self.unify(attribute, actual.get(name), undo)
            if wrong is not None:
                self.fail("attribute", f"{node.name} {node.op.name}.{name}", *wrong)
                self.unbind(place, undo)
                return None
        self.assigned[place] = node
        return undo

    def unify(self, wanted: Any, actual: Any, undo: list[Any]) -> tuple[Any, Any] | None:
        """Compare an attribute and capture fields; returns (expected, found) when it disagrees."""
        if is_hole(wanted):
            name = wanted.hole_field
            if not name:
                return None  # computed from what is not known yet: compared once it is
            if name in self.fields:
                return None if _same(self.fields[name], actual) else (self.fields[name], actual)
            self.fields[name] = actual
            undo.append(name)
            return None
        if type(wanted) is tuple and any(True for _ in holes_in(wanted)):
            if type(actual) is not tuple or len(wanted) != len(actual):
                return f"{len(wanted)} numbers", actual
            for w, a in zip(wanted, actual, strict=True):
                wrong = self.unify(w, a, undo)
                if wrong is not None:
                    return wrong
            return None
        return None if _same(wanted, actual) else (wanted, actual)

    def unbind(self, place: int, undo: list[Any]) -> None:
        self.assigned.pop(place, None)
        for key in undo:
            if isinstance(key, str):
                del self.fields[key]
            else:
                del self.bound[key]

    def matched(self) -> Match | None:
        """All is placed: the body traced with real values must be what was found, attribute by attribute."""
        missing = [
            f.name for f in own_fields(self.search.op) if f.name not in self.fields and f.default is MISSING
        ]
        if missing:
            self.fail("field", self.anchor.name, f"{', '.join(missing)} to follow from the graph", "nothing")
            return None
        operands = tuple(self.bound[v] for v in self.pattern.operands)
        try:
            op = self.search.op(**self.fields)
            body = trace(op, tuple(v.type for v in operands))
        except GraphError as error:
            self.fail("type", self.anchor.name, "operands that the body accepts", str(error))
            return None
        nodes = tuple(self.assigned[i] for i in range(len(self.pattern.nodes)))
        if [type(n.op) for n in body.graph.nodes] != [type(n.op) for n in nodes]:
            wanted_ops = " ".join(n.op.name for n in body.graph.nodes)
            self.fail("type", self.anchor.name, wanted_ops, " ".join(n.op.name for n in nodes))
            return None
        values = dict(zip(body.graph.inputs, operands, strict=True))
        for wanted, node in zip(body.graph.nodes, nodes, strict=True):
            for name, attribute in wanted.op.attributes().items():
                found = node.op.attributes().get(name)
                if not _same(attribute, found):
                    self.fail("attribute", f"{node.name} {node.op.name}.{name}", attribute, found)
                    return None
            inputs = tuple(values[v] for v in wanted.inputs)
            if wanted.op != node.op or inputs not in _orders(node):
                names = [", ".join(v.name for v in values_) for values_ in (inputs, node.inputs)]
                self.fail("operand", node.name, *names)
                return None
            values.update(zip(wanted.outputs, node.outputs, strict=True))
        match = Match(op, nodes, operands, tuple(values[v] for v in body.results))
        return self.search.finish(match)

    def fail(self, cause: str, at: str, expected: Any, found: Any) -> None:
        self.search.fail(len(self.assigned), len(self.pattern.nodes), cause, at, expected, found)


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and bool(a == b))


def _orders(node: Node) -> list[tuple[Value, ...]]:
    if node.op.commutative and node.inputs[0] is not node.inputs[1]:
        return [node.inputs, (node.inputs[1], node.inputs[0])]
    return [node.inputs]


def _plan(pattern: Pattern, start: int, given: Iterable[Value]) -> list[tuple[int, Value | None, bool]]:
    """Order of search: (node, the bound value that leads to it, whether the node makes that value).

    Makers come first, there is only one to look at; then readers of inner values; readers of operands last,
    for an operand such as the positions may have hundreds.
    """
    plan: list[tuple[int, Value | None, bool]] = [(start, None, False)]
    done, bound = {start}, {*given, *pattern.nodes[start].inputs, *pattern.nodes[start].outputs}
    while True:
        best: tuple[int, int, Value, bool] | None = None
        for i, node in enumerate(pattern.nodes):
            if i in done:
                continue
            for value in (*node.outputs, *node.inputs):
                if value not in bound:
                    continue
                made = value in node.outputs
                rank = 0 if made else 1 if value in pattern.makers else 2
                if best is None or rank < best[0]:
                    best = (rank, i, value, made)
        if best is None:
            return plan
        _, i, value, made = best
        done.add(i)
        bound |= {*pattern.nodes[i].inputs, *pattern.nodes[i].outputs}
        plan.append((i, value, made))
