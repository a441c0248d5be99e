"""The routers: gate scores, the chosen experts, and their renormalized weights."""

from __future__ import annotations

from dsv4c.ir.declare import fused
from dsv4c.ir.fused import Fused
from dsv4c.ir.graph import Value
from dsv4c.ir.op import Rounding
from dsv4c.ir.ops import add, embedding, linear, normalize, scale, sqrt_softplus, take_along, top_k
from dsv4c.types import F32

LITERALS = ("linear.out", "normalize.axis", "normalize.eps")


def routing_weights(scores: Value, experts: Value, factor: float) -> Value:
    """Scores of the chosen, normalized to sum to `factor`."""
    weights: Value = scale(normalize(take_along(scores, experts), axis=-1, eps=0.0), factor=factor)
    return weights


@fused
class Router(Fused):
    """Dense: the k experts of largest score + bias. Results: experts i32[N, k], weights f32[N, k]."""

    rounding = Rounding.ONCE
    optional = True
    literals = LITERALS
    k: int
    factor: float

    def body(self, x: Value, gate: Value, bias: Value) -> tuple[Value, ...]:
        scores = sqrt_softplus(linear(x, gate, out=F32))
        experts = top_k(add(scores, bias), k=self.k)
        return experts, routing_weights(scores, experts, self.factor)


@fused
class HashRouter(Fused):
    """The experts that a table gives to the token. Results: experts i32[N, k], weights f32[N, k]."""

    optional = True
    literals = LITERALS
    factor: float

    def body(self, x: Value, gate: Value, table: Value, tokens: Value) -> tuple[Value, ...]:
        scores = sqrt_softplus(linear(x, gate, out=F32))
        experts = embedding(table, tokens)
        return experts, routing_weights(scores, experts, self.factor)
