"""`dsv4c tune PLAN --build FOLDER`, then `dsv4c tune FOLDER` on the GPU: the fastest cut of heavy kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsv4c.cli.compile import CacheOption
from dsv4c.cli.console import note, print_json, progress_bar, write_text
from dsv4c.cli.options import JsonOption, first_given
from dsv4c.compiler.tune import variants
from dsv4c.cuts import Row, rows_text
from dsv4c.errors import ConfigError
from dsv4c.plan.folder import load
from dsv4c.plan.variants import read_variants

if TYPE_CHECKING:
    from dsv4c.runtime.tune import Timed

WINS = 0.996  # a ratio that is worth a row: less than 0.4 % is what a step's place in memory moves it by

BUILDING, TIMING = ("kernels", "each", "overwrite", "cache"), ("rounds", "position", "output")


def register(app: typer.Typer) -> None:
    app.command("tune")(tune_command)


def tune_command(
    context: typer.Context,
    subject: Annotated[
        Path, typer.Argument(help="A plan, with --build; else a folder of variants.", metavar="PLAN|FOLDER")
    ],
    build: Annotated[
        Path | None,
        typer.Option(
            help="Build variants of the plan's heaviest kernels here; needs no GPU.",
            metavar="FOLDER",
            show_default=False,
        ),
    ] = None,
    kernels: Annotated[int, typer.Option(help="Kernels to vary, heaviest first.", min=1)] = 4,
    each: Annotated[int, typer.Option(help="Variants of a kernel.", min=1)] = 24,
    rounds: Annotated[int, typer.Option(help="Turns of a variant and the plan as it is.", min=3)] = 5,
    position: Annotated[int, typer.Option(help="Tokens before the step.", min=0)] = 8192,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Table of winners, for compile --tuned. [default: FOLDER/tuned.json]",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the folder that --build names.")] = False,
    cache: CacheOption = None,
    json: JsonOption = False,
) -> None:
    """Find faster cuts of a plan's heaviest kernels.

    Varied is what changes no bit of a result and no weight's place: tiles a CTA, steps in a ring, steps in
    flight. Variants are built where the compiler is, and timed on a GPU that runs nothing else.

    Examples:

      dsv4c tune flash.plan --build flash-variants

      dsv4c tune flash-variants -o h200.json

      dsv4c compile deepseek-v4-flash --target sm_90a --tuned h200.json
    """
    others = TIMING if build is not None else BUILDING
    if (given := first_given(context, others)) is not None:
        does, other = ("builds", "times") if build is not None else ("times", "builds")
        raise ConfigError(
            f"tune: {given} is for the call that {other}, this one {does} variants; leave it out"
        )
    if build is not None:
        with progress_bar("tune") as progress:
            made = variants(load(subject), kernels=kernels, each=each, cache=cache, progress=progress)
        made.save(build, overwrite=overwrite)
        counts = {
            kernel: sum(v.kernel == kernel for v in made.variants)
            for kernel in dict.fromkeys(v.kernel for v in made.variants)
        }
        if json:
            print_json({"folder": str(build), "variants": counts})
        for kernel, count in counts.items() if not json else ():
            print(f"{kernel}: {count} variants")
        note(f"on the GPU: dsv4c tune {build}")
        return
    from dsv4c.runtime.tune import card, measure  # loads torch and the driver

    found = read_variants(subject)
    with progress_bar("tune") as progress:
        timed = list(measure(found, position=position, rounds=rounds, progress=progress))
        best = replace(found, variants=tuple(each.variant for each in finalists(timed)))
        finals = list(measure(best, position=position, rounds=4 * rounds, anew=True, progress=progress))
    rows = winners(finals, card(found.plan))
    target = output or subject / "tuned.json"
    write_text(target, rows_text(rows), ConfigError)
    if json:
        data = {"timed": [_data(each) for each in timed], "finals": [_data(each) for each in finals]}
        print_json({"table": str(target), **data})
    else:
        print(f"{table(timed)}\n\nthe nearest to win, again, in {4 * rounds} turns\n{table(finals)}")
    note(f"{len(rows)} kernels are faster than planned: {target}" if rows else f"none is faster: {target}")


def finalists(timed: Sequence[Timed], count: int = 3) -> list[Timed]:
    """Of each kernel the `count` fastest with the same bits: of many, some are faster by chance."""
    found: dict[str, list[Timed]] = {}
    for each in sorted(timed, key=lambda t: t.ratio):
        own = found.setdefault(each.variant.key, [])
        if each.same and each.ratio < 1 and len(own) < count:
            own.append(each)
    return [each for own in found.values() for each in own]


def winners(timed: Sequence[Timed], gpu: str) -> list[Row]:
    """The fastest variant of each kernel, if it is faster in three rounds of four and gives the same bits."""
    today = datetime.now(UTC).date().isoformat()
    best: dict[str, Timed] = {}
    for each in timed:
        wins = each.same and each.ratio < WINS and each.quartiles[1] < 1
        if wins and (each.variant.key not in best or each.ratio < best[each.variant.key].ratio):
            best[each.variant.key] = each
    return [
        Row(gpu, t.variant.kernel, key, t.variant.cut, round(t.ratio, 4), today) for key, t in best.items()
    ]


def table(timed: Sequence[Timed]) -> str:
    """A line per variant, the fastest of each kernel first."""
    lines = [f"{'kernel':28} {'cut':32} {'us':>8} {'planned':>8} {'ratio':>7} {'quartiles':>15}"]
    for each in sorted(timed, key=lambda t: (t.variant.kernel, t.ratio)):
        low, high = each.quartiles
        lines.append(
            f"{each.variant.kernel:28} {each.variant.cut!s:32} {each.us:8.1f} {each.planned_us:8.1f} "
            f"{each.ratio:7.4f} {low:7.4f} {high:7.4f}{'' if each.same else '  OTHER BITS'}"
        )
    return "\n".join(lines)


def _data(timed: Timed) -> dict[str, object]:
    v = timed.variant
    return {
        "kernel": v.kernel,
        "key": v.key,
        "cut": v.cut.data,
        "us": timed.us,
        "planned_us": timed.planned_us,
        "ratio": timed.ratio,
        "quartiles": list(timed.quartiles),
        "same": timed.same,
    }
