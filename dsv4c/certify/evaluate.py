"""Both sides of an application, run on adversarial inputs; the worst difference is the certificate."""

from __future__ import annotations

from typing import Any

from dsv4c.certify.adversarial import operands_for
from dsv4c.certify.application import Application, reduce_sizes
from dsv4c.certify.compare import compare
from dsv4c.certify.finding import BIT_EXACT, DIFFERENT, ORDER, Certificate, Finding, worse
from dsv4c.errors import GraphError
from dsv4c.ir.fused import Fused
from dsv4c.ir.text import print_op
from dsv4c.reference import run
from dsv4c.reference.interpret import clone, interpret
from dsv4c.threads import threads

PATTERNS = ("mixed", "edges", "zeros", "random", "tiny", "large")
LIMIT = 3e8  # operations one side may take on one pattern; costlier ones see fewer patterns


def evaluate(applied: Application) -> Certificate:
    """The certificate of an application, evaluated now in reduced sizes."""
    return evaluated(reduce_sizes(applied)).of_all_sizes(applied)


def evaluated(applied: Application) -> Certificate:
    """Run both sides, in the sizes there are, on every pattern that the cost allows; the worst of them is
    the certificate.
    """
    patterns = patterns_for(applied)
    worst = Finding(BIT_EXACT, 0.0, "")
    with threads(1):  # many small operations
        for seed, pattern in enumerate(patterns):
            try:
                finding = both_sides(applied, pattern, seed, lambda operands: run(applied.op, *operands))
            except GraphError as error:
                finding = Finding(DIFFERENT, 0.0, f"{pattern}: {error}")
            worst = worse(worst, finding)
    return Certificate(
        applied.rule,
        print_op(applied.op),
        tuple(map(str, applied.types)),
        applied.count,
        applied.digest,
        worst.kind,
        worst.worst,
        patterns,
        allowed(applied.op),
        reason=worst.reason,
    )


def allowed(op: Fused) -> str:
    """The worst kind of difference that this op may show. Raises GraphError for a kind there is none of."""
    kind = str(getattr(op, "certified_as", BIT_EXACT))
    if kind not in ORDER[:-1]:
        raise GraphError(f"{op.name}: certified_as is {kind!r}; expected one of {', '.join(ORDER[:-1])}")
    return kind


def both_sides(applied: Application, pattern: str, seed: int, right: Any) -> Any:
    """One comparison: results and, after the run, all operands, which may only differ where both wrote."""
    given = operands_for(applied.nodes, pattern, seed)
    ours, theirs = [clone(v) for v in given], [clone(v) for v in given]
    named = {v.name: value for v, value in zip(applied.nodes.inputs, ours, strict=True)}
    expected = list(interpret(applied.nodes, named, {}, {}).values())
    made = right([theirs[i] for i in applied.operands])
    results = list(made) if type(made) is tuple else [made]
    return compare([*expected, *ours], [*results, *theirs], pattern)


def patterns_for(applied: Application) -> tuple[str, ...]:
    flops = sum(node.cost.flops for node in applied.nodes.nodes)
    return PATTERNS[: max(1, min(len(PATTERNS), int(LIMIT / max(flops, 1))))]
