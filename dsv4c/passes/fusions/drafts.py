"""What drafting adds to layers: features of the model's streams, and drafts chosen one behind the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from dsv4c.ir.declare import fused
from dsv4c.ir.fused import OPERANDS, Fused, Neighborhood, dtype_of
from dsv4c.ir.graph import Node, Value
from dsv4c.ir.ops import add, argmax, cast, concat, embedding, reshape, scale, slice_, sum_
from dsv4c.ir.ops.math import Add, Scale
from dsv4c.ir.ops.sample import Argmax
from dsv4c.ir.ops.shape import Concat
from dsv4c.types import F32


@fused
class Features(Fused):
    """Streams [N, S, H] after some layers -> their means side by side, [N, layers · H]."""

    optional = True
    literals = ("sum.axis", "sum.out", "concat.axis")
    anchor = Concat
    example: ClassVar[Mapping[str, Any]] = {
        OPERANDS: 2,
        "streams_0": "bf16[1,4,256]",
        "streams_1": "bf16[1,4,256]",
    }
    factor: float

    @classmethod
    def propose(cls, anchor: Node, around: Neighborhood) -> Iterable[Mapping[str, Any]]:
        first = around.producer(anchor.inputs[0])
        while first is not None and not isinstance(first.op, Scale):
            first = around.producer(first.inputs[0])
        if first is not None:
            yield {OPERANDS: len(anchor.inputs)}

    def body(self, *streams: Value) -> Value:
        means = []
        for each in streams:
            mean = scale(sum_(each, axis=1, out=F32), factor=self.factor)
            means.append(mean if dtype_of(each) == F32 else cast(mean, to=dtype_of(each)))
        joined: Value = concat(*means, axis=1)
        return joined


@fused
class PickDraft(Fused):
    """base f32[B, block, V], bias f32[B, V] -> logits f32[B, V] of row `step`, the likeliest token i32[B].

    With a table[V, R], also what it has for that token, [B, R]: what biases the next draft is made of it.
    """

    optional = True
    literals = ("slice.axis",)
    anchor = Argmax
    example: ClassVar[Mapping[str, Any]] = {"step": 1, "base": "f32[1,2,256]", "bias": "f32[1,256]"}
    step: int

    @classmethod
    def propose(cls, anchor: Node, around: Neighborhood) -> Iterable[Mapping[str, Any]]:
        made = around.producer(anchor.inputs[0])
        if made is not None and isinstance(made.op, Add):  # of a sum, as no step's is
            yield {}

    def body(self, base: Value, bias: Value, table: Value | None = None) -> tuple[Value, ...]:
        row = slice_(base, axis=1, start=self.step, stop=self.step + 1)
        logits = add(reshape(row, shape=(-1, base.type.shape[2])), bias)
        token = argmax(logits)
        return (logits, token) if table is None else (logits, token, embedding(table, token))
