"""`dsv4c compile CONFIG`: a config becomes a plan folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv4c.cli.console import note, print_json, progress_bar, size
from dsv4c.cli.options import (
    BatchOption,
    ChunkOption,
    ConfigArgument,
    ContextOption,
    ForceOption,
    JsonOption,
    RecipeOption,
    Target,
    TargetOption,
)

if TYPE_CHECKING:
    from dsv4c.runtime.plan import Plan

OutputOption = Annotated[
    Path | None,
    typer.Option("-o", "--output", help="Folder to write.", show_default="NAME.plan", metavar="DIR"),
]
MtpOption = Annotated[
    bool, typer.Option("--mtp", help="Compile the draft (multi-token prediction) block, too.")
]
CacheOption = Annotated[
    Path | None,
    typer.Option(help="Folder of compiled kernels.", show_default="the user's cache", metavar="DIR"),
]
OrderOption = Annotated[str, typer.Option(help="Launch order: source, or memory for a smaller arena.")]


def register(app: typer.Typer) -> None:
    app.command("compile")(compile_command)


def compile_command(
    config: ConfigArgument,
    output: OutputOption = None,
    target: TargetOption = Target.CPU,
    recipe: RecipeOption = "official",
    batch: BatchOption = 1,
    max_context: ContextOption = 4096,
    chunk: ChunkOption = None,
    mtp: MtpOption = False,
    order: OrderOption = "source",
    cache: CacheOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Compile a model to a plan: a folder of plain data that `dsv4c run` executes.

    Examples:

      dsv4c compile tiny -o tiny.plan

      dsv4c compile ./my-checkpoint --batch 4 --max-context 8192 --chunk 128

      dsv4c compile deepseek-v4-flash --recipe nvfp4-experts --json
    """
    from dsv4c.compiler import compile
    from dsv4c.config import load_config
    from dsv4c.runtime.plan import check_target

    model = load_config(config)
    folder = output or Path(f"{model.name}.plan")
    check_target(folder, force=force)
    with progress_bar("compile") as progress:
        plan = compile(
            model,
            target=target.value,
            recipe=recipe,
            batch=batch,
            max_context=max_context,
            chunk=chunk,
            mtp=mtp,
            order=order,  # type: ignore[arg-type]  # checked by the scheduler
            cache=cache,
            progress=progress,
        )
    plan.save(folder, force=force)
    for remark in (*model.notes, *plan.report.get("notes", ())):
        note(f"note: {remark}")
    if json:
        print_json({"plan": str(folder)} | figures(plan))
    else:
        print(f"{folder}: {plan.name} for {plan.target}, recipe {plan.recipe}")
        print(describe(plan), end="")


def figures(plan: Plan) -> dict[str, Any]:
    """A plan in figures, for machines."""
    return {
        "name": plan.name,
        "digest": plan.digest,
        "config_digest": plan.config_digest,
        "deployment": dict(plan.deployment),
        "recipe": plan.recipe,
        "pipeline": plan.pipeline,
        "state_bytes": plan.state_bytes,
        "weights_bytes": plan.weights_bytes,
        **plan.report,
        **({"cache_hits": plan.cache_hits} if plan.kernels else {}),
        "seconds": {stage: round(seconds, 4) for stage, seconds in plan.timings.items()},
    }


def describe(plan: Plan) -> str:
    """A plan in figures, to read."""
    deployment = plan.deployment
    lines = [
        f"  batch {deployment['batch']}, {deployment['max_context']:,} tokens of context, "
        f"prefill in chunks of {deployment['chunk']}",
        f"  weights {size(plan.weights_bytes)}, state {size(plan.state_bytes)}",
    ]
    for mode, bucket in plan.buckets.items():
        lines.append(f"  {mode:8} {len(bucket.launches):,} launches, arena {size(bucket.arena_bytes)}")
    if plan.kernels:
        size_of_all = sum(len(content) for content in plan.files.values())
        lines.append(f"  {len(plan.kernels)} kernels for {plan.target}, files {size(size_of_all)}")
    if plan.timings:
        lines.append(f"  compiled in {sum(plan.timings.values()):.2f} s")
    return "\n".join(lines) + "\n"
