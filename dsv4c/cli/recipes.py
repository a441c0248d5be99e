"""`dsv4c recipes`: the numerics that a plan can have."""

from __future__ import annotations

import typer

from dsv4c.cli.console import note, print_json, print_rows
from dsv4c.cli.options import JsonOption
from dsv4c.passes.recipes import FP8_DRAFTS, RECIPES


def register(app: typer.Typer) -> None:
    app.command("recipes")(recipes_command)


def recipes_command(json: JsonOption = False) -> None:
    """List the recipes: where a model's values are quantized, and in which format.

    Examples:

      dsv4c recipes

      dsv4c recipes --json
    """
    rows = [{"recipe": recipe.name, "what": recipe.summary} for recipe in RECIPES.values()]
    if json:
        print_json({"recipes": rows})
    else:
        print_rows(rows)
        note(f"NAME{FP8_DRAFTS}: any of them, where drafts read a copy of the head in FP8 (docs/drafting.md)")
