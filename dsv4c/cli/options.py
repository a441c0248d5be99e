"""Options that several commands share, spelled once."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dsv4c.arch import ARCHS
from dsv4c.compiler.job import rules_of
from dsv4c.config import BUILTIN, ModelConfig
from dsv4c.errors import ConfigError, listed
from dsv4c.exchange import MOST_RANKS
from dsv4c.passes.recipes import RECIPES


class Draft(StrEnum):
    """What drafts tokens ahead."""

    OFF = "off"
    AUTO = "auto"
    MTP = "mtp"
    DSPARK = "dspark"
    GIVEN = "given"


def no_drafts(config: ModelConfig) -> str:
    """Why a plan that was to draft with what there is does not."""
    if not config.drafts_with:
        return f"{config.name}: nothing drafts; every step says one token"
    return (
        f"{config.name}: every step says one token: rounds of so many sequences have more rows than a step "
        f"takes, or read more than they gain; --draft {config.drafts_with} drafts where rows allow it"
    )


class Logits(StrEnum):
    """Of which tokens of a chunk."""

    ALL = "all"
    LAST = "last"


def sizes(option: str, given: str | None) -> tuple[int, ...] | None:
    """Sizes of buckets, apart by commas. Raises ConfigError naming the option for what is no number."""
    if given is None:
        return None
    parts = [part.strip() for part in given.split(",")]
    for part in parts:
        if not re.fullmatch(r"[0-9]{1,9}", part):
            raise ConfigError(f"{option}: {part!r} is no size of a bucket, expected numbers like 1,2,4,8")
    return tuple(map(int, parts))


def begun_with(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """Completes what a shell's user has begun to type to one of `names`; without any, to a file."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names() if name.startswith(incomplete)]

    return complete


TARGETS = ("cpu", *ARCHS)


def known_target(given: str) -> str:
    """The target of that name, as the command line gives it."""
    if given not in TARGETS:
        raise typer.BadParameter(f"{given!r} is not one of {listed(TARGETS, given)}")
    return given


COMPLETE_MODEL = begun_with(lambda: BUILTIN)
COMPLETE_RULE = begun_with(lambda: rules_of().rules)

CONFIG_HELP = (
    "A built-in name (deepseek-v4-flash, deepseek-v4-pro, tiny), a config.json, or a checkpoint folder."
)

ConfigArgument = Annotated[
    str,
    typer.Argument(metavar="CONFIG", help=CONFIG_HELP, show_default=False, autocompletion=COMPLETE_MODEL),
]
PlanArgument = Annotated[
    Path,
    typer.Argument(
        metavar="PLAN", help="A folder that `dsv4c compile` wrote.", show_default=False, readable=False
    ),
]
TargetOption = Annotated[
    str,
    typer.Option(
        help="What the plan runs on.",
        metavar=f"[{'|'.join(TARGETS)}]",
        parser=known_target,
        autocompletion=begun_with(lambda: TARGETS),
    ),
]
RecipeOption = Annotated[
    str,
    typer.Option(
        help="Numerics: fp32, bf16, official, nvfp4-experts, ... (`dsv4c recipes` has all).",
        metavar="NAME",
        autocompletion=begun_with(lambda: RECIPES),
    ),
]
BatchOption = Annotated[
    str | None,
    typer.Option(
        help="Sequences that decode together, a bucket for each number: 1,2,4,8.",
        metavar="N,N",
        show_default="1; on a GPU 1,2,4,8",
    ),
]
BucketOption = Annotated[
    str, typer.Option(help="Which bucket: decode-8, prefill-64, or the smallest of a kind.", metavar="NAME")
]
ContextOption = Annotated[int, typer.Option(help="Tokens that a sequence has room for.", min=1)]
ChunkOption = Annotated[
    str | None,
    typer.Option(
        help="Tokens of one sequence that a prefill call takes, a bucket for each number.",
        metavar="N,N",
        show_default="64; on sm_90a 64,512,4096; on sm_100a 8; none beyond the context",
    ),
]
RanksOption = Annotated[
    int,
    typer.Option(
        help="Devices that hold a part of the model each, and run it together: GPUs of one machine.",
        min=1,
        max=MOST_RANKS,
    ),
]
MessagesOption = Annotated[
    Path,
    typer.Option(
        help="JSON file: a list of messages, or an object with `messages` and options.",
        metavar="FILE",
        show_default=False,
        readable=False,
    ),
]
EncodingOption = Annotated[
    str,
    typer.Option(
        help="The rules of which release: preview, 0731, or auto: those of the checkpoint folder's encoder.",
        metavar="NAME",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, and only JSON, on stdout.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


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
