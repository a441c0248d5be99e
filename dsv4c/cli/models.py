"""`dsv4c models`: the models that have a name here."""

from __future__ import annotations

from typing import Any

import typer

from dsv4c.cli.console import print_json, print_rows
from dsv4c.cli.options import JsonOption
from dsv4c.config import BUILTIN, RATIOS, load_config
from dsv4c.models.layout import layout


def register(app: typer.Typer) -> None:
    app.command("models")(models_command)


def models_command(json: JsonOption = False) -> None:
    """List the built-in models.

    Any other is given by its config.json, or the folder of its checkpoint.

    Examples:

      dsv4c models

      dsv4c models --json
    """
    rows: list[dict[str, Any]] = []
    for name in BUILTIN:
        model = load_config(name)
        # as the model is named for: without the draft block and the tables of expert numbers
        counted = [p for p in layout(model) if p.storage != "i64" and not p.place.draft]
        kinds = [RATIOS[ratio] for ratio in model.compress_ratios]
        rows.append(
            {
                "model": name,
                "parameters": sum(param.size for param in counted),
                "context": model.max_position_embeddings,
                "layers": ", ".join(f"{kinds.count(kind)} {kind}" for kind in RATIOS.values()),
            }
        )
    if json:
        print_json({"models": rows})
    else:
        print_rows([row | {"parameters": f"{row['parameters'] / 1e9:,.2f} B"} for row in rows])
