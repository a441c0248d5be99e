"""`dsv4c show CONFIG|PLAN`: a summary of the graph, then the graph."""

from __future__ import annotations

import json as json_text
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from dsv4c.cli.compile import describe, figures
from dsv4c.cli.console import note, print_json, print_rows, write_text
from dsv4c.cli.options import (
    BatchOption,
    BucketOption,
    ChunkOption,
    ContextOption,
    JsonOption,
    PassOption,
    RanksOption,
    RecipeOption,
)
from dsv4c.cli.subject import Asked, Subject, ask_with, refuse_decided
from dsv4c.compiler.job import Compiled
from dsv4c.errors import GraphError, PlanError
from dsv4c.ir.text import graph_to_json
from dsv4c.plan.folder import Plan, load
from dsv4c.view.dot import dot
from dsv4c.view.html import html
from dsv4c.view.launches import launched
from dsv4c.view.layers import layer_graph
from dsv4c.view.model_explorer import model_explorer
from dsv4c.view.svg import svg
from dsv4c.view.text import render, summarize


class Format(StrEnum):
    """Forms of a graph."""

    TEXT = "text"
    JSON = "json"
    DOT = "dot"
    SVG = "svg"
    HTML = "html"
    MODEL_EXPLORER = "model-explorer"


LayerOption = Annotated[
    str | None, typer.Option(help="One layer only: 3, layers.3 or mtp.0.", metavar="N", show_default=False)
]
FormatOption = Annotated[
    Format,
    typer.Option(help="Form of the graph. html (one file, no network) and model-explorer show every stage."),
]
AfterOption = Annotated[
    str | None,
    typer.Option(
        help="The graph after that pass: build, quantize, fold, ...", metavar="PASS", show_default=False
    ),
]
OutputOption = Annotated[
    Path | None,
    typer.Option("-o", "--output", help="Write the graph to a file.", metavar="FILE", show_default=False),
]
KernelsOption = Annotated[
    bool, typer.Option("--kernels", help="A GPU plan's kernels: launches, registers, memory, code.")
]
BodiesOption = Annotated[
    bool, typer.Option("--bodies", help="Draw what fused ops stand for, in place of a box per launch.")
]
OriginsOption = Annotated[
    bool, typer.Option("--origins", help="Name the nodes that a rewritten node stands for.")
]
FoldOption = Annotated[bool, typer.Option("--fold/--no-fold", help="Show equal layers once, with a count.")]


def register(app: typer.Typer) -> None:
    app.command("show")(show_command)


def show_command(
    context: typer.Context,
    subject: Subject,
    layer: LayerOption = None,
    format: FormatOption = Format.TEXT,
    output: OutputOption = None,
    bucket: BucketOption = "decode",
    fold: FoldOption = True,
    after: AfterOption = None,
    bodies: BodiesOption = False,
    origins: OriginsOption = False,
    kernels: KernelsOption = False,
    recipe: RecipeOption = "official",
    batch: BatchOption = None,
    max_context: ContextOption = 4096,
    chunk: ChunkOption = None,
    ranks: RanksOption = 1,
    extra: PassOption = None,
    json: JsonOption = False,
) -> None:
    """Show a model's graph: figures first, then the operations, equal layers folded into one.

    A plan is shown as it was compiled; it takes no --recipe, --batch, --max-context, --chunk or
    --ranks.
    With --json the figures are printed, and the graph is written only if -o names a file for it; --format
    json gives the graph itself.

    Examples:

      dsv4c show deepseek-v4-pro --layer 2

      dsv4c show deepseek-v4-flash --ranks 2 --after shard --layer 4

      dsv4c show tiny.plan --json

      dsv4c show tiny --after fold --layer 1 --format svg -o layer.svg

      dsv4c show flash.plan --kernels

      dsv4c show tiny --after fold --layer 2

      dsv4c show deepseek-v4-pro --format html -o pro.html
    """
    refuse_decided(context, subject)
    if kernels:
        _show_kernels(subject, json)
        return
    if layer is not None and format in (Format.HTML, Format.MODEL_EXPLORER):
        raise GraphError(f"--format {format.value} shows every layer; leave --layer out")
    asked = ask_with(context, subject)
    staging = format in (Format.HTML, Format.MODEL_EXPLORER) and after is None
    plan = asked.plan if after is None and not staging else None
    compiled = asked.compiled(bucket) if staging or after is not None else None
    if compiled is not None:
        graph = compiled.graph if after is None else compiled.after(after)
    else:
        graph = asked.stage(bucket, "quantize" if asked.plan is None else None)
    one = int(layer) if layer and layer.isdecimal() else layer
    summary = summarize(graph if one is None else layer_graph(graph, one), asked.job.config)
    if compiled is not None and staging:
        text = staged(compiled, asked, format, bucket, fold)
    elif format is Format.TEXT:
        text = render(graph, one, fold, origins=origins)
    elif format is Format.JSON:
        shown = graph if one is None else layer_graph(graph, one)
        text = json_text.dumps(graph_to_json(shown), indent=1) + "\n"
    elif format in (Format.DOT, Format.SVG):
        draw = dot if format is Format.DOT else svg
        text = draw(graph, one, fold, bodies, launches_of(plan, bucket) if plan is not None else {})
    else:
        raise GraphError(f"--format {format.value} shows every stage; leave --after out")
    if format is Format.TEXT:
        head = summary.text() + (describe(plan) if plan else "")
        text = f"{head}\n{text}"
    if output is not None or not json:
        write_text(output, text, GraphError)
    if output is not None:
        note(f"{output}: {format.value}, {len(text):,} characters")
    if json:
        print_json({"summary": summary.to_dict()} | (figures(plan) if plan else {}))


