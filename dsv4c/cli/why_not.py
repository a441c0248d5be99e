"""`dsv4c why-not RULE PLAN|CONFIG`: why a rule left nodes alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Annotated

import typer

from dsv4c.cli.console import print_json, size
from dsv4c.cli.options import (
    COMPLETE_RULE,
    BatchOption,
    BucketOption,
    ChunkOption,
    ContextOption,
    JsonOption,
    PassOption,
    RecipeOption,
    TargetOption,
)
from dsv4c.cli.subject import Subject, ask_with, refuse_decided
from dsv4c.compiler.job import Compiled, Job
from dsv4c.errors import GraphError
from dsv4c.ir.fused import Fused, operand_counts, refusal, sketches
from dsv4c.passes.explain import WhyNot, at, why_not
from dsv4c.passes.fold import Applied, FoldReport, Refusal, Rule

RuleArgument = Annotated[
    str,
    typer.Argument(metavar="RULE", help="Name of a rule.", show_default=False, autocompletion=COMPLETE_RULE),
]
NodeOption = Annotated[
    str | None,
    typer.Option(
        help="Only at this node, or in this scope (layers.2), each place by itself.", show_default=False
    ),
]


@dataclass(frozen=True)
class Answer:
    """What is known of a rule: refusals by cause, where it applied if asked there, why it was not tried; and
    where a way through its body ended.
    """

    rule: WhyNot
    applied: tuple[str, ...]
    why: str
    ended: str = ""


def register(app: typer.Typer) -> None:
    app.command("why-not")(why_not_command)


def why_not_command(
    context: typer.Context,
    rule: RuleArgument,
    subject: Subject,
    node: NodeOption = None,
    bucket: BucketOption = "decode",
    recipe: RecipeOption = "official",
    target: TargetOption = "cpu",
    batch: BatchOption = None,
    max_context: ContextOption = 4096,
    chunk: ChunkOption = None,
    extra: PassOption = None,
    json: JsonOption = False,
) -> None:
    """Explain where a rule did not apply: the best match, what failed first, what it would save.

    The pipeline runs again, from the plan's own settings or the options given with a config.

    Examples:

      dsv4c why-not hash_swiglu tiny --recipe nvfp4-experts-w4a4

      dsv4c why-not rmsnorm_quantize tiny.plan --node layers.2
    """
    refuse_decided(context, subject)
    asked = ask_with(context, subject)
    wanted = asked.job.rules.rule(rule)
    compiled = asked.compiled(bucket)
    report = compiled.context.fold
    if report is None:
        raise GraphError(f"{subject}: its pipeline does not fold: {asked.job.line}")
    answer = replace(explain(wanted, report, compiled, asked.job, node), ended=refusal(wanted.op))
    if json:
        print_json(
            asdict(answer.rule) | {"applied": list(answer.applied), "why": answer.why, "ended": answer.ended}
        )
    else:
        print(text(answer, node is not None), end="")


def explain(wanted: Rule, report: FoldReport, compiled: Compiled, job: Job, node: str | None) -> Answer:
    """What is to be said about one rule. Raises GraphError when `node` is no place where it was tried."""
    found = report.rules.get(wanted.name)
    if found is None:
        return Answer(WhyNot(wanted.name, 0, 0), (), f"the pipeline leaves it out: {job.line}")
    if not found.tried:
        return Answer(WhyNot(wanted.name, 0, 0), (), absent(wanted, compiled))
    if node is None:
        everywhere = "" if found.refusals else "it applied wherever it was tried"
        return Answer(why_not(wanted.name, report), (), everywhere)
    fired = tuple(a.node for a in found.applied if _covers(node, a))
    if fired and not any(at(r, node) for r in found.refusals):
        return Answer(WhyNot(wanted.name, found.tried, found.matched), fired, "")
    return Answer(why_not(wanted.name, report, node), fired, "")


def _covers(node: str, applied: Applied) -> bool:
    """Is `node` the fused node, one of those it replaced, or a scope that it is in?"""
    return node in (applied.node, *applied.members) or applied.node.startswith(f"{node}.")


def absent(wanted: Rule, compiled: Compiled) -> str:
    """Why a search never began."""
    before = compiled.start
    for stage in compiled.stages:
        if stage.name == "fold":
            break
        before = stage.graph
    there = {node.op.name for node in before.nodes}
    counts = operand_counts(wanted.op) or (None,)
    bodies = [p for count in counts for p in sketches(wanted.op, count or 0, ())]
    needed = {n.op.name for p in bodies[:1] for n in p.nodes if not isinstance(n.op, Fused)}
    missing = sorted(needed - there)
    if missing:
        return f"the graph has no {' and no '.join(missing)}"
    report = compiled.context.fold
    places = [node.name for node in before.nodes if node.op.name in needed]
    taken = Counter(
        applied.rule
        for each in (report.rules.values() if report is not None else ())
        for applied in each.applied
        if any(made in applied.members for made in places)
    )
    if taken:
        rules = ", ".join(f"{rule} ({times} times)" for rule, times in taken.most_common())
        return f"rules before it took every place where a search could begin: {rules}"
    return "nothing was proposed where a search could begin"


def text(answer: Answer, each: bool) -> str:
    """The answer to read: refusals by cause, or each by itself."""
    rule = answer.rule
    lines = [f"{rule.rule}: tried {rule.tried:,}, matched {rule.matched:,}"]
    if answer.ended:
        lines.append(f"  a way through the body ended at {answer.ended}")
    if answer.why:
        lines.append(f"  {answer.why}")
    lines += [f"  applied: {node}" for node in answer.applied]
    for cause in rule.causes:
        if each:
            lines += [line for r in cause.refusals for line in _refusal(r)]
            continue
        times = len(cause.refusals)
        lines.append(f"  {cause.cause}, {times} times: expected {cause.expected}, found {cause.found}")
        lines.append(f"    matched {cause.matched} of {cause.of} ops; first at {cause.example.at}")
        lines.append(f"    fusing all of them would have saved {_saved(cause.launches, cause.bytes)}")
    if rule.causes and not each:
        lines.append("  each by itself: --node NAME, of a node or a scope")
    return "\n".join(lines) + "\n"


def _refusal(r: Refusal) -> list[str]:
    return [
        f"  {r.anchor} ({r.scope}): {r.cause} at {r.at}",
        f"    matched {r.matched} of {r.of} ops; expected {r.expected}, found {r.found}",
        f"    fusing would have saved {_saved(r.launches, r.bytes)}",
    ]


def _saved(launches: int, count: int) -> str:
    return f"{launches:,} launches" + (f", {size(count)}" if count else "")
