"""Buckets of several rows per sequence: every node has a kernel, and what does not depend on rows is shared."""

from __future__ import annotations

from functools import cache

import pytest

from benchmarks.plans import first_layers
from dsv4c.arch import SM_90A
from dsv4c.buckets import Bucket
from dsv4c.codegen.lower import Lowered, lower
from dsv4c.compiler.compile import job_for
from dsv4c.config import Deployment, ModelConfig, load_config
from dsv4c.errors import BuildError
from dsv4c.ir.verify import verify
from dsv4c.models.deepseek_v4 import build
from dsv4c.plan.records import KernelLaunch

SLOTS = 9  # more than any bucket has sequences
BY_ROWS = {"in_proj", "q_proj", "wo_a", "wo_b", "head", "router_gate"}
"""Kernels whose text says how many rows there are: weights meet all of them at once."""


@cache
def lowered(model: str | ModelConfig, bucket: Bucket, recipe: str = "official", context: int = 4096) -> Lowered:
    """The kernels of one bucket."""
    config = load_config(model) if isinstance(model, str) else model
    job = job_for(config, target=SM_90A.name, recipe=recipe, max_context=context)
    deployment = Deployment("cpu", recipe, context, SLOTS, (Bucket("decode"), bucket))
    graph = verify(build(config, deployment, bucket, job.recipe.activation))
    placed = job.bucket("decode", graph=graph)
    return lower(placed.graph, placed.schedule, SM_90A.name, placed.context.prepack)


def symbols(lowered: Lowered) -> set[tuple[str, str]]:
    """Kernels by name and key."""
    return {(lowered.sources[launch.kernel].symbol, launch.kernel) for launch in lowered.launches}


def binding(launch: KernelLaunch, name: str) -> bool:
    """Whether an argument of that name is bound."""
    return any(argument.name == name for argument in launch.arguments)
