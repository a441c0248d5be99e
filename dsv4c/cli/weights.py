"""`dsv4c weights DIR`: what a checkpoint holds against what the config needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from dsv4c.cli.console import print_json, print_table, size
from dsv4c.cli.options import CONFIG_HELP, JsonOption
from dsv4c.config import load_config
from dsv4c.errors import CheckpointError
from dsv4c.models.weights import describe
from dsv4c.runtime.checkpoint import Checkpoint

SHOWN = 10  # names per list; --json has all

DirArgument = Annotated[
    Path,
    typer.Argument(
        metavar="DIR",
        help="Checkpoint folder, or a .safetensors file.",
        show_default=False,
        readable=False,
    ),
]
ConfigOption = Annotated[
    str | None,
    typer.Option(help=CONFIG_HELP, metavar="CONFIG", show_default="the config.json in DIR"),
]


def register(app: typer.Typer) -> None:
    app.command("weights")(weights_command)


def weights_command(directory: DirArgument, config: ConfigOption = None, json: JsonOption = False) -> None:
    """Compare a checkpoint's names, shapes, types and scales with the model's.

    Reads headers and scales, and of the data only what lies under a scale of zero. Exit code 4 if they
    differ.

    Examples:

      dsv4c weights ./my-checkpoint

      dsv4c weights model.safetensors --config deepseek-v4-flash --json
    """
    checkpoint = Checkpoint.open(directory)
    if config is None and not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory}: has no config.json beside the weights; name one with --config")
    model = load_config(config or directory)
    found = describe(checkpoint, model)
    if json:
        print_json({"config": model.name, **found})
    else:
        _print(directory, model.name, found)
    if not found["complete"]:
        raise CheckpointError(f"{directory}: does not fit {model.name}: {_counts(found)}")


PROBLEMS = ("missing", "unexpected", "misshapen", "mistyped", "unsound")


def _counts(found: dict[str, Any]) -> str:
    return ", ".join(f"{len(found[kind])} tensors {kind}" for kind in PROBLEMS if found[kind])


def _print(directory: Path, model: str, found: dict[str, Any]) -> None:
    table = Table(title=f"{directory} against {model}", title_justify="left", show_header=False)
    table.add_row("names", found["table"])
    table.add_row("files", f"{len(found['files']):,}")
    table.add_row("tensors", f"{found['tensors']:,} in {size(found['bytes'])}")
    for dtype, count in found["bytes_by_dtype"].items():
        table.add_row(f"  {dtype}", size(count))
    table.add_row("parameters", f"{found['parameters']:,}")
    drafts = found["drafts"]
    what = drafts["model"] or "nothing"
    table.add_row("drafts with", what if drafts["checkpoint"] else f"nothing (the model: {what})")
    for kind in PROBLEMS:
        names = found[kind]
        if names:
            more = f"\nand {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
            table.add_row(kind, "\n".join(names[:SHOWN]) + more)
    table.add_row("complete", "yes" if found["complete"] else "no")
    print_table(table)
