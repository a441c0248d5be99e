"""Fold: replace every occurrence of the rules' bodies by their ops; `expand` is the undo.

Promises: values keep their names, nothing is read before it is made or after it is overwritten, and every
refusal has its reason.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsv4c.errors import GraphError
from dsv4c.ir.fused import Fused
from dsv4c.ir.graph import Graph, Node
from dsv4c.ir.text import print_attribute
from dsv4c.passes.match import Failure, Guard, Search
from dsv4c.passes.work import Match, Work


@dataclass(frozen=True)
class Rule:
    """A fused op to fold. `guard` may refuse an occurrence by returning the reason."""

    op: type[Fused]
    guard: Guard | None = None

    @property
    def name(self) -> str:
        """The rule's, which is its op's."""
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
        report.rules[rule.name] = _apply(rule, work, report.matches)
        if report.rules[rule.name].matched:
            work.sort()
        report.rules[rule.name].ms = 1e3 * (time.perf_counter() - started)
    return (work.rebuild() if any(report.counts.values()) else graph), report


def _apply(rule: Rule, work: Work, matches: list[Match]) -> RuleReport:
    """Replace what the rule finds in `work`, and append it to `matches`."""
    report = RuleReport(rule.name)
    search = Search(work, rule.op, rule.guard)
    for match in search.matches():
        report.applied.append(_applied(rule, match))
        matches.append(match)
        work.replace(match)
    report.tried = len(search.tried)
    report.refusals = [_refusal(rule, n, f) for n, f in search.failures.items() if n in work.low]
    return report


def _applied(rule: Rule, match: Match) -> Applied:
    launches, saved = savings(match)
    return Applied(rule.name, match.name, tuple(n.name for n in match.nodes), launches, saved)


def _refusal(rule: Rule, anchor: Node, failure: Failure) -> Refusal:
    launches, saved = max(failure.of - 1, 0), 0
    if failure.match is not None:
        launches, saved = savings(failure.match)
    return Refusal(
        rule.name,
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


def savings(match: Match) -> tuple[int, int]:
    """Launches and bytes of memory traffic that the fused op saves against its members."""
    before = sum(node.cost.bytes for node in match.nodes)
    types = tuple(v.type for v in match.operands)
    after = match.op.cost(types, match.op.results(types)).bytes
    return launches_of(match.nodes) - 1, before - after


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return print_attribute(value)


def launches_of(nodes: Iterable[Node]) -> int:
    return sum(not node.op.view for node in nodes)
