"""`dsv4c passes PLAN`: what every rule did for a plan."""

from __future__ import annotations

from typing import Any

import typer
from rich.box import SIMPLE
from rich.table import Table

from dsv4c.certify.finding import ORDER
from dsv4c.cli.console import print_json, print_table, size
from dsv4c.cli.options import JsonOption, PlanArgument
from dsv4c.plan.folder import Plan, load


def register(app: typer.Typer) -> None:
    app.command("passes")(passes_command)


def passes_command(plan: PlanArgument, json: JsonOption = False) -> None:
    """Show the pipeline of a plan and what every rule saved in a decode step.

    tried: places where a search began. Launches and bytes are those of the nodes it replaced, less its own.
    certificate: the worst class of difference between both sides on adversarial inputs, over all buckets.

    Examples:

      dsv4c passes tiny.plan

      dsv4c passes flash.plan --json
    """
    compiled = load(plan)
    rows = rule_rows(compiled)
    if json:
        print_json({"pipeline": compiled.pipeline, "rules": rows})
        return
    print(compiled.pipeline)
    table = Table(
        title=f"{compiled.name}, recipe {compiled.recipe}, one decode step",
        box=SIMPLE,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("rule", no_wrap=True)
    for heading in ("tried", "matched", "launches\nsaved", "HBM bytes\nsaved", "ms"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("certificate", no_wrap=True)
    for r in rows:
        ms = "" if r["ms"] is None else f"{r['ms']:.1f}"
        counts = (f"{r[k]:,}" for k in ("tried", "matched", "launches_saved"))
        table.add_row(r["rule"], *counts, size(r["bytes_saved"]), ms, r["certificate"] or "")
    table.add_section()
    total = {k: sum(r[k] for r in rows) for k in ("matched", "launches_saved", "bytes_saved")}
    whole = sum(r["ms"] or 0.0 for r in rows)
    saved = f"{total['launches_saved']:,}"
    table.add_row("all", "", f"{total['matched']:,}", saved, size(total["bytes_saved"]), f"{whole:.1f}")
    print_table(table)


def rule_rows(plan: Plan) -> list[dict[str, Any]]:
    """The rules in order; ms is None for a plan without its timings, certificate the worst class found."""
    found: dict[str, str] = {}
    for c in plan.certificates:
        found[c["rule"]] = max(found.get(c["rule"], ORDER[0]), c["kind"], key=ORDER.index)
    rows = []
    for row in plan.report.get("passes", ()):
        seconds = plan.timings.get(f"rule {row['rule']}")
        ms = None if seconds is None else round(1e3 * seconds, 3)
        rows.append({**row, "ms": ms, "certificate": found.get(row["rule"])})
    return rows
