"""`dsv4c diff A B`: what differs between two plans, or two stages."""

from __future__ import annotations

from typing import Annotated

import typer

from dsv4c.cli.console import painted, print_json
from dsv4c.cli.options import (
    BatchOption,
    BucketOption,
    ChunkOption,
    ContextOption,
    JsonOption,
    PassOption,
    RecipeOption,
)
from dsv4c.cli.subject import ask_with, refuse_decided, split_stage
from dsv4c.view.diff import diff

HELP = "A plan folder or a config, with @STAGE (build, quantize, fold, ...) for the graph after that pass."
Left = Annotated[str, typer.Argument(metavar="A", help=HELP, show_default=False)]
Right = Annotated[str, typer.Argument(metavar="B", help="The same; @STAGE alone: of A.", show_default=False)]
LimitOption = Annotated[int, typer.Option(help="Nodes of each sort to list.", min=0)]


def register(app: typer.Typer) -> None:
    app.command("diff")(diff_command)


def diff_command(
    context: typer.Context,
    a: Left,
    b: Right,
    bucket: BucketOption = "decode",
    limit: LimitOption = 20,
    recipe: RecipeOption = "official",
    batch: BatchOption = None,
    max_context: ContextOption = 4096,
    chunk: ChunkOption = None,
    extra: PassOption = None,
    json: JsonOption = False,
) -> None:
    """Compare two graphs: nodes gone, new and changed; launches, bytes and operations.

    Examples:

      dsv4c diff old.plan new.plan

      dsv4c diff tiny.plan@quantize @fold
    """
    refuse_decided(context, *(name for name, _ in map(split_stage, (a, b)) if name))
    graphs = []
    subject = a
    for given in (a, b):
        name, stage = split_stage(given)
        subject = name or subject
        graphs.append(ask_with(context, subject).stage(bucket, stage))
    found = diff(*graphs)
    if json:
        print_json(found.to_dict())
    else:
        print(painted(found.text(limit)), end="")
