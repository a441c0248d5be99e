"""`dsv4c verify PLAN`: proves a plan's launches sound without running them."""

from __future__ import annotations

from dataclasses import asdict

import typer

from dsv4c.cli.console import print_json
from dsv4c.cli.options import JsonOption, PlanArgument
from dsv4c.compiler.verify import check
from dsv4c.errors import PlanError
from dsv4c.plan.folder import load


def register(app: typer.Typer) -> None:
    app.command("verify")(verify_command)


def verify_command(plan: PlanArgument, json: JsonOption = False) -> None:
    """Check a plan: every file by its digest, and in every bucket what launches do to each other.

    No two launches without an order touch the same bytes, every read finds what the graph says was written,
    writes in place are in place, arguments lie inside of their blocks. Fails if anything is wrong.

    Examples:

      dsv4c verify flash.plan

      dsv4c verify flash.plan --json
    """
    read = load(plan)
    launches = {name: len(program.launches) for name, program in read.buckets.items()}
    violations = check(read)
    if json:
        found = [asdict(v) for v in violations]
        print_json({"plan": str(plan), "target": read.target, "launches": launches, "violations": found})
    else:
        for violation in violations:
            print(violation)
    if violations:
        raise PlanError(f"{plan}: {len(violations)} violations; the first: {violations[0]}")
    if not json:
        counts = ", ".join(f"{name} {count:,}" for name, count in launches.items())
        print(f"{plan}: sound ({counts} launches, {len(read.kernels)} kernels, {len(read.files)} files)")
