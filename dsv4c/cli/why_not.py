"""`dsv4c why-not RULE PLAN|CONFIG`: why a rule left nodes alone."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv4c.cli.console import print_json, size
from dsv4c.cli.options import (
    BatchOption,
    ChunkOption,
    ContextOption,
    JsonOption,
    Mode,
    PassOption,
    RecipeOption,
    Target,
    TargetOption,
)
from dsv4c.cli.subject import Subject, ask
from dsv4c.errors import GraphError

if TYPE_CHECKING:
    from dsv4c.passes.fold import FoldReport, Refusal, Rule
    from dsv4c.stages import Compiled, Job

RuleArgument = Annotated[str, typer.Argument(metavar="RULE", help="Name of a rule.", show_default=False)]
NodeOption = Annotated[
    str | None,
    typer.Option(
        help="Only places with this text in their name or scope, each by itself.", show_default=False
    ),
]
ModeOption = Annotated[Mode, typer.Option(help="Which bucket.")]


def register(app: typer.Typer) -> None:
    app.command("why-not")(why_not_command)


def why_not_command(
    rule: RuleArgument,
    subject: Subject,
    node: NodeOption = None,
    mode: ModeOption = Mode.DECODE,
    recipe: RecipeOption = "official",
    target: TargetOption = Target.CPU,
    batch: BatchOption = 1,
    max_context: ContextOption = 4096,
    chunk: ChunkOption = None,
    extra: PassOption = None,
    json: JsonOption = False,
) -> None:
    """Explain where a rule did not apply: the furthest partial match, what failed first, what it would save.

    The pipeline runs again, from the plan's own settings or the options given with a config.

    Examples:

      dsv4c why-not hash_swiglu tiny --recipe nvfp4-experts-w4a4

      dsv4c why-not rmsnorm_quantize tiny.plan --node layers.2
    """
    asked = ask(
        subject,
        mode=mode.value,
        extra=extra,
        recipe=recipe,
        target=target.value,
        batch=batch,
        max_context=max_context,
        chunk=chunk,
    )
    wanted = asked.job.rules.rule(rule)
    compiled = asked.compiled(mode.value)
    report = compiled.context.fold
    if report is None:
        raise GraphError(f"{subject}: its pipeline does not fold: {asked.job.line}")
    answer = explain(wanted, report, compiled, asked.job, node)
    if json:
        print_json(answer)
    else:
        print(text(answer, node is not None), end="")


def explain(
    wanted: Rule, report: FoldReport, compiled: Compiled, job: Job, node: str | None
) -> dict[str, Any]:
    """Applications and refusals of one rule; `why` where there are no refusals to tell.

    Raises GraphError when `node` names no place where the rule was tried.
    """
    found = report.rules.get(wanted.name)
    answer: dict[str, Any] = {"rule": wanted.name, "tried": 0, "matched": 0, "why": "", "refusals": []}
    if found is None:
        return answer | {"why": f"the pipeline leaves it out: {job.line}"}
    answer |= {"tried": found.tried, "matched": found.matched, "applied": [a.node for a in found.applied]}
    refusals = found.refusals
    if node is not None:
        refusals = [r for r in refusals if node in r.anchor or node in r.scope]
        applied = [a for a in found.applied if node in a.node or any(node in m for m in a.members)]
        answer["applied"] = [a.node for a in applied]
        if not refusals and not applied and found.tried:
            raise GraphError(f"{wanted.name} was not tried at {node!r}; {_places(found.refusals)}")
    answer["refusals"] = [asdict(r) for r in refusals]
    if not found.tried:
        answer["why"] = absent(wanted, compiled)
    return answer


def _places(refusals: list[Refusal]) -> str:
    names = ", ".join(r.anchor for r in refusals[:5])
    return f"refused at {names}{', ...' if len(refusals) > 5 else ''}" if refusals else "it refused nowhere"


def absent(wanted: Rule, compiled: Compiled) -> str:
    """Why a search never began."""
    from dsv4c.ir.fused import Fused, operand_counts, sketches

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
    return "rules before it took every place where a search could begin, or nothing was proposed there"


def text(answer: dict[str, Any], each: bool) -> str:
    """The answer to read: refusals by cause, or each by itself."""
    lines = [f"{answer['rule']}: tried {answer['tried']:,}, matched {answer['matched']:,}"]
    if answer["why"]:
        lines.append(f"  {answer['why']}")
    if each:
        lines += [f"  {name}: applied" for name in answer["applied"]]
        lines += [line for r in answer["refusals"] for line in _refusal(r)]
        return "\n".join(lines) + "\n"
    for group in grouped(answer["refusals"]):
        first = group[0]
        saved = sum(r["launches"] for r in group)
        lines.append(
            f"  {first['cause']}, {len(group)} times: expected {first['expected']}, found {first['found']}"
        )
        lines.append(f"    matched {first['matched']} of {first['of']} ops; first at {first['at']}")
        lines.append(
            f"    fusing all of them would have saved {_saved(saved, sum(r['bytes'] for r in group))}"
        )
    if answer["refusals"]:
        lines.append("  each by itself: --node NAME")
    return "\n".join(lines) + "\n"


def _refusal(r: dict[str, Any]) -> list[str]:
    return [
        f"  {r['anchor']} ({r['scope']}): {r['cause']} at {r['at']}",
        f"    matched {r['matched']} of {r['of']} ops; expected {r['expected']}, found {r['found']}",
        f"    fusing would have saved {_saved(r['launches'], r['bytes'])}",
    ]


def _saved(launches: int, count: int) -> str:
    return f"{launches:,} launches" + (f", {size(count)}" if count else "")


def grouped(refusals: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Refusals that differ in nothing but the layer together, the most frequent first."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for r in refusals:
        key = tuple(re.sub(r"\d+", "#", str(r[k])) for k in ("cause", "expected", "found"))
        groups.setdefault(key, []).append(r)
    return sorted(groups.values(), key=len, reverse=True)
