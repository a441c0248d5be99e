"""Attention in one op: query norm and RoPE, window and entry keys, sink softmax, values, inverse RoPE."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from dsv4c.ir.declare import fused
from dsv4c.ir.fused import OPERANDS, Fused, Neighborhood, dtype_of
from dsv4c.ir.graph import Node, Value
from dsv4c.ir.ops import (
    attention_scores,
    attention_values,
    concat,
    dequantize,
    gather,
    sink_softmax,
    visible_entries,
    window_index,
)
from dsv4c.ir.ops.attention import AttentionValues, Gather, VisibleEntries
from dsv4c.ir.ops.shape import Concat
from dsv4c.passes.fusions.inverse_rope import InverseRope, inverse_rope
from dsv4c.passes.fusions.q_norm_rope import q_norm_rope
from dsv4c.types import BF16, FP8_ROW, DType, QuantFormat, QuantType


def keys_of(cache: Value, index: Value, slots: Value, out: DType) -> Value:
    """Rows of a cache as plain keys."""
    rows: Value = gather(cache, index, slots)
    if isinstance(cache.type, QuantType):
        rows = dequantize(rows, out=out)
    return rows


def operands_of(rotation: Node, around: Neighborhood) -> int | None:
    """How many operands the attention that ends in this rotation has: 7 SWA, 9 HCA, 10 CSA."""
    values = around.producer(rotation.inputs[0])
    if values is None or not isinstance(values.op, AttentionValues):
        return None
    keys = around.producer(values.inputs[2])
    if keys is None or not isinstance(keys.op, Concat):
        return 7
    rows = around.producer(keys.inputs[1])
    while rows is not None and not isinstance(rows.op, Gather):
        rows = around.producer(rows.inputs[0])
    chosen = rows and around.producer(rows.inputs[1])
    return 9 if chosen is not None and isinstance(chosen.op, VisibleEntries) else 10


@fused
class Attention(Fused):
    """q[N, h, D] before its norm -> [N, groups, h/groups * D], quantized when there is a `format`.

    Row n sees the `window` tokens up to last[n], which is its own position but in a block whose rows all see
    each other, of the `ring` in ring_slots[n]; and the `entries` in slots[n], which differs where the ring is
    a copy beside the state. Without `entries`: sliding window alone (SWA). With them: the `chosen` ones
    (CSA), or else all that are complete, one per `ratio` tokens (HCA).
    """

    literals = ("concat.axis",)
    anchor = InverseRope
    counts = (10, 9, 7)
    example: ClassVar[Mapping[str, Any]] = {
        "q": "bf16[1,4,128]",
        "positions": "i32[1]",
        "last": "i32[1]",
        "frequencies": "f32[32]",
        "sink": "f32[4]",
        "chosen": "i32[1,8]",
        "ring": "q[e4m3,ue8m0,1x64,tail=64][1,128,128]",
        "entries": "q[e4m3,ue8m0,1x64,tail=64][1,64,128]",
        "groups": 2,
        "window": 128,
        "ratio": 4,
        "eps": 1e-6,
        "scale": 1.0,
        "precision": BF16,
        "format": FP8_ROW,
    }
    eps: float
    precision: DType
    window: int
    scale: float
    groups: int
    format: QuantFormat | None
    ratio: int = 0

    @classmethod
    def propose(cls, anchor: Node, around: Neighborhood) -> Iterable[Mapping[str, Any]]:
        assert isinstance(anchor.op, InverseRope)
        operands = operands_of(anchor, around)
        if operands:
            yield {OPERANDS: operands, "groups": anchor.op.groups, "format": anchor.op.format}

    def body(
        self,
        q: Value,
        positions: Value,
        last: Value,
        frequencies: Value,
        sink: Value,
        ring: Value,
        ring_slots: Value,
        entries: Value | None = None,
        slots: Value | None = None,
        chosen: Value | None = None,
    ) -> Value:
        act = dtype_of(q)
        q = q_norm_rope(q, positions, frequencies, eps=self.eps, precision=self.precision)
        index = window_index(last, window=self.window)
        keys = keys_of(ring, index, ring_slots, act)
        if entries is not None and slots is not None:
            if chosen is None:
                chosen = visible_entries(positions, ratio=self.ratio, capacity=entries.type.shape[1])
            keys = concat(keys, keys_of(entries, chosen, slots, act), axis=1)
            index = concat(index, chosen, axis=1)
        scores = attention_scores(q, keys, index, scale=self.scale)
        p, denominator = sink_softmax(scores, sink, out=act)
        o = attention_values(p, denominator, keys)
        out: Value = inverse_rope(o, positions, frequencies, groups=self.groups, format=self.format)
        return out
