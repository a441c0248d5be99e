"""Table lookups of the embedding and of the routers, and which rows have experts."""

from __future__ import annotations

from typing import ClassVar

from dsv4c.ir.op import Cost, Op, Rounding, expect, expect_tensor, primitive
from dsv4c.types import F32, I32, TensorType, Type


@primitive
class Embedding(Op):
    """Rows of a table: table[V, ...], ids i32[N] -> [N, ...]. The hash router's expert table is one too."""

    by_row: ClassVar = frozenset({1})
    weight: ClassVar = 0
    picks: ClassVar = {1: (0, 0)}

    def hands_on(self, operand: int) -> int | None:
        return 0 if operand == 0 else None

    def infer(self, table: Type, ids: Type) -> TensorType:
        tensor = expect_tensor(table, "table", least=1)
        expect_tensor(ids, "ids", 1, I32)
        return TensorType(tensor.dtype, (*ids.shape, *tensor.shape[1:]))

    def cost(self, operands: tuple[Type, ...], results: tuple[Type, ...]) -> Cost:
        return Cost(0, (results[0].nbytes, operands[1].nbytes), (results[0].nbytes,))


@primitive
class TakeAlong(Op):
    """x[n, index[n, j]] (or x[index[n, j]] for a vector x): x[N, E] or x[E], index i32[N, k] -> [N, k]."""

    picks: ClassVar = {1: (0, -1)}

    def hands_on(self, operand: int) -> int | None:
        return 0 if operand == 0 else None

    def rows_of(self, operands: tuple[Type, ...]) -> frozenset[int] | None:
        return frozenset({1} if len(operands[0].shape) == 1 else {0, 1})

    def infer(self, x: Type, index: Type) -> TensorType:
        tensor = expect_tensor(x, "x")
        expect_tensor(index, "index", 2, I32)
        expect(
            len(tensor.shape) == 1 or tensor.shape[:-1] == index.shape[:1],
            f"x {x} and index {index} differ in rows",
        )
        return TensorType(tensor.dtype, index.shape)

    def cost(self, operands: tuple[Type, ...], results: tuple[Type, ...]) -> Cost:
        return Cost(0, (results[0].nbytes, operands[1].nbytes), (results[0].nbytes,))


@primitive
class Present(Op):
    """Routing weights of the rows that are there: weights f32[N, k], 0 where positions i32[N] are -1.

    Experts of weight 0 add nothing, so that nobody needs to read them.
    """

    by_row: ClassVar = frozenset({0, 1})
    rounding: ClassVar = Rounding.NOWHERE

    def infer(self, weights: Type, positions: Type) -> TensorType:
        tensor = expect_tensor(weights, "weights", 2, F32)
        expect_tensor(positions, "positions", 1, I32)
        expect(positions.shape == tensor.shape[:1], f"weights {weights} and positions {positions} differ")
        return tensor


embedding, take_along, present = Embedding.apply, TakeAlong.apply, Present.apply
