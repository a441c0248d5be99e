"""Manifold-constrained hyper-connections: S residual streams mixed around every sublayer."""

from __future__ import annotations

from typing import ClassVar

from dsv4c.ir.op import Cost, Op, elements, expect, expect_tensor, primitive
from dsv4c.types import F32, DType, TensorType, Type


@primitive
class ExpandStreams(Op):
    """h[N, H] copied to every stream -> [N, streams, H]."""

    by_row: ClassVar = frozenset({0})
    streams: int

    def infer(self, h: Type) -> TensorType:
        tensor = expect_tensor(h, "h", 2)
        return TensorType(tensor.dtype, (tensor.shape[0], self.streams, tensor.shape[1]))


@primitive
class CollapseStreams(Op):
    """sum_i weights_i * x_i: x[N, S, H], weights f32[N, S] -> out[N, H], f32 inside, one cast."""

    by_row: ClassVar = frozenset({0, 1})
    out: DType

    def infer(self, x: Type, weights: Type) -> TensorType:
        tensor = expect_tensor(x, "x", 3)
        expect_tensor(weights, "weights", 2, F32)
        expect(weights.shape == tensor.shape[:2], f"weights {weights} do not fit the streams of {x}")
        return TensorType(self.out, (tensor.shape[0], tensor.shape[2]))

    def cost(self, operands: tuple[Type, ...], results: tuple[Type, ...]) -> Cost:
        return Cost(2 * elements(operands[0]), tuple(o.nbytes for o in operands), (results[0].nbytes,))


@primitive
class MixStreams(Op):
    """out_k = sum_j comb[j, k] * x_j: x[N, S, H], comb f32[N, S, S] -> f32[N, S, H]."""

    by_row: ClassVar = frozenset({0, 1})

    def infer(self, x: Type, comb: Type) -> TensorType:
        tensor = expect_tensor(x, "x", 3)
        expect_tensor(comb, "comb", 3, F32)
        n, s, _ = tensor.shape
        expect(comb.shape == (n, s, s), f"comb {comb} does not fit the streams of {x}")
        return TensorType(F32, tensor.shape)

    def cost(self, operands: tuple[Type, ...], results: tuple[Type, ...]) -> Cost:
        x = operands[0]
        return Cost(2 * elements(x) * x.shape[1], tuple(o.nbytes for o in operands), (results[0].nbytes,))


@primitive
class SpreadStreams(Op):
    """out_k = post_k * f: f[N, H], post f32[N, S] -> f32[N, S, H]."""

    by_row: ClassVar = frozenset({0, 1})

    def infer(self, f: Type, post: Type) -> TensorType:
        tensor = expect_tensor(f, "f", 2)
        weights = expect_tensor(post, "post", 2, F32)
        expect(weights.shape[0] == tensor.shape[0], f"post {post} and f {f} differ in rows")
        return TensorType(F32, (tensor.shape[0], weights.shape[1], tensor.shape[1]))


expand_streams, collapse_streams = ExpandStreams.apply, CollapseStreams.apply
mix_streams, spread_streams = MixStreams.apply, SpreadStreams.apply
