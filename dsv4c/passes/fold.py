"""Fold: find occurrences of fused bodies and replace each by its op; expand is the undo.

A search starts at the body's rarest op and follows the wiring, capturing fields; then the body is traced with
what was found, and every op and attribute compared. Promises: values keep their names, nothing is read before
it is made or after it is overwritten, and every refusal has its reason.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, replace
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
from dsv4c.ir.graph import Builder, Graph, Node, Value, rewrite
from dsv4c.ir.holes import holes_in, is_hole
from dsv4c.ir.op import Cost, Op
from dsv4c.ir.text import print_attribute

COMMUTATIVE = ("add", "mul")
VIEWS = ("reshape",)  # change no byte, so they are no launch


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


@dataclass(frozen=True)
class Rule:
    """A fused op to fold. `guard` may refuse an occurrence by returning the reason."""

    op: type[Fused]
    guard: Callable[[Match], str | None] | None = None

    @property
    def name(self) -> str:
        return self.op.name


@dataclass(frozen=True)
class Applied:
    """One application, by names, with what it saves against its members."""

    rule: str
    node: str
    members: tuple[str, ...]
    launches_saved: int
    bytes_saved: int


@dataclass(frozen=True)
class Refusal:
    """Why an anchor was left alone: the furthest partial match and the constraint that failed first."""

    rule: str
    anchor: str
    scope: str
    matched: int
    of: int
    cause: str  # op | operand | attribute | type | field | escape | cycle | alias | guard | dead
    at: str  # node or value where it failed
    expected: str
    found: str
    launches: int = 0  # what fusing would have saved; bytes are known for complete matches only
    bytes: int = 0


@dataclass
class RuleReport:
    """What one rule did: anchors tried, applications, refusals, time in ms."""

    rule: str
    tried: int = 0
    applied: list[Applied] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    ms: float = 0.0

    @property
    def matched(self) -> int:
        return len(self.applied)


@dataclass
class FoldReport:
    """Reports by rule, in order, and the occurrences themselves for whoever checks them."""

    rules: dict[str, RuleReport] = field(default_factory=dict)
    matches: list[Match] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        return {name: report.matched for name, report in self.rules.items()}


def fold(graph: Graph, rules: Sequence[Rule]) -> tuple[Graph, FoldReport]:
    """`graph` with every occurrence of the rules' bodies replaced, in order of rules, then of the graph.

    Raises GraphError when two rules have one name, or when a body refuses to be traced at all.
    """
    report = FoldReport()
    work = Work(graph)
    for rule in rules:
        if rule.name in report.rules:
            raise GraphError(f"two rules fold {rule.name}; keep one")
        started = time.perf_counter()
        report.rules[rule.name] = _Search(work, rule, report).run()
        if report.rules[rule.name].matched:
            work.sort()
        report.rules[rule.name].ms = 1e3 * (time.perf_counter() - started)
    return (work.rebuild() if any(report.counts.values()) else graph), report


def expand(graph: Graph, names: Iterable[str] | None = None) -> Graph:
    """`graph` with fused ops (those of these names, or all) replaced by their bodies, down to primitives.

    Nodes get the names that their `origin` kept. Raises GraphError for a name no node has.
    """
    wanted = None if names is None else set(names)
    if wanted is not None:
        unknown = wanted - {node.op.name for node in graph.nodes}
        if unknown:
            raise GraphError(f"no node is a {' or a '.join(sorted(unknown))}; nothing to expand")

    reserved = {v.name for v in graph.values()}

    def visit(builder: Builder, node: Node, values: dict[Value, Value]) -> bool:
        if not isinstance(node.op, Fused) or (wanted is not None and node.op.name not in wanted):
            return False
        results = _emit_body(builder, node, [values[v] for v in node.inputs], wanted, reserved)
        values.update(zip(node.outputs, results, strict=True))
        return True

    return rewrite(graph, visit)


def _emit_body(
    builder: Builder, node: Node, operands: Sequence[Value], wanted: set[str] | None, reserved: set[str]
) -> list[Value]:
    """Emit the body of a fused node; kept results take the node's names, others those in its origin."""
    op = node.op
    assert isinstance(op, Fused)
    body = trace(op, tuple(v.type for v in node.inputs))
    labels = {v: w.name for v, w in zip(op.kept(body.results), node.outputs, strict=True)}
    origin = iter(node.origin) if len(node.origin) == body.size else None
    values = dict(zip(body.graph.inputs, operands, strict=True))
    for inner in body.graph.nodes:
        places: Sequence[int] = range(len(inner.outputs))
        size = 0
        if isinstance(inner.op, Fused):
            nested = trace(inner.op, tuple(v.type for v in inner.inputs))
            places, size = inner.op.kept(nested.places), nested.size
        own = [next(origin) for _ in range(size or len(inner.outputs))] if origin is not None else []
        names = []
        for i, value in enumerate(inner.outputs):
            if value in labels:
                name = labels[value]
            else:
                name = own[places[i]] if own else f"{node.name}.{value.name}"
                name = _fresh(builder, name, reserved)
            reserved.add(name)
            names.append(name)
        inputs = tuple(values[v] for v in inner.inputs)
        provenance = tuple(own) if size or (own and own != names) else ()
        stand_in = Node(inner.op, inner.inputs, node.scope, provenance)
        stand_in.outputs = tuple(
            Value(n, v.type, v.kind, stand_in, v.index) for n, v in zip(names, inner.outputs, strict=True)
        )
        if isinstance(inner.op, Fused) and (wanted is None or inner.op.name in wanted):
            made: Sequence[Value] = _emit_body(builder, stand_in, inputs, wanted, reserved)
        else:
            made = builder.emit(inner.op, inputs, names=names, scope=node.scope, origin=provenance)
        values.update(zip(inner.outputs, made, strict=True))
    return [values[v] for v in op.kept(body.results)]


