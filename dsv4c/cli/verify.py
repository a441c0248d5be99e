"""`dsv4c verify PLAN`: proves a plan sound without running it, and says what it takes on trust."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from dsv4c.cli.compile import edited_kernels
from dsv4c.cli.console import print_json
from dsv4c.cli.options import JsonOption, PassOption, PlanArgument
from dsv4c.compiler.again import Rebuilt
from dsv4c.compiler.again import rebuild as build_again
from dsv4c.compiler.job import rules_of
from dsv4c.compiler.verify import check
from dsv4c.errors import PlanError
from dsv4c.plan.folder import Plan, read_plan


def register(app: typer.Typer) -> None:
    app.command("verify")(verify_command)


def verify_command(
    plan: PlanArgument,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Build every generated kernel again, compare bytes.")
    ] = False,
    extra: PassOption = None,
    json: JsonOption = False,
) -> None:
    """Check a plan: files, launches against kernels and graphs, and what they do to each other.

    Every file has its digest. Launches are what the graphs are lowered to, fit the kernels that the cubins
    hold, and stay in their blocks. No two launches without an order touch the same bytes, every read finds
    what the graph says was written. Says what was proved, and what is taken on trust. Fails if anything is
    wrong.

    Examples:

      dsv4c verify flash.plan

      dsv4c verify flash.plan --rebuild
    """
    read = read_plan(plan)
    launches = {name: len(program.launches) for name, program in read.buckets.items()}
    violations = check(read, rules_of(extra or ()))
    again = build_again(read) if rebuild and read.kernels and not violations else None
    proved, trusted = _proved(read, launches, again), _trusted(read, again)
    if json:
        found = [asdict(v) for v in violations]
        print_json(
            {
                "plan": str(plan),
                "target": read.target,
                "launches": launches,
                "violations": found,
                "rebuilt": None if again is None else asdict(again),
                "proved": [] if violations else proved,
                "trusted": trusted,
            }
        )
    else:
        for violation in violations:
            print(violation)
    if violations:
        raise PlanError(f"{plan}: {len(violations)} violations; the first: {violations[0]}")
    if again is not None and again.differing:
        raise PlanError(
            f"{plan}: {len(again.differing)} of {again.built} kernels are not what {again.toolchain} makes "
            f"of their sources: {', '.join(again.differing)}"
        )
    if not json:
        print(f"{plan}: sound", *(f"  proved   {line}" for line in proved), sep="\n")
        print(*(f"  trusted  {line}" for line in trusted), sep="\n")


def _proved(plan: Plan, launches: dict[str, int], again: Rebuilt | None) -> list[str]:
    counts = ", ".join(f"{name} {count:,}" for name, count in launches.items())
    lines = [
        f"{len(plan.files)} files by their digests, every record by its form",
        f"launches are what this version lowers the graphs to, in order and apart: {counts}",
        "places: every argument, value, weight and state in its block, nothing read before it is written",
    ]
    if plan.kernels:
        lines.append(
            f"{len(plan.kernels)} kernels are for {plan.target} and take what launches give: parameters, "
            "grid, block, cluster, registers, shared memory"
        )
    else:
        lines.append("bodies are what this version spells out for the graphs' fused ops")
    if again is not None and not again.differing:
        lines.append(f"{again.built} cubins are what {again.toolchain} makes of the sources generated now")
    return lines


def _trusted(plan: Plan, again: Rebuilt | None) -> list[str]:
    lines = ["whoever made the plan: digests tell accidents, they are no signature"]
    lines.append("the graphs: that they are the model's (`dsv4c check` tries every rewrite again)")
    if plan.kernels and again is None:
        lines.append("machine code: that cubins do what their sources say (--rebuild builds them again)")
    if edited := edited_kernels(plan):
        lines.append(
            f"edited kernels, machine code and all: {', '.join(edited)}; their text is a person's, which "
            "only `dsv4c compile --kernels` builds"
        )
    if plan.kernels:
        lines.append("kernels: that their sources compute what the graph says, as tests on a GPU showed")
    return lines
