"""RMSNorm and the block quantization of its result. The plain row is a second result, for who wants it."""

from __future__ import annotations

from dsv4c.ir.declare import fused
from dsv4c.ir.fused import Fused
from dsv4c.ir.graph import Value
from dsv4c.ir.ops import quantize, rms_norm
from dsv4c.types import QuantFormat


@fused
class RmsnormQuantize(Fused):
    """quantize(rms_norm(x, gain)), rms_norm(x, gain)."""

    optional = True
    literals = ("rms_norm.precision",)  # a norm with a gain is f32 inside
    eps: float
    format: QuantFormat

    def body(self, x: Value, gain: Value) -> tuple[Value, ...]:
        y = rms_norm(x, gain, eps=self.eps)
        return quantize(y, format=self.format), y
