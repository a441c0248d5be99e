"""A fusion of somebody who wrote no kernel: the activation of the shared expert, between its products."""

from __future__ import annotations

from dsv4c import Fused, fused
from dsv4c.ir.graph import Value
from dsv4c.ir.ops import cast, clamp, mul, silu
from dsv4c.types import BF16, F32


@fused
class GatedUp(Fused):
    """silu(min(gate, limit)) * clamp(up, ±limit) in f32, rounded to bf16."""

    literals = ("cast.to", "clamp.low")
    limit: float

    def body(self, gate: Value, up: Value) -> Value:
        gate, up = cast(gate, to=F32), cast(up, to=F32)
        h = mul(silu(clamp(gate, low=None, high=self.limit)), clamp(up, low=-self.limit, high=self.limit))
        out: Value = cast(h, to=BF16)
        return out
