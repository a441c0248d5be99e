"""Per-head RMSNorm and RoPE of the queries."""

from __future__ import annotations

from dsv4c.ir.declare import fused
from dsv4c.ir.fused import Fused
from dsv4c.ir.graph import Value
from dsv4c.ir.ops import rms_norm, rope
from dsv4c.types import DType


@fused
class QNormRope(Fused):
    """q[N, h, D] -> rope(rms_norm(q)); `precision` bf16 rounds the norm's steps as the release does."""

    literals = ("rope.inverse", "rope.stride")
    eps: float
    precision: DType

    def body(self, q: Value, positions: Value, frequencies: Value) -> Value:
        out: Value = rope(rms_norm(q, eps=self.eps, precision=self.precision), positions, frequencies)
        return out


q_norm_rope = QNormRope.apply
