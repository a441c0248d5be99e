"""`dsv4c bisect PLAN --weights DIR --tokens ...`: which rewrite made the plan's results wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dsv4c.cli.console import note, print_json
from dsv4c.cli.options import JsonOption, PassOption, PlanArgument
from dsv4c.cli.run import TokensOption, WeightsOption, token_ids
from dsv4c.compiler.bisect import Bisection, Verdict
from dsv4c.compiler.job import job_of, rules_of
from dsv4c.errors import GraphError
from dsv4c.plan.folder import load

OutputOption = Annotated[
    Path,
    typer.Option(
        "-o", "--output", help="Folder for the reproducer, written if a fault is found.", metavar="DIR"
    ),
]


BucketOption = Annotated[
    str, typer.Option("--bucket", help="The decode bucket to run; by default the smallest.", metavar="NAME")
]


def register(app: typer.Typer) -> None:
    app.command("bisect")(bisect_command)


def bisect_command(
    plan: PlanArgument,
    weights: WeightsOption,
    tokens: TokensOption,
    bucket: BucketOption = "decode",
    output: OutputOption = Path("bisect"),
    extra: PassOption = None,
    json: JsonOption = False,
) -> None:
    """Find the rewrite at fault: run the plan, and its unfused nodes on operands of each launch.

    The plan runs on its target. Names the first node that is further off than its certificate, or a kernel's
    own rounding, allows, switches suspects off until the results are right, and writes a folder that shows
    the fault without plan or weights. Exit code 3 if there is a fault.

    Examples:

      dsv4c bisect tiny.plan --weights tiny-weights --tokens 3,17,5
    """
    rules = rules_of(extra or ())
    compiled = load(plan)
    given = token_ids(tokens, "--tokens")
    search = Bisection(compiled, weights, given, job_of(compiled, rules), bucket=bucket)
    verdict = search.run()
    if verdict.culprit is not None:
        search.reproduce(verdict, output)
    if json:
        print_json(verdict.to_dict() | {"reproducer": str(output) if verdict.culprit else None})
    else:
        print(text(verdict), end="")
    if verdict.culprit is not None:
        note(f"{output}: the reproducer; run python {output / 'reproduce.py'}")
        raise GraphError(f"{plan}: {verdict.culprit.rule} is at fault, first at {verdict.culprit.node}")
    if not verdict.right:
        raise GraphError(f"{plan}: results differ, but no node's do: look at the places of its values")


def text(verdict: Verdict) -> str:
    """The verdict to read."""
    lines = [f"{verdict.nodes} nodes in {verdict.steps} steps against their unfused nodes"]
    for s in verdict.suspects:
        rules = s.rule if not s.beside else f"{s.rule}, or {', '.join(s.beside)} in the same launches"
        lines.append(
            f"  step {s.step}: {s.node} ({rules}): {s.kind}, worst {s.worst:g}; allowed: {s.allowed}"
        )
    if not verdict.suspects:
        lines.append("  every node gives what its unfused nodes give")
    lines.append(f"results {'right' if verdict.right else 'wrong'}")
    if verdict.switched_off and verdict.gone:
        lines.append(f"right without {', '.join(verdict.rules)} at {', '.join(verdict.switched_off)}")
    elif verdict.suspects and not verdict.gone:
        lines.append("still wrong with every suspect switched off")
    return "\n".join(lines) + "\n"