def _fresh(builder: Builder, name: str, reserved: set[str]) -> str:
    fresh, n = name, 1
    while fresh in reserved:
        n += 1
        fresh = f"{name}_{n}"
    return builder.fresh(fresh)


def cost_of(node: Node) -> Cost:
    return node.op.cost(tuple(v.type for v in node.inputs), tuple(v.type for v in node.outputs))


def launches_of(nodes: Iterable[Node]) -> int:
    return sum(node.op.name not in VIEWS for node in nodes)


class Work:
    """A graph being folded. Fused nodes produce the very values of the nodes they replace."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes = list(graph.nodes)
        self.outputs = set(graph.outputs.values())
        self.index()

    def index(self) -> None:
        self.low = {node: i for i, node in enumerate(self.nodes)}
        self.high = dict(self.low)
        self.made_by = {v: node for node in self.nodes for v in node.outputs}
        self.readers: dict[Value, list[Node]] = {}
        self.overwritten_by: dict[Value, Node] = {}
        self.by_op: dict[type[Op], list[Node]] = {}
        for node in self.nodes:
            self._enter(node)
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
        """Order the nodes again: each at its last member's place, unless it has to wait for another.

        By hand, for it runs once per rule on all nodes: networkx's sort takes three times as long.
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
        self.nodes = ordered
        self.index()

    def rebuild(self) -> Graph:
        builder, values = Builder.like(self.graph)
        for node in self.nodes:
            builder.copy(node, values)
        return builder.finish({key: values[v] for key, v in self.graph.outputs.items()})


@dataclass
class _Failure:
    """The furthest point of a search."""

    matched: int = -1
    of: int = 0
    cause: str = ""
    at: str = ""
    expected: Any = ""
    found: Any = ""
    match: Match | None = None


BUDGET = 4000  # steps of one search; equal siblings would otherwise be tried in every order before a refusal


class _Search:
    """One rule over one working graph."""

    def __init__(self, work: Work, rule: Rule, report: FoldReport) -> None:
        self.work, self.rule, self.all = work, rule, report
        self.report = RuleReport(rule.name)
        self.op = rule.op
        self.failure = _Failure()
        self.steps = 0

    def run(self) -> RuleReport:
        failures: dict[Node, _Failure] = {}
        tried: set[Node] = set()
        for count, fields in self.shapes():
            for anchor in self.anchors(count, fields):
                if anchor not in self.work.low:
                    continue  # taken by a match since
                self.failure, self.steps = _Failure(), 0
                match = self.search_from(anchor, count, fields)
                if match is None and not self.failure.cause:
                    continue  # nothing was proposed
                tried.add(anchor)
                if match is not None:
                    self.apply(match)
                elif anchor not in failures or failures[anchor].matched < self.failure.matched:
                    failures[anchor] = self.failure
        self.report.tried = len(tried)
        self.report.refusals = [self.refusal(n, f) for n, f in failures.items() if n in self.work.low]
        return self.report

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
        refused = self.rule.guard(match) if self.rule.guard else None
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
            self.failure = _Failure(matched, of, cause, at, expected, found, match)

    def refusal(self, anchor: Node, failure: _Failure) -> Refusal:
        launches, saved = max(failure.of - 1, 0), 0
        if failure.match is not None:
            launches, saved = savings(failure.match)
        return Refusal(
            self.rule.name,
            anchor.name,
            anchor.scope,
            max(failure.matched, 0),
            failure.of,
            failure.cause,
            failure.at,
            _text(failure.expected),
            _text(failure.found),
            launches,
            saved,
        )

    def apply(self, match: Match) -> None:
        launches, saved = savings(match)
        members = tuple(n.name for n in match.nodes)
        self.report.applied.append(Applied(self.rule.name, match.name, members, launches, saved))
        self.all.matches.append(match)
        self.work.replace(match)


def savings(match: Match) -> tuple[int, int]:
    """Launches and bytes of memory traffic that the fused op saves against its members."""
    before = sum(cost_of(node).bytes for node in match.nodes)
    types = tuple(v.type for v in match.operands)
    after = match.op.cost(types, match.op.results(types)).bytes
    return launches_of(match.nodes) - 1, before - after


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return print_attribute(value)


class _Wiring:
    """One pattern laid over the graph around an anchor, by depth-first search with undo."""

    def __init__(
        self, search: _Search, pattern: Pattern, anchor: Node, place: int, given: Mapping[str, Value]
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
    if node.op.name in COMMUTATIVE and node.inputs[0] is not node.inputs[1]:
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
