"""Attention over gathered keys (K = V, one head): index lists, gather, scores, sink softmax, values."""

from __future__ import annotations

from typing import ClassVar

from dsv4c.ir.op import Cost, Op, elements, expect, expect_tensor, primitive
from dsv4c.types import F32, I32, DType, TensorType, Type


@primitive
class WindowIndex(Op):
    """Positions i32[N] -> i32[N, window]: slot s holds the p in (t-window, t] with p % window = s, or -1."""

    by_row: ClassVar = frozenset({0})
    window: int

    def infer(self, positions: Type) -> TensorType:
        rows = expect_tensor(positions, "positions", 1, I32).shape[0]
        expect(self.window > 0, f"window must be positive, got {self.window}")
        return TensorType(I32, (rows, self.window))


@primitive
class VisibleEntries(Op):
    """Positions i32[N] -> i32[N, capacity]: entry w when it is complete, w < (t+1)//ratio, else -1."""

    by_row: ClassVar = frozenset({0})
    geometry: ClassVar = frozenset({"capacity"})
    ratio: int
    capacity: int

    def infer(self, positions: Type) -> TensorType:
        rows = expect_tensor(positions, "positions", 1, I32).shape[0]
        expect(self.ratio > 0, f"ratio must be positive, got {self.ratio}")
        return TensorType(I32, (rows, self.capacity))


@primitive
class Gather(Op):
    """Rows of a cache: cache[S, C, D], index i32[N, K], slots i32[N] -> [N, K, D].

    Row n reads index % C of its slot; index -1 gives zeros.
    """

    by_row: ClassVar = frozenset({1, 2})
    by_slot: ClassVar = True
    picks: ClassVar = {2: (0, 0)}

    def infer(self, cache: Type, index: Type, slots: Type) -> Type:
        chosen = expect_tensor(index, "index", 2, I32)
        expect(len(cache.shape) == 3, f"cache must be [S, C, D], got {cache}")
        expect_tensor(slots, "slots", 1, I32)
        expect(slots.shape == chosen.shape[:1], f"slots {slots} and index {index} differ in rows")
        return cache.with_shape((*chosen.shape, cache.shape[2]))

    def cost(self, operands: tuple[Type, ...], results: tuple[Type, ...]) -> Cost:
        _, index, slots = operands
        return Cost(0, (results[0].nbytes, index.nbytes, slots.nbytes), (results[0].nbytes,))


@primitive
class AttentionScores(Op):
    """q[N, h, D] · keys[N, K, D] * scale -> f32[N, h, K], -inf where index < 0."""

    by_row: ClassVar = frozenset({0, 1, 2})
    scale: float

    def infer(self, q: Type, keys: Type, index: Type) -> TensorType:
        expect_tensor(q, "q", 3)
        expect_tensor(keys, "keys", 3)
        expect_tensor(index, "index", 2, I32)
        expect(q.shape[2] == keys.shape[2], f"q {q} and keys {keys} differ in width")
        expect(keys.shape[:2] == index.shape, f"keys {keys} and index {index} differ")
        expect(q.shape[0] == keys.shape[0], f"q {q} and keys {keys} differ in rows")
        return TensorType(F32, (*q.shape[:2], keys.shape[1]))

    def cost(self, operands: tuple[Type, ...], results: tuple[Type, ...]) -> Cost:
        flops = 2 * elements(results[0]) * operands[0].shape[-1]
        return Cost(flops, tuple(o.nbytes for o in operands), (results[0].nbytes,))


@primitive
class SinkSoftmax(Op):
    """Softmax with a per-head sink in the denominator only, left undivided.

    scores f32[N, h, K], sink f32[h] -> p = exp(l - max) rounded to `out` [N, h, K], and the
    denominator f32[N, h] = sum of the unrounded p + exp(sink - max). The max runs over keys alone.
    """

    by_row: ClassVar = frozenset({0})
    out: DType

    def infer(self, scores: Type, sink: Type) -> tuple[TensorType, TensorType]:
        tensor = expect_tensor(scores, "scores", 3, F32)
        expect_tensor(sink, "sink", 1, F32)
        expect(sink.shape == tensor.shape[1:2], f"sink {sink} does not fit the heads of {scores}")
        return TensorType(self.out, tensor.shape), TensorType(F32, tensor.shape[:2])


@primitive
class AttentionValues(Op):
    """(p[N, h, K] · keys[N, K, D]) / denominator[N, h] -> [N, h, D] in the keys' type, rounded once."""

    by_row: ClassVar = frozenset({0, 1, 2})

    def infer(self, p: Type, denominator: Type, keys: Type) -> TensorType:
        expect_tensor(p, "p", 3)
        expect_tensor(denominator, "denominator", 2, F32)
        tensor = expect_tensor(keys, "keys", 3)
        expect(p.shape[2] == keys.shape[1], f"p {p} and keys {keys} differ in keys")
        expect(p.shape[0] == keys.shape[0], f"p {p} and keys {keys} differ in rows")
        expect(p.shape[:2] == denominator.shape, f"p {p} and denominator {denominator} differ")
        return TensorType(tensor.dtype, (*p.shape[:2], tensor.shape[2]))

    def cost(self, operands: tuple[Type, ...], results: tuple[Type, ...]) -> Cost:
        flops = 2 * elements(results[0]) * operands[0].shape[-1]
        return Cost(flops, tuple(o.nbytes for o in operands), (results[0].nbytes,))


window_index, visible_entries, gather = WindowIndex.apply, VisibleEntries.apply, Gather.apply
attention_scores, sink_softmax, attention_values = (
    AttentionScores.apply,
    SinkSoftmax.apply,
    AttentionValues.apply,
)
