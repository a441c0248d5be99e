"""Down half of the experts: quantize, w2, the sum over the routed experts in f32, the shared expert added."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dsv4c.ir.declare import fused
from dsv4c.ir.fused import Fused, Neighborhood
from dsv4c.ir.graph import Node, Value
from dsv4c.ir.ops import add, cast, expert_linear, linear, quantize, sum_, take_along
from dsv4c.ir.ops.math import Sum
from dsv4c.types import F32, DType, QuantFormat


@fused
class ExpertsDown(Fused):
    """h[N, k, I], h_shared[N, I] -> [N, H]. The formats say how each is encoded first; None: not."""

    unless = ("scaled_experts_down",)
    literals = ("sum.axis", "sum.out")
    anchor = Sum
    out: DType
    format: QuantFormat | None
    shared_format: QuantFormat | None

    @classmethod
    def propose(cls, anchor: Node, around: Neighborhood) -> Iterable[Mapping[str, Any]]:
        def format_of(product: Node | None) -> QuantFormat | None:
            x = product and around.producer(product.inputs[0])
            return getattr(x.op, "format", None) if x else None

        routed = around.producer(anchor.inputs[0])
        for total in around.users(anchor.outputs[0]):
            other = next((v for v in total.inputs if v is not anchor.outputs[0]), None)
            shared = around.producer(other) if other is not None else None
            yield {"format": format_of(routed), "shared_format": format_of(shared)}

    def body(self, h: Value, h_shared: Value, experts: Value, w2: Value, shared_w2: Value) -> Value:
        if self.format is not None:
            h = quantize(h, format=self.format)
        return self.total(h, h_shared, experts, w2, shared_w2)

    def total(self, h: Value, h_shared: Value, experts: Value, w2: Value, shared_w2: Value) -> Value:
        """Products and sum of the encoded routed rows and the shared row."""
        if self.shared_format is not None:
            h_shared = quantize(h_shared, format=self.shared_format)
        routed = sum_(expert_linear(h, w2, experts, out=self.out), axis=1, out=F32)
        total = add(routed, linear(h_shared, shared_w2, out=self.out))
        out: Value = cast(total, to=self.out) if self.out != F32 else total
        return out


@fused
class ScaledExpertsDown(ExpertsDown):
    """The same with the routed rows encoded under their expert's static `input_scale` f32[E]."""

    optional = True
    unless = ("experts_down",)
    literals = ExpertsDown.literals
    anchor = Sum
    format: QuantFormat

    @classmethod
    def propose(cls, anchor: Node, around: Neighborhood) -> Iterable[Mapping[str, Any]]:
        return super().propose(anchor, around)

    def body(  # type: ignore[override]
        self, h: Value, input_scale: Value, h_shared: Value, experts: Value, w2: Value, shared_w2: Value
    ) -> Value:
        h = quantize(h, take_along(input_scale, experts), format=self.format)
        return self.total(h, h_shared, experts, w2, shared_w2)
