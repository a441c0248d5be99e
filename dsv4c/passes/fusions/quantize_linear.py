"""A linear layer that quantizes its own input row; nobody else reads it, so it never reaches memory."""

from __future__ import annotations

from dsv4c.ir.declare import fused
from dsv4c.ir.fused import Fused
from dsv4c.ir.graph import Value
from dsv4c.ir.ops import linear, quantize
from dsv4c.types import DType, QuantFormat


@fused
class QuantizeLinear(Fused):
    """linear(quantize(x), w)."""

    optional = True
    format: QuantFormat
    out: DType

    def body(self, x: Value, w: Value) -> Value:
        out: Value = linear(quantize(x, format=self.format), w, out=self.out)
        return out
