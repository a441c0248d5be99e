"""The indexer's scores: queries rotated, transformed and encoded like the keys; weighted ReLU products."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from dsv4c.ir.declare import fused
from dsv4c.ir.fused import Fused
from dsv4c.ir.graph import Value
from dsv4c.ir.op import Rounding
from dsv4c.ir.ops import hadamard, index_scores, quantize, rope, scale
from dsv4c.types import QuantType


@fused
class Indexer(Fused):
    """q[N, H, D] before RoPE, keys[S, C, D], weights[N, H] -> scores [N, C], -inf where not visible."""

    rounding = Rounding.CODES
    optional = True
    literals = ("rope.inverse", "rope.stride")
    example: ClassVar[Mapping[str, Any]] = {"keys": "q[e2m1,ue8m0,1x32][1,64,128]"}
    ratio: int
    factor: float

    def body(
        self, q: Value, keys: Value, weights: Value, positions: Value, slots: Value, frequencies: Value
    ) -> Value:
        q = hadamard(rope(q, positions, frequencies))
        if isinstance(keys.type, QuantType):
            q = quantize(q, format=keys.type.format)
        weights = scale(weights, factor=self.factor)
        scores: Value = index_scores(q, keys, weights, positions, slots, ratio=self.ratio)
        return scores
