"""Token embedding, copied to every residual stream."""

from __future__ import annotations

from dsv4c.ir.declare import fused
from dsv4c.ir.fused import Fused
from dsv4c.ir.graph import Value
from dsv4c.ir.op import Rounding
from dsv4c.ir.ops import embedding, expand_streams


@fused
class Embed(Fused):
    """table[V, H], tokens i32[N] -> [N, streams, H]."""

    rounding = Rounding.NOWHERE
    streams: int

    def body(self, table: Value, tokens: Value) -> Value:
        x: Value = expand_streams(embedding(table, tokens), streams=self.streams)
        return x
