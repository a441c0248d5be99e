"""Exchanges between the ranks that a model is cut over: every rank runs the same graph on its own share.

A rank gives its operands, and all ranks get the same results. `dsv4c.passes.placement` says which values of a
graph are alike on all ranks, are cut, or are addends.
"""

from __future__ import annotations

from typing import ClassVar

from dsv4c.ir.op import Cost, Op, Rounding, elements, expect, expect_tensor, primitive
from dsv4c.types import F32, DType, TensorType, Type


@primitive
class AllReduce(Op):
    """Every rank's x f32[...] added up, in f32 and in order of the ranks, and rounded once -> out[...]."""

    by_row: ClassVar = frozenset({0})
    collective: ClassVar = True
    rounding: ClassVar = Rounding.ONCE
    ranks: int
    out: DType

    def infer(self, x: Type) -> TensorType:
        expect(self.ranks > 1, f"ranks must be at least 2, got {self.ranks}")
        return TensorType(self.out, expect_tensor(x, "x", dtype=F32, least=1).shape)

    def cost(self, operands: tuple[Type, ...], results: tuple[Type, ...]) -> Cost:
        flops = elements(results[0]) * (self.ranks - 1)
        return Cost(flops, (operands[0].nbytes * self.ranks,), (results[0].nbytes,))


@primitive
class AllGather(Op):
    """Every rank's piece joined along `axis` in order of the ranks: x[..., n] -> [..., n·R]."""

    collective: ClassVar = True
    axis: int
    ranks: int

    def rows_of(self, operands: tuple[Type, ...]) -> frozenset[int] | None:
        leading = self.axis % len(operands[0].shape) == 0
        return None if leading else frozenset({0})

    def infer(self, x: Type) -> TensorType:
        expect(self.ranks > 1, f"ranks must be at least 2, got {self.ranks}")
        piece = expect_tensor(x, "a piece", least=1)
        expect(-len(piece.shape) <= self.axis < len(piece.shape), f"axis {self.axis} is outside {x}")
        shape = list(piece.shape)
        shape[self.axis] *= self.ranks
        return piece.with_shape(tuple(shape))

    def cost(self, operands: tuple[Type, ...], results: tuple[Type, ...]) -> Cost:
        return Cost(0, (results[0].nbytes,), (results[0].nbytes,))


all_reduce, all_gather = AllReduce.apply, AllGather.apply
