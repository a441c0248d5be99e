"""Bytes and operations of one decoded token, as costs of ops add them up, against the published inventory of
both releases.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from dsv4c.buckets import Bucket
from dsv4c.config import Deployment, load_config
from dsv4c.ir.graph import Graph, Kind
from dsv4c.ir.totals import compulsory
from dsv4c.models.deepseek_v4 import build
from dsv4c.models.layout import part_of
from dsv4c.models.traffic import token_traffic
from dsv4c.passes.quantize import quantize
from dsv4c.passes.recipes import recipe_named

CONTEXT = 131_072


@cache
def decoded(name: str, experts: str = "mxfp4", context: int = CONTEXT) -> Graph:
    """One token of one sequence, in the formats of the release."""
    config = replace(load_config(f"deepseek-v4-{name}"), expert_format=experts)
    recipe = recipe_named("nvfp4-experts" if experts == "nvfp4" else "official")
    deployment = Deployment(recipe=recipe.name, max_context=context)
    return quantize(build(config, deployment, Bucket("decode"), recipe.activation), recipe)


def by_part(graph: Graph) -> dict[str, int]:
    parts: dict[str, int] = {}
    for value, count in compulsory(graph).items():
        part = "state" if value.kind is Kind.STATE else part_of(value.name)
        parts[part] = parts.get(part, 0) + count
    return parts


@pytest.mark.parametrize("context", [8_192, CONTEXT])
@pytest.mark.parametrize("experts", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("name", ["flash", "pro"])
def test_costs_are_the_inventory(name: str, experts: str, context: int) -> None:
    config = replace(load_config(f"deepseek-v4-{name}"), expert_format=experts)
    wanted = token_traffic(config, context).bytes
    assert sum(compulsory(decoded(name, experts, context)).values()) == pytest.approx(wanted, rel=4e-6)
