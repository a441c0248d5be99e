"""`dsv4c targets`: what a plan can be compiled for."""

from __future__ import annotations

import typer

from dsv4c.arch import ARCHS
from dsv4c.cli.console import print_json, print_rows
from dsv4c.cli.options import JsonOption
from dsv4c.config import TARGETS


def register(app: typer.Typer) -> None:
    app.command("targets")(targets_command)


def targets_command(json: JsonOption = False) -> None:
    """List the targets, and what runs their plans.

    Examples:

      dsv4c targets

      dsv4c targets --json
    """
    rows = []
    for target in TARGETS:
        arch = ARCHS.get(target)
        what = "any CPU, op by op" if arch is None else f"NVIDIA {arch.gpu}, by kernels in CUDA graphs"
        if arch is not None and not arch.run_here:
            what += "; compiled, not yet run on that hardware"
        rows.append({"target": target, "runs on": what})
    if json:
        print_json({"targets": rows})
    else:
        print_rows(rows)
