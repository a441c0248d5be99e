"""`dsv4c limits CONFIG`: everything that stands between a config and a plan, before anything is compiled."""

from __future__ import annotations

from dataclasses import asdict

import typer

from dsv4c.cli.console import print_json, size
from dsv4c.cli.options import (
    BatchOption,
    ChunkOption,
    ConfigArgument,
    ContextOption,
    JsonOption,
    PassOption,
    RecipeOption,
    TargetOption,
    sizes,
)
from dsv4c.compiler.job import rules_of
from dsv4c.compiler.limits import Limits, limits
from dsv4c.compiler.request import Request
from dsv4c.errors import BuildError


def register(app: typer.Typer) -> None:
    app.command("limits")(limits_command)


def limits_command(
    config: ConfigArgument,
    target: TargetOption = "sm_90a",
    recipe: RecipeOption = "official",
    batch: BatchOption = None,
    max_context: ContextOption = 4096,
    chunk: ChunkOption = None,
    extra: PassOption = None,
    json: JsonOption = False,
) -> None:
    """Say what stands between a model and a plan for a target: every obstacle, and the memory.

    Asks the kernels themselves, and compiles none. An obstacle names the key of the config, and a value that
    there are kernels for. Exit code 7 if there is one.

    Examples:

      dsv4c limits my-config.json

      dsv4c limits deepseek-v4-pro --target sm_100a --batch 1,8 --max-context 131072
    """
    request = Request(
        config,
        target=target,
        recipe=recipe,
        batch=sizes("--batch", batch),
        max_context=max_context,
        chunk=sizes("--chunk", chunk),
        rules=rules_of(extra or ()),
    )
    found = limits(request)
    if json:
        print_json(
            {
                "config": found.job.config.name,
                "target": target,
                "recipe": found.job.recipe.name,
                "obstacles": [asdict(o) for o in found.obstacles],
                "unfolded": [asdict(u) for u in found.unfolded],
                "memory": {
                    "blocks": dict(found.memory.blocks),
                    "needed": found.memory.needed,
                    "card": found.memory.card,
                    "fits": found.memory.fits,
                },
            }
        )
    else:
        print(text(found), end="")
    if found.obstacles:
        count = len(found.obstacles)
        raise BuildError(f"{config}: {count} obstacle{'s' * (count != 1)} to a plan for {target}")


def text(found: Limits) -> str:
    """What was found, to read."""
    job = found.job
    lines = [f"{job.config.name} for {job.deployment.target}, recipe {job.recipe.name}"]
    for obstacle in found.obstacles:
        lines.append(f"  obstacle  {obstacle}")
        if obstacle.key:
            why = next((r for r in obstacle.reasons if str(obstacle.value) in r), obstacle.reasons[0])
            lines.append(f"            {why.splitlines()[-1].strip()}")
    for u in found.unfolded:
        more = f"{u.launches:+,} launches, {size(u.bytes)} more"
        lines.append(f"  unfolded  {u.bucket}: no kernel for {u.nodes} × {u.op}: {more}")
    if not found.obstacles and not found.unfolded:
        lines.append("  every launch has its kernel" if found.memory.card else "  nothing stands in the way")
    return "\n".join([*lines, f"  memory    {found.memory}"]) + "\n"
