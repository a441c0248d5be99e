"""Linear layers that share their input become one: one pass over the row, one stream of weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from dsv4c.ir.declare import fused
from dsv4c.ir.fused import OPERANDS, Fused, Neighborhood
from dsv4c.ir.graph import Kind, Node, Value
from dsv4c.ir.op import Rounding
from dsv4c.ir.ops import linear
from dsv4c.ir.ops.linear import Linear
from dsv4c.types import BF16, DType


@fused
class InProj(Fused):
    """x[N, K] times several weights -> one result each, of the element types in `outs`."""

    rounding = Rounding.ONCE
    anchor = Linear
    example: ClassVar[Mapping[str, Any]] = {OPERANDS: 3, "outs": (BF16, BF16)}
    outs: tuple[DType, ...]

    @classmethod
    def propose(cls, anchor: Node, around: Neighborhood) -> Iterable[Mapping[str, Any]]:
        """All linear layers over the anchor's input, when it is the first of several."""
        group = [
            n
            for n in around.users(anchor.inputs[0])
            if isinstance(n.op, Linear) and n.inputs[0] is anchor.inputs[0] and n.inputs[1].kind is Kind.PARAM
        ]
        if len(group) > 1 and group[0] is anchor:
            outs = tuple(n.op.out for n in group if isinstance(n.op, Linear))
            yield {OPERANDS: 1 + len(group), "outs": outs}

    def body(self, x: Value, *weights: Value) -> tuple[Value, ...]:
        return tuple(linear(x, w, out=out) for w, out in zip(weights, self.outs, strict=True))
