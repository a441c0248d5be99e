"""The window's new row: RMSNorm, RoPE, the cache's format, stored at its slot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from dsv4c.ir.declare import fused
from dsv4c.ir.fused import Fused
from dsv4c.ir.graph import Value
from dsv4c.ir.ops import cache_write, quantize, rms_norm, rope
from dsv4c.types import QuantType


@fused
class KvNormRopeStore(Fused):
    """kv[N, D] into the ring window[B, W, D] at slots positions % W. Returns the window."""

    literals = ("rms_norm.precision", "rope.inverse", "rope.stride")
    example: ClassVar[Mapping[str, Any]] = {"window": "q[e4m3,ue8m0,1x64,tail=64][1,128,512]"}
    eps: float

    def body(self, window: Value, kv: Value, gain: Value, positions: Value, frequencies: Value) -> Value:
        row = rope(rms_norm(kv, gain, eps=self.eps), positions, frequencies)
        if isinstance(window.type, QuantType):
            row = quantize(row, format=window.type.format)
        written: Value = cache_write(window, row, positions)
        return written
