"""Up half of the experts: w1 and w3 of the routed and the shared experts, clamp, SwiGLU, routing weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dsv4c.ir.declare import fused
from dsv4c.ir.fused import Fused, Neighborhood, dtype_of
from dsv4c.ir.graph import Node, Value
from dsv4c.ir.ops import cast, clamp, expert_linear, linear, mul, reshape, silu
from dsv4c.ir.ops.linear import ExpertLinear, Linear
from dsv4c.ir.ops.math import Add
from dsv4c.passes.fusions.router import HashRouter
from dsv4c.types import F32, DType


def swiglu(gate: Value, up: Value, limit: float, weights: Value | None) -> Value:
    """silu(min(gate, limit)) * clamp(up, ±limit) * weights in f32, rounded to the operands' type."""
    act = dtype_of(gate)
    if act != F32:
        gate, up = cast(gate, to=F32), cast(up, to=F32)
    h = mul(silu(clamp(gate, low=None, high=limit)), clamp(up, low=-limit, high=limit))
    if weights is not None:
        h = mul(h, reshape(weights, shape=(-1, weights.type.shape[1], 1)))
    out: Value = cast(h, to=act) if act != F32 else h
    return out


def shared_input(routed: Node, around: Neighborhood) -> Value | None:
    """The input of the shared expert's first layer, by way of the sum in which it meets a routed result."""
    node = routed
    while not isinstance(node.op, Add):
        readers = around.users(node.outputs[0])
        if len(readers) != 1:
            return None
        came_from, node = node, readers[0]
    (value,) = (v for v in node.inputs if v is not came_from.outputs[0])
    layers = 0
    while (maker := around.producer(value)) is not None:
        value = maker.inputs[0]
        layers += isinstance(maker.op, Linear)
        if layers == 2:
            return value
    return None


@fused
class Swiglu(Fused):
    """Results: h[N, k, I] of the routed experts, h[N, I] of the shared one."""

    literals = ("cast.to", "clamp.low")  # f32 inside; gate has no lower bound, up's is minus its upper one
    anchor = ExpertLinear
    apart = ("x_shared",)
    out: DType
    limit: float

    @classmethod
    def propose(cls, anchor: Node, around: Neighborhood) -> Iterable[Mapping[str, Any]]:
        x = shared_input(anchor, around)
        return ({"x_shared": x},) if x is not None else ()

    def body(
        self,
        x: Value,
        experts: Value,
        weights: Value,
        w1: Value,
        w3: Value,
        x_shared: Value,
        shared_w1: Value,
        shared_w3: Value,
    ) -> tuple[Value, ...]:
        gate = expert_linear(x, w1, experts, out=self.out)
        up = expert_linear(x, w3, experts, out=self.out)
        shared_gate = linear(x_shared, shared_w1, out=self.out)
        shared_up = linear(x_shared, shared_w3, out=self.out)
        return swiglu(gate, up, self.limit, weights), swiglu(shared_gate, shared_up, self.limit, None)


@fused
class HashSwiglu(Fused):
    """`Swiglu` behind a hash router: the table names the experts before the step starts, so only their rows
    of the gate are needed and the router is a prologue. Results: experts, h, h of the shared expert.
    """

    optional = True
    unless = ("scaled_experts_down",)  # its take_along reads the experts before the gate is there
    out: DType
    limit: float
    factor: float

    def body(
        self,
        x: Value,
        gate: Value,
        table: Value,
        tokens: Value,
        x_routed: Value,
        w1: Value,
        w3: Value,
        x_shared: Value,
        shared_w1: Value,
        shared_w3: Value,
    ) -> tuple[Value, ...]:
        experts, weights = HashRouter(factor=self.factor)(x, gate, table, tokens)
        op = Swiglu(out=self.out, limit=self.limit)
        return experts, *op(x_routed, experts, weights, w1, w3, x_shared, shared_w1, shared_w3)
