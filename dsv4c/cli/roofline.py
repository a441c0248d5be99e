"""`dsv4c roofline CONFIG|PLAN`: the least time of a call, and where it goes."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from typing import Annotated

import typer

from dsv4c.arch import ARCHS, SM_90A, Arch
from dsv4c.buckets import ROWS, Bucket
from dsv4c.cli.console import note, print_json, write_text
from dsv4c.cli.options import (
    BatchOption,
    BucketOption,
    ChunkOption,
    ContextOption,
    JsonOption,
    PassOption,
    RecipeOption,
)
from dsv4c.cli.show import LayerOption, OutputOption
from dsv4c.cli.subject import Subject, ask_with, refuse_decided
from dsv4c.compiler.job import Job
from dsv4c.compiler.request import DSPARK_TOKENS
from dsv4c.errors import ConfigError, GraphError, listed
from dsv4c.models.drafting import worth
from dsv4c.view import drafting
from dsv4c.view.roofline import roofline, svg, text


class Form(StrEnum):
    """Forms of the result."""

    TEXT = "text"
    SVG = "svg"


def register(app: typer.Typer) -> None:
    app.command("roofline")(roofline_command)


def roofline_command(
    context: typer.Context,
    subject: Subject,
    layer: LayerOption = None,
    arch: Annotated[
        str | None,
        typer.Option(
            help="The GPU; by default the plan's, or sm_90a (H200).", metavar="NAME", show_default=False
        ),
    ] = None,
    format: Annotated[Form, typer.Option(help="Form of the result; svg draws a bar per launch.")] = Form.TEXT,
    output: OutputOption = None,
    bucket: BucketOption = "decode",
    recipe: RecipeOption = "official",
    batch: BatchOption = None,
    max_context: ContextOption = 4096,
    chunk: ChunkOption = None,
    extra: PassOption = None,
    draft: Annotated[
        bool, typer.Option("--draft", help="Rounds that draft against plain steps, by how often drafts hold.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Say what every launch must move and compute, and how long that takes at least.

    Of a plan, launches are its own; of a config, every node of the fused graph is one. Bytes are a call's
    with full caches.

    Examples:

      dsv4c roofline deepseek-v4-flash --max-context 8192

      dsv4c roofline flash.plan --layer 4

      dsv4c roofline deepseek-v4-pro --bucket prefill-64 --chunk 64

      dsv4c roofline deepseek-v4-flash --format svg -o flash.svg

      dsv4c roofline deepseek-v4-flash --max-context 8192 --draft
    """
    refuse_decided(context, subject)
    asked = ask_with(context, subject)
    plan = asked.plan
    own = plan.target if plan is not None and plan.target in ARCHS else SM_90A.name
    name = own if arch is None else arch
    if name not in ARCHS:
        raise ConfigError(f"--arch: {name!r} is no GPU that dsv4c knows, only {listed(ARCHS, name)}")
    if draft:
        gains = drafting_of(asked.job, ARCHS[name])
        if json:
            print_json(gains.to_dict())
        else:
            write_text(output, drafting.text(gains), GraphError)
        return
    groups = [launch.nodes for launch in plan.program(bucket).launches] if plan is not None else []
    number = int(layer) if layer and layer.isdecimal() else layer
    found = roofline(asked.stage(bucket, None), ARCHS[name], groups, number)
    if json:
        print_json(found.to_dict())
        return
    made = svg(found) if format is Form.SVG else text(found)
    write_text(output, made, GraphError)
    if output is not None:
        note(f"{output}: {format.value}, {len(made):,} characters")


def drafting_of(job: Job, arch: Arch) -> drafting.Drafting:
    """A model's rounds of every number of drafts, one sequence each, against its plain step.

    Raises ConfigError for a model that has nothing that drafts.
    """
    config = job.config
    if not config.drafts_with:
        raise ConfigError(f"{config.name}: has nothing that drafts, so there is nothing to compare")

    def floor(*buckets: Bucket) -> tuple[float, int]:
        """Microseconds and bytes of the last bucket, compiled beside the others."""
        deployment = replace(job.deployment, buckets=buckets)
        graph = replace(job, deployment=deployment).compiled(buckets[-1]).graph
        found = roofline(graph, arch)
        return found.floor_us, found.planned

    decode = Bucket("decode")
    step, _ = floor(decode)
    rounds = []
    for drafts in range(1, min(config.dspark_block_size or ROWS - 1, ROWS - 1) + 1):
        own, _ = floor(decode, Bucket("draft", tokens=drafts))
        whole, moved = floor(decode, Bucket("round", tokens=1 + drafts))
        rounds.append(drafting.Round(drafts, whole, own, moved / 1e9))
    trusts = worth(config, min(DSPARK_TOKENS, len(rounds))) if config.dspark_stages else None
    return drafting.Drafting(config.name, arch.gpu, config.drafts_with, step, tuple(rounds), trusts)
