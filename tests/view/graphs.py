"""Graphs to look at: real ones in the official recipe, and one with a fused op of this module's own."""

from __future__ import annotations

from functools import cache

from dsv4c.buckets import Bucket
from dsv4c.config import Deployment, ModelConfig, load_config
from dsv4c.ir.declare import fused
from dsv4c.ir.fused import Fused
from dsv4c.ir.graph import Builder, Graph, Node, Value, rewrite
from dsv4c.ir.ops import quantize as quantize_
from dsv4c.ir.ops import rms_norm
from dsv4c.models.deepseek_v4 import build
from dsv4c.passes.quantize import quantize
from dsv4c.passes.recipes import recipe_named
from dsv4c.types import QuantFormat


@cache
def config(name: str) -> ModelConfig:
    return load_config(name)


@cache
def plain(name: str) -> Graph:
    return build(config(name), Deployment(max_context=8192), Bucket("decode"))


@cache
def official(name: str) -> Graph:
    return quantize(plain(name), recipe_named("official"))


@fused
class ViewedNormQuantize(Fused):
    """RMSNorm and quantization, as a test of views needs them."""

    literals = ("rms_norm.precision",)
    eps: float
    format: QuantFormat

    def body(self, x: Value, gain: Value) -> tuple[Value, ...]:
        y = rms_norm(x, gain, eps=self.eps)
        return quantize_(y, format=self.format), y


@cache
def folded(name: str) -> Graph:
    """`official` with the norm before each block's attention fused with the quantization of its result."""
    graph = official(name)
    pairs = {}
    for node in graph.nodes:
        made = node.inputs[0].node if node.inputs else None
        if node.op.name == "quantize" and made is not None and made.name.endswith(".attn_in"):
            pairs[made] = node

    def visit(builder: Builder, node: Node, values: dict[Value, Value]) -> bool:
        if node in pairs:
            cast = pairs[node]
            op = ViewedNormQuantize(eps=node.op.eps, format=cast.op.format)
            results = (*cast.outputs, *node.outputs)
            names = [v.name for v in results]
            inputs = tuple(values[v] for v in node.inputs)
            made = builder.emit(op, inputs, names=names, scope=node.scope, origin=reversed(names))
            values.update(zip(results, made, strict=True))
            return True
        return node in pairs.values()

    return rewrite(graph, visit)
