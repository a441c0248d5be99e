"""Inverse RoPE of the attention output, split into the groups of wo_a, and quantized when wo_a wants it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from dsv4c.ir.declare import fused
from dsv4c.ir.fused import Fused, Neighborhood
from dsv4c.ir.graph import Node, Value
from dsv4c.ir.ops import quantize, reshape, rope
from dsv4c.ir.ops.quant import Quantize
from dsv4c.ir.ops.shape import Reshape
from dsv4c.types import QuantFormat


@fused
class InverseRope(Fused):
    """o[N, h, D] rotated back by its position -> [N, groups, h/groups * D]."""

    literals = ("rope.inverse", "rope.stride")
    anchor = Reshape
    example: ClassVar[Mapping[str, Any]] = {"o": "bf16[1,4,128]", "groups": 2}
    groups: int
    format: QuantFormat | None

    @classmethod
    def propose(cls, anchor: Node, around: Neighborhood) -> Iterable[Mapping[str, Any]]:
        shape = anchor.outputs[0].type.shape
        users = around.users(anchor.outputs[0])
        formats: list[QuantFormat | None] = [u.op.format for u in users if isinstance(u.op, Quantize)]
        return ({"groups": shape[1], "format": f} for f in formats or [None]) if len(shape) == 3 else ()

    def body(self, o: Value, positions: Value, frequencies: Value) -> Value:
        _, heads, dim = o.type.shape
        o = rope(o, positions, frequencies, inverse=True)
        o = reshape(o, shape=(-1, self.groups, heads * dim // self.groups))
        return o if self.format is None else quantize(o, format=self.format)


inverse_rope = InverseRope.apply
