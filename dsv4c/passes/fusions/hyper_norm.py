"""A boundary between sublayers: mHC post of the last, coefficients of the next, collapse, RMSNorm, quantize.

Streams are read once and written once. Sinkhorn is off the critical path: a boundary leaves the logits of
`comb` to the next one, which has a whole sublayer's time for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from dsv4c.ir.declare import fused
from dsv4c.ir.fused import Fused, Neighborhood, dtype_of
from dsv4c.ir.graph import Node, Value
from dsv4c.ir.ops import (
    add,
    cast,
    collapse_streams,
    linear,
    mix_streams,
    mul,
    quantize,
    reshape,
    rms_norm,
    rsqrt_mean_square,
    scale,
    shift,
    sigmoid,
    slice_,
    spread_streams,
)
from dsv4c.ir.ops.hyper import CollapseStreams
from dsv4c.ir.ops.norm import RmsNorm
from dsv4c.ir.ops.quant import Quantize
from dsv4c.passes.fusions.sinkhorn import sinkhorn
from dsv4c.types import F32, QuantFormat

EXAMPLE: Mapping[str, Any] = {"streams": "bf16[1,4,256]"}
MIXING_EXAMPLE: Mapping[str, Any] = {**EXAMPLE, "iterations": 2}
LITERALS = ("linear.out", "slice.axis", "slice.start", "slice.stop", "scale.factor", "rms_norm.precision")


def post_mix(
    f: Value, streams: Value, post: Value, logits: Value, *, iterations: int, hc_eps: float
) -> Value:
    """X'_k = post_k * f + sum_j comb[j, k] * X_j with comb = sinkhorn(logits), in the streams' type."""
    comb = sinkhorn(logits, iterations=iterations, eps=hc_eps)
    mixed = add(spread_streams(f, post), mix_streams(streams, comb))
    if dtype_of(streams) != F32:
        mixed = cast(mixed, to=dtype_of(streams))
    out: Value = mixed
    return out


def mixes_of(streams: Value, fn: Value, eps: float) -> Value:
    """(v · fn) * rsqrt(mean(v²) + eps) over all streams of a token, f32."""
    _, s, h = streams.type.shape
    v = reshape(streams, shape=(-1, s * h))
    out: Value = mul(linear(v, fn, out=F32), rsqrt_mean_square(v, eps=eps))
    return out


def proposed_format(anchor: Node, around: Neighborhood) -> QuantFormat | None:
    """The format that the collapsed and normalized row is quantized to, if it is."""
    for norm in around.users(anchor.outputs[0]):
        if isinstance(norm.op, RmsNorm):
            for user in around.users(norm.outputs[0]):
                if isinstance(user.op, Quantize) and len(user.inputs) == 1:
                    return user.op.format
    return None


@fused
class HyperNormFirst(Fused):
    """The boundary before the first sublayer, whose streams come from the embedding: nothing to mix.

    Results: the normed row, post, the logits of comb, and the quantized row when there is a `format`.
    """

    literals = LITERALS
    anchor = CollapseStreams
    example: ClassVar[Mapping[str, Any]] = EXAMPLE
    norm_eps: float
    hc_eps: float
    format: QuantFormat | None

    @classmethod
    def propose(cls, anchor: Node, around: Neighborhood) -> Iterable[Mapping[str, Any]]:
        return ({"format": proposed_format(anchor, around)},)

    def body(self, streams: Value, fn: Value, base: Value, scales: Value, gain: Value) -> tuple[Value, ...]:
        s = streams.type.shape[1]
        mixes = mixes_of(streams, fn, self.norm_eps)

        def part(i: int, start: int, stop: int) -> Value:
            factor = slice_(scales, axis=0, start=i, stop=i + 1)
            bias = slice_(base, axis=0, start=start, stop=stop)
            shifted: Value = add(mul(slice_(mixes, axis=1, start=start, stop=stop), factor), bias)
            return shifted

        pre = shift(sigmoid(part(0, 0, s)), offset=self.hc_eps)
        post = scale(sigmoid(part(1, s, 2 * s)), factor=2.0)
        logits = reshape(part(2, 2 * s, 2 * s + s * s), shape=(-1, s, s))
        x = collapse_streams(streams, pre, out=dtype_of(streams))
        normed = rms_norm(x, gain, eps=self.norm_eps)
        if self.format is None:
            return normed, post, logits
        return normed, post, logits, quantize(normed, format=self.format)


@fused
class HyperNorm(HyperNormFirst):
    """A boundary between two sublayers. Results: the mixed streams, then those of `HyperNormFirst`."""

    home = 1  # it belongs to the sublayer that it feeds
    example: ClassVar[Mapping[str, Any]] = MIXING_EXAMPLE
    iterations: int

    def body(  # type: ignore[override]
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
        return mixed, *HyperNormFirst.body(self, mixed, fn, base, scales, gain)
