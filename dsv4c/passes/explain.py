"""Why the graph looks as it does: what every rule did, and why it left alone what it left alone.

Plain data; whoever shows it decides how.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from dsv4c.errors import GraphError
from dsv4c.passes.fold import FoldReport, Refusal
from dsv4c.scope import Scope


@dataclass(frozen=True)
class RuleRow:
    """One line of the table of rules."""

    rule: str
    tried: int
    matched: int
    launches_saved: int
    bytes_saved: int
    ms: float


@dataclass(frozen=True)
class Cause:
    """Anchors that a rule left alone for one reason; the sums are what fusing them would have saved."""

    cause: str  # op | operand | attribute | type | field | escape | cycle | alias | guard | dead
    expected: str
    found: str
    matched: int  # nodes of the body that had been placed
    of: int
    refusals: tuple[Refusal, ...]
    launches: int
    bytes: int

    @property
    def example(self) -> Refusal:
        return self.refusals[0]


@dataclass(frozen=True)
class WhyNot:
    """The answer for one rule: how often it applied, and causes, the furthest partial matches first."""

    rule: str
    tried: int
    matched: int
    causes: tuple[Cause, ...] = field(default=())


def table(report: FoldReport) -> list[RuleRow]:
    """A row for every rule, in the order in which they were tried."""
    return [
        RuleRow(
            r.rule,
            r.tried,
            r.matched,
            sum(a.launches_saved for a in r.applied),
            sum(a.bytes_saved for a in r.applied),
            r.ms,
        )
        for r in report.rules.values()
    ]


def why_not(rule: str, report: FoldReport, node: str | None = None) -> WhyNot:
    """Why `rule` did not fire, at anchors whose name or scope begins with `node` if one is given.

    Raises GraphError for a rule that was not tried, and for a node that is no anchor of it.
    """
    if rule not in report.rules:
        raise GraphError(f"the rule {rule!r} was not tried; these were: {', '.join(report.rules) or 'none'}")
    found = report.rules[rule]
    refusals = [r for r in found.refusals if node is None or at(r, node)]
    if node is not None and not refusals:
        applied = [a for a in found.applied if node == a.node or node in a.members]
        if applied:
            raise GraphError(f"{rule} did fire at {node}: it is part of {applied[0].node}")
        near = ", ".join(r.anchor for r in found.refusals[:5])
        refused = f"it was refused at: {near}" if near else "it was refused nowhere"
        raise GraphError(f"{rule} was not tried at {node!r}; {refused}")
    return WhyNot(rule, found.tried, found.matched, tuple(_grouped(refusals)))


def at(refusal: Refusal, node: str) -> bool:
    """Was it refused at that node, or in that scope?"""
    return any(
        name == node or name.startswith(f"{node}.") for name in (refusal.anchor, refusal.scope, refusal.at)
    )


def _grouped(refusals: Iterable[Refusal]) -> list[Cause]:
    groups: dict[tuple[str, str, str, int, int], list[Refusal]] = {}
    for r in refusals:
        key = (r.cause, _without(r, r.expected), _without(r, r.found), r.matched, r.of)
        groups.setdefault(key, []).append(r)
    causes = [
        Cause(*key, tuple(group), sum(r.launches for r in group), sum(r.bytes for r in group))
        for key, group in groups.items()
    ]
    return sorted(causes, key=lambda c: (-(c.matched / max(c.of, 1)), -len(c.refusals)))


def _without(refusal: Refusal, text: str) -> str:
    """`text` with the names of this place left out, so that the same cause in 61 layers is one."""
    words = text.split(" ")
    return " ".join("%…" if w.startswith("%") else _relative(refusal, w) for w in words)


def _relative(refusal: Refusal, word: str) -> str:
    scope = Scope.of(word)
    return f"….{scope.leaf}" if scope.block else word
