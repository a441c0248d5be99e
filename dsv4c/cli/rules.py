"""`dsv4c rules`: every rule that may fold, built in or contributed."""

from __future__ import annotations

from inspect import cleandoc

import typer

from dsv4c.cli.console import print_json, print_rows
from dsv4c.cli.options import JsonOption, PassOption
from dsv4c.compiler.job import rules_of


def register(app: typer.Typer) -> None:
    app.command("rules")(rules_command)


def rules_command(extra: PassOption = None, json: JsonOption = False) -> None:
    """List the rules that compile may apply, in the order in which it tries them.

    Examples:

      dsv4c rules

      dsv4c rules --pass my_module --json
    """
    known = rules_of(extra or ())
    rows = [
        {
            "rule": name,
            "from": known.sources.get(name, "dsv4c"),
            "what": " ".join(cleandoc(rule.op.__doc__ or "").partition("\n\n")[0].split()),
        }
        for name, rule in known.rules.items()
    ]
    if json:
        print_json({"rules": rows})
    else:
        print_rows(rows)
