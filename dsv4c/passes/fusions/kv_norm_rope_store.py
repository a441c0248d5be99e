"""The window's new rows: RMSNorm, RoPE, the cache's format, stored in their slots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from dsv4c.ir.declare import fused
from dsv4c.ir.fused import Fused
from dsv4c.ir.graph import Value
from dsv4c.ir.ops import cache_extend, cache_write, quantize, rms_norm, rope
from dsv4c.types import QuantType


@fused
class KvNormRopeStore(Fused):
    """kv[N, D] into the ring window[S, W, D], at positions % W of their slots. Returns the window.

    With `beside`, the capacity of a copy that has room for all rows, also that copy, one per sequence.
    """

    literals = ("rms_norm.precision", "rope.inverse", "rope.stride")
    per_call = "tokens"
    room = "beside"
    example: ClassVar[Mapping[str, Any]] = {"window": "q[e4m3,ue8m0,1x64,tail=64][1,128,512]"}
    eps: float
    beside: int | None = None
    tokens: int = 0

    def body(
        self, window: Value, kv: Value, gain: Value, positions: Value, slots: Value, frequencies: Value
    ) -> Value | tuple[Value, ...]:
        row = rope(rms_norm(kv, gain, eps=self.eps), positions, frequencies)
        if isinstance(window.type, QuantType):
            row = quantize(row, format=window.type.format)
        if self.beside is None:
            written: Value = cache_write(window, row, positions, slots)
            return written
        beside = cache_extend(window, row, positions, slots, capacity=self.beside, tokens=self.tokens)
        return cache_write(window, row, positions, slots), beside
