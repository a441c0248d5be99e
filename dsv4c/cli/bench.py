"""`dsv4c bench PLAN`: where a step's microseconds go, on the GPU."""

from __future__ import annotations

import gzip
import re
import statistics
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsv4c.cli.console import print_json, progress_bar
from dsv4c.cli.options import JsonOption, PlanArgument
from dsv4c.errors import ConfigError, PlanError
from dsv4c.plan.folder import load

if TYPE_CHECKING:
    from dsv4c.runtime.bench import Bench


def register(app: typer.Typer) -> None:
    app.command("bench")(bench_command)


def bench_command(
    plan: PlanArgument,
    weights: Annotated[
        Path | None,
        typer.Option(help="Checkpoint folder, or a .safetensors file.", metavar="DIR", show_default=False),
    ] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Weights made on the device; no checkpoint is needed.")
    ] = False,
    bucket: Annotated[
        str,
        typer.Option(help="Which bucket: decode-8, verify-1x4, or the smallest of a kind.", metavar="NAME"),
    ] = "decode",
    layers: Annotated[
        str | None,
        typer.Option(
            help="These layers alone, of a model that the GPU cannot hold: 0:11.",
            metavar="A:B",
            show_default=False,
        ),
    ] = None,
    alone: Annotated[
        int | None,
        typer.Option(
            help="This rank of a plan for several, by itself: what it waits for is there already.",
            metavar="RANK",
            show_default=False,
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Write when every CTA of one step begins, has waited and ends: for ui.perfetto.dev, smaller "
            "as .json.gz.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    position: Annotated[int, typer.Option(help="Tokens before the step.", min=0)] = 8192,
    replays: Annotated[int, typer.Option(help="Of every part; a time is their median.", min=3)] = 31,
    json: JsonOption = False,
) -> None:
    """Time a plan's step, every layer and every launch in its place, beside what its bytes take.

    Runs on the GPU that the plan is for. Times are medians of replays of one CUDA graph's prefixes, from a
    flushed L2; floors are bytes over the bandwidth that the same run reads with. Eight layers or more keep
    each other's weights out of the cache.

    Examples:

      dsv4c bench flash.plan --random-weights --layers 0:11

      dsv4c bench tiny.plan --weights tiny-weights --bucket decode-8 --json

      dsv4c bench flash.plan --random-weights --layers 0:11 --trace step.json.gz
    """
    if random_weights == (weights is not None):
        raise ConfigError("give either --weights DIR or --random-weights")
    cut = _range(layers)
    if cut is not None and weights is not None:
        raise ConfigError("--layers takes --random-weights: a checkpoint is bound whole")
    if alone is not None and weights is not None:
        raise ConfigError("--alone takes --random-weights: a checkpoint is bound whole")
    if trace is not None and not trace.parent.is_dir():
        raise ConfigError(f"--trace {trace}: there is no folder {trace.parent}; make it first")
    compiled = load(plan)
    if trace is not None and compiled.ranks > 1:
        raise ConfigError(f"--trace: {plan} is for {compiled.ranks} ranks, a trace is of a plan for one GPU")
    if compiled.target == "cpu":
        raise PlanError(
            f"{plan}: is compiled for the CPU; bench times GPU plans, compile with --target sm_90a"
        )
    from dsv4c.runtime.bench import bench, layers_alone, random_executor  # loads torch and the driver
    from dsv4c.runtime.cuda import CudaExecutor  # loads torch and the driver
    from dsv4c.runtime.ranks import CudaRanks  # loads torch and the driver
    from dsv4c.runtime.trace import perfetto, record  # loads torch and the driver

    if cut is not None:
        compiled = layers_alone(compiled, bucket, *cut)
    executor = random_executor(compiled, alone) if weights is None else compiled.bind(weights).executor
    assert isinstance(executor, CudaExecutor | CudaRanks)
    with progress_bar("timing") as progress:
        found = bench(
            compiled, executor, bucket=bucket, position=position, replays=replays, progress=progress
        )
    if trace is not None:
        assert isinstance(executor, CudaExecutor)  # of one rank
        spans = record(compiled, executor.blocks["weights"], found.bucket, found.position)
        launches = compiled.buckets[found.bucket].launches
        data = dumps(perfetto(launches, spans)).encode()
        trace.write_bytes(gzip.compress(data) if trace.suffix == ".gz" else data)
    if json:
        print_json(found.to_dict() | ({} if alone is None else {"alone": alone}))
        return
    if alone is not None:
        print(
            f"rank {alone} of {compiled.ranks} alone, on one GPU: exchanges cost what an answer at once does"
        )
    print(text(found), end="")
    if trace is not None:
        print(f"{trace}: {len(spans)} CTAs of {len(launches)} launches, to be opened at ui.perfetto.dev")


def text(found: Bench) -> str:
    """The tables."""
    machine = found.machine
    lines = [
        f"{machine.name}: copies {machine.copy_bandwidth / 1e12:.2f} TB/s, reads "
        f"{machine.read_bandwidth / 1e12:.2f} TB/s, a launch {machine.node_us:.2f} us",
        f"{found.plan}, {found.recipe}, {found.bucket} at {found.position}: {found.launches} launches, "
        f"{found.step_us:,.1f} us{'; the logits are not finite' if found.finite_logits is False else ''}",
        "",
        "layers     count       us    least     most       MB  floor us  times",
    ]
    for kind in dict.fromkeys(layer.kind for layer in found.layers):
        rows = [layer for layer in found.layers if layer.kind == kind]
        times = [row.microseconds for row in rows]
        middle, last = statistics.median(times), rows[-1]
        lines.append(
            f"{kind:10} {len(rows):5} {middle:8.1f} {min(times):8.1f} {max(times):8.1f} "
            f"{last.megabytes:8.1f} {last.floor:9.1f} {middle / last.floor:6.2f}"
        )
    lines += ["", f"{'launch':56}   grid       us       MB  floor us"]
    for part in found.parts:
        name = f"{part.kind} {part.name}"[:56]
        numbers = f"{part.microseconds:8.2f} {part.megabytes:8.2f} {part.floor:9.2f}"
        lines.append(f"{name:56} {part.grid:6} {numbers}")
    return "\n".join(lines) + "\n"


def _range(given: str | None) -> tuple[int, int] | None:
    """`0:11` as numbers. Raises ConfigError."""
    if given is None:
        return None
    found = re.fullmatch(r"([0-9]{1,4}):([0-9]{1,4})", given)
    if found is None or int(found[1]) > int(found[2]):
        raise ConfigError(f"--layers: {given!r} is no range of layers, expected the first and last: 0:11")
    return int(found[1]), int(found[2])
