"""Graphs to fold, random weights of any recipe, and comparisons, for the tests of the fusions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import torch

from dsv4c.buckets import Bucket
from dsv4c.config import ModelConfig, load_config
from dsv4c.ir.graph import Graph, Node
from dsv4c.ir.verify import verify
from dsv4c.models.deepseek_v4 import build
from dsv4c.numerics import codec
from dsv4c.numerics.codec import Quantized
from dsv4c.passes.fold import FoldReport, Rule, fold
from dsv4c.passes.fusions import FUSIONS
from dsv4c.passes.quantize import quantize
from dsv4c.passes.recipes import RECIPES, recipe_named
from dsv4c.types import DType, QuantType
from tests.interpreted import deployment_of

CHUNK = 132  # finishes a window of 128, and leaves one unfinished
DECODE, VERIFY = Bucket("decode"), Bucket("verify", 2, 4, "last")
PREFILL, DRAFT = Bucket("prefill", tokens=CHUNK), Bucket("draft", tokens=2)
BUCKETS = (DECODE, VERIFY, PREFILL, DRAFT)
CASES = [(recipe, bucket) for recipe in RECIPES for bucket in BUCKETS]
RULES = [Rule(op) for op in FUSIONS]
SLOTS = 2  # so that it matters which one a row is in


@cache
def unfolded(model: str, recipe: str, bucket: Bucket, max_context: int = 512) -> Graph:
    """The verified graph of a bucket before any fusion."""
    return graph_of(load_config(model), recipe, bucket, max_context)


def graph_of(config: ModelConfig, recipe: str, bucket: Bucket, max_context: int = 512) -> Graph:
    numerics = recipe_named(recipe)
    deployment = deployment_of(bucket, recipe=recipe, max_context=max_context, slots=SLOTS)
    return verify(quantize(build(config, deployment, bucket, numerics.activation), numerics))


@cache
def folded(model: str, recipe: str, bucket: Bucket, max_context: int = 512) -> tuple[Graph, FoldReport]:
    graph, report = fold(unfolded(model, recipe, bucket, max_context), RULES)
    return verify(graph), report


@cache
def one_layer(ratio: int, recipe: str = "official", hashed: bool = False) -> Graph:
    """tiny's decode graph with a single layer of that compression ratio."""
    config = replace(
        load_config("tiny"),
        num_layers=1,
        compress_ratios=(ratio,),
        num_hash_layers=int(hashed),
        mtp_layers=0,
    )
    return graph_of(config, recipe, DECODE)


def wiring(graph: Graph) -> list[str]:
    """What a graph computes, as lines in no particular order: ops, names and types, without scopes."""
    lines = [node_line(node) for node in graph.nodes]
    lines += [f"return {label}=%{value.name}" for label, value in graph.outputs.items()]
    return sorted(lines)


def node_line(node: Node) -> str:
    results = ", ".join(f"%{v.name}: {v.type}" for v in node.outputs)
    return f"{results} = {node.op!r}({', '.join(v.name for v in node.inputs)})"


# --- values ---


def random_weights(graph: Graph, experts: int, seed: int = 0) -> dict[str, codec.Value]:
    """A value of the right type and a moderate size for every parameter."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, codec.Value] = {}
    for param in graph.params:
        shape = param.type.shape
        if isinstance(param.type, QuantType):
            x = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
            weights[param.name] = codec.quantize(x, param.type.format)
        elif param.type.dtype is DType.I32:
            order = torch.rand(shape[0], experts, generator=generator).argsort(1)
            weights[param.name] = order[:, : shape[1]].to(torch.int32).contiguous()
        else:
            plain = torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1)
            if param.name.endswith("norm"):
                plain = plain + 1
            if param.name.endswith("input_scale"):
                plain = plain.abs() * 0.05 + 0.001
            weights[param.name] = plain.to(torch.float32 if param.type.dtype is DType.F32 else torch.bfloat16)
    return weights


def same_bytes(a: codec.Value, b: codec.Value) -> bool:
    """Equal bit for bit, NaN included."""
    ours = a.parts if isinstance(a, Quantized) else (a,)
    theirs = b.parts if isinstance(b, Quantized) else (b,)
    return all(
        x.dtype == y.dtype
        and x.shape == y.shape
        and torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
        for x, y in zip(ours, theirs, strict=True)
    )


def differing(a: Mapping[str, codec.Value], b: Mapping[str, codec.Value]) -> list[str]:
    """Names whose values differ in any bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not same_bytes(a[name], b[name])]
