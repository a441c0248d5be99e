"""Options that several commands share, spelled once."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Target(StrEnum):
    """What a plan runs on."""

    CPU = "cpu"
    SM_90A = "sm_90a"
    SM_100A = "sm_100a"


class Mode(StrEnum):
    """A bucket of a plan."""

    DECODE = "decode"
    PREFILL = "prefill"
    MTP = "mtp"


CONFIG_HELP = (
    "A built-in name (deepseek-v4-flash, deepseek-v4-pro, tiny), a config.json, or a checkpoint folder."
)

ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help=CONFIG_HELP, show_default=False)]
PlanArgument = Annotated[
    Path,
    typer.Argument(
        metavar="PLAN", help="A folder that `dsv4c compile` wrote.", show_default=False, readable=False
    ),
]
TargetOption = Annotated[Target, typer.Option(help="What the plan runs on.")]
RecipeOption = Annotated[
    str,
    typer.Option(
        help="Numerics: fp32, bf16, official, nvfp4-experts, nvfp4-experts-w4a4 or nvfp4.", metavar="NAME"
    ),
]
BatchOption = Annotated[int, typer.Option(help="Sequences that decode together.", min=1)]
ContextOption = Annotated[int, typer.Option(help="Tokens that a sequence has room for.", min=1)]
ChunkOption = Annotated[
    int | None,
    typer.Option(help="Tokens per prefill call.", min=1, show_default="64, or less in a shorter context"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, and only JSON, on stdout.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace what is there.")]


def first_given(context: typer.Context, names: Iterable[str]) -> str | None:
    """The first of these parameters that the command line names, as it is spelled there."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            return f"--{name.replace('_', '-')}"
    return None


def _find_here(given: list[str] | None) -> list[str] | None:
    """Modules beside the user are found, after all others: a file there takes the place of none of them."""
    if given and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    return given


PassOption = Annotated[
    list[str] | None,
    typer.Option(
        "--pass",
        callback=_find_here,
        help="Add a pass, fused op or rule of your own; may be repeated. Commands that read a plan need what "
        "it was compiled with.",
        metavar="MODULE:OBJECT",
        show_default=False,
    ),
]
