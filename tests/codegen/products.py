"""Fusions of somebody who wrote no kernel, with matrix products inside, as they are in a model whose matrices
are too large for row programs (`WIDE`).
"""

from __future__ import annotations

from typing import Any

from dsv4c import Fused, fused
from dsv4c.ir.graph import Value
from dsv4c.ir.ops import add, argmax, cast, clamp, linear, mul, quantize, rms_norm, silu, sqrt_softplus
from dsv4c.types import BF16, F32, FP8_ROW

WIDE: dict[str, Any] = {"hidden_size": 1024, "n_routed_experts": 72, "moe_intermediate_size": 256}
"""Changes of the built-in tiny model."""


@fused
class RoutedScores(Fused):
    """The router's scores, and what experts are chosen by: in the launch of the product."""

    literals = ("linear.out",)

    def body(self, x: Value, gate: Value, bias: Value) -> tuple[Value, Value]:
        scores = sqrt_softplus(linear(x, gate, out=F32))
        return scores, add(scores, bias)


@fused
class SharedHidden(Fused):
    """A layer's rows for its experts, and the shared one's hidden row: launches before and behind."""

    literals = ("rms_norm.precision", "quantize.format", "linear.out", "cast.to", "clamp.low")
    eps: float
    limit: float

    def body(self, x: Value, gain: Value, w1: Value, w3: Value) -> tuple[Value, Value, Value]:
        normed = rms_norm(x, gain, eps=self.eps, precision=F32)
        rows = quantize(normed, format=FP8_ROW)
        gate, up = (cast(linear(rows, w, out=BF16), to=F32) for w in (w1, w3))
        h = mul(silu(clamp(gate, low=None, high=self.limit)), clamp(up, low=-self.limit, high=self.limit))
        return normed, rows, quantize(cast(h, to=BF16), format=FP8_ROW)


@fused
class SharedSum(Fused):
    """The shared expert's product, added to that of the others: in one launch."""

    literals = ("linear.out", "cast.to")

    def body(self, h: Value, w2: Value, routed: Value) -> Value:
        out: Value = cast(add(routed, linear(h, w2, out=BF16)), to=BF16)
        return out


@fused
class NormedHead(Fused):
    """The last norm inside of the logits' launch, the most likely token behind it."""

    literals = ("rms_norm.precision", "linear.out")
    eps: float

    def body(self, x: Value, gain: Value, head: Value) -> tuple[Value, Value]:
        logits = linear(rms_norm(x, gain, eps=self.eps, precision=F32), head, out=F32)
        return argmax(logits), logits


RULES = [
    f"tests.codegen.products:{op.__name__}" for op in (RoutedScores, SharedHidden, SharedSum, NormedHead)
]
NAMES = ["routed_scores", "shared_hidden", "shared_sum", "normed_head"]
