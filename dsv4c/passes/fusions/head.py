"""The end of the trunk: mHC post of the last sublayer, collapse under sigmoid weights, final RMSNorm.

lm_head stays a launch of its own: it streams a gigabyte, and this row is ready long before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from dsv4c.ir.declare import fused
from dsv4c.ir.fused import Fused, dtype_of
from dsv4c.ir.graph import Value
from dsv4c.ir.ops import add, collapse_streams, mul, rms_norm, shift, sigmoid
from dsv4c.passes.fusions.hyper_norm import MIXING_EXAMPLE, mixes_of, post_mix


@fused
class Head(Fused):
    """Results: the mixed streams, the normed row that lm_head reads, and the row before its norm."""

    literals = ("linear.out", "rms_norm.precision")
    home = 1
    example: ClassVar[Mapping[str, Any]] = MIXING_EXAMPLE
    norm_eps: float
    hc_eps: float
    iterations: int

    def body(
        self,
        f: Value,
        streams: Value,
        post: Value,
        logits: Value,
        fn: Value,
        base: Value,
        scales: Value,
        gain: Value,
    ) -> tuple[Value, ...]:
        mixed = post_mix(f, streams, post, logits, iterations=self.iterations, hc_eps=self.hc_eps)
        weights = sigmoid(add(mul(mixes_of(mixed, fn, self.norm_eps), scales), base))
        x = collapse_streams(mixed, shift(weights, offset=self.hc_eps), out=dtype_of(streams))
        return mixed, rms_norm(x, gain, eps=self.norm_eps), x