def staged(compiled: Compiled, asked: Asked, format: Format, bucket: str, fold: bool) -> str:
    """All stages of a bucket in one file; of a plan in HTML its launches, too, and the source of kernels."""
    if format is Format.MODEL_EXPLORER:
        return json_text.dumps(model_explorer(compiled.named, fold), separators=(",", ":")) + "\n"
    title = f"{asked.job.config.name}, {asked.job.recipe.name}"
    if asked.plan is None:
        return html(compiled.named, title=title)
    sources, launches = kernel_sources(asked.plan, bucket), launched(asked.plan, bucket)
    return html(compiled.named, title=title, sources=sources, launches=launches)


def kernel_sources(plan: Plan, bucket: str) -> dict[str, str]:
    """The source of the kernel that runs each node of a bucket."""
    if not plan.kernels:
        return {}
    files = {key: plan.files[record["source"]].decode() for key, record in plan.kernels.items()}
    launches = plan.program(bucket).launches
    return {name: files[launch.kernel.kernel] for launch in launches for name in launch.nodes}


def _show_kernels(subject: str, json: bool) -> None:
    plan = load(subject)
    if not plan.kernels:
        raise PlanError(f"{subject}: is compiled for {plan.target}, which has no kernels; compile for sm_90a")
    rows = kernel_rows(plan)
    if json:
        print_json({"kernels": rows})
        return
    print(f"{plan.name} for {plan.target}: {len(rows)} kernels")
    print_rows(
        [
            {
                "launches": row["launches"],
                "regs": row["registers"],
                **{key: row[key] for key in ("shared", "spills", "code", "kernel", "op", "origin")},
            }
            for row in rows
        ]
    )


def launches_of(plan: Plan, bucket: str) -> dict[str, str]:
    """The launch that runs each node of a bucket; of several that share the work, the first."""
    found: dict[str, str] = {}
    for launch in plan.program(bucket).launches:
        for name in launch.nodes:
            found.setdefault(name, launch.name)
    return found


def kernel_rows(plan: Plan) -> list[dict[str, Any]]:
    """One row per kernel, by number of launches in all buckets. Registers and spills are per thread; spills
    are the bytes of its stack, where arrays indexed at run time would lie, too.
    """
    launches = [launch for program in plan.buckets.values() for launch in program.launches]
    rows = []
    for key, record in plan.kernels.items():
        own = [launch for launch in launches if launch.kernel.kernel == key]
        rows.append(
            {
                "kernel": key,
                "origin": f"edited, of {record['origin']}" if record["edited"] else record["origin"],
                "op": own[0].op,
                "launches": len(own),
                "registers": record["registers"],
                "shared": own[0].kernel.shared,
                "spills": record["stack"],
                "code": record["code"],
            }
        )
    return sorted(rows, key=lambda row: -int(row["launches"]))
