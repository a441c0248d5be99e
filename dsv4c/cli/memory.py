"""`dsv4c memory PLAN`: what a plan takes, and how many sequences of which context fit in how much."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import typer

from dsv4c.cli.console import print_json, print_rows, size
from dsv4c.cli.options import JsonOption, PassOption, PlanArgument
from dsv4c.compiler.job import Job, job_of, rules_of
from dsv4c.errors import ConfigError
from dsv4c.plan.folder import Plan, load
from dsv4c.runtime.bind import machine_memory

HEADROOM = 2 << 30
"""Bytes beside the blocks on a GPU: what the driver keeps, and weights on their way."""

BATCHES = (1, 2, 4, 8, 16)
STEP = 128
"""Contexts are compared, and rounded down, to multiples of this."""

MemoryOption = Annotated[
    float | None,
    typer.Option(help="How much there is.", metavar="GB", min=0.001, show_default="this machine's"),
]


def register(app: typer.Typer) -> None:
    app.command("memory")(memory_command)


def memory_command(
    plan: PlanArgument, memory: MemoryOption = None, extra: PassOption = None, json: JsonOption = False
) -> None:
    """Say what a plan takes of memory before it is loaded, and what fits in how much.

    Weights once, state for every sequence, and an arena that all buckets share: the largest one's. For what
    fits, sequences are compiled with --batch and --max-context; the arena is taken to stay as it is.

    Examples:

      dsv4c memory flash.plan

      dsv4c memory flash.plan --memory 141
    """
    compiled = load(plan)
    have = machine_memory(compiled.target) if memory is None else int(memory * 1e9)
    if not have:
        raise ConfigError(
            f"{plan} is for {compiled.target}, and there is no GPU here; say how much one has, --memory GB"
        )
    found = figures(compiled, job_of(compiled, rules_of(extra or ())), have)
    if json:
        print_json(found)
        return
    print(f"{plan}: {compiled.name} for {compiled.target}, {size(found['total'])} of {size(have)}")
    slots, context = found["slots"], found["max_context"]
    print(f"  weights   {size(found['weights']):>10}")
    each = size(found["state_per_sequence"])
    print(f"  state     {size(found['state']):>10}   {slots} × {each}, {context:,} tokens each")
    print(f"  arena     {size(found['arena']):>10}")
    for name, arena in found["buckets"].items():
        print(f"    {name:16} {size(arena):>10}")
    print(f"  the rest  {size(found['rest']):>10}   constants, inputs, what loading takes")
    print_rows(
        [{"batch": row["batch"], "most --max-context": f"{row['max_context']:,}"} for row in found["fits"]]
    )


def figures(plan: Plan, job: Job, have: int) -> dict[str, Any]:
    """Bytes by purpose, and the longest context for each number of sequences; 0 where none fits."""
    blocks, slots = plan.blocks, int(plan.deployment["slots"])
    rest = blocks["constants"] + blocks["input"] + (HEADROOM if plan.target != "cpu" else 0)
    fixed, per_token = state_sizes(job)
    left = have - blocks["weights"] - blocks["arena"] - rest
    fits = []
    for batch in BATCHES:
        tokens = int((left / batch - fixed) / per_token) // STEP * STEP
        most = int(plan.config["max_position_embeddings"])
        fits.append({"batch": batch, "max_context": max(0, min(tokens, most))})
    return {
        "memory": have,
        "total": sum(blocks[name] for name in ("weights", "state", "arena")) + rest,
        "weights": blocks["weights"],
        "state": blocks["state"],
        "state_per_sequence": blocks["state"] // slots,
        "arena": blocks["arena"],
        "rest": rest,
        "slots": slots,
        "max_context": int(plan.deployment["max_context"]),
        "buckets": {name: program.arena_bytes for name, program in plan.buckets.items()},
        "fits": fits,
    }


def state_sizes(job: Job) -> tuple[float, float]:
    """Bytes of a sequence's state: what every one has, and what each token of context adds."""
    short, long = 32 * STEP, 64 * STEP
    few, many = (_state(job, context) for context in (short, long))
    per_token = (many - few) / (long - short)
    return few - per_token * short, per_token


def _state(job: Job, context: int) -> int:
    """Bytes of one sequence's state at a context, as the recipe quantizes it."""
    deployment = replace(job.deployment, max_context=context, slots=job.deployment.batch)
    asked = replace(job, deployment=deployment)
    graph = asked.compiled(asked.decode, stop_after="quantize").graph
    return sum(value.type.extent for value in graph.states) // deployment.slots
