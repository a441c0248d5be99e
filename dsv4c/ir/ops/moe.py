"""Table lookups of the embedding and of the routers."""

from __future__ import annotations

from typing import ClassVar

from dsv4c.ir.op import Cost, Op, expect, expect_tensor, primitive
from dsv4c.types import I32, TensorType, Type


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


embedding, take_along = Embedding.apply, TakeAlong.apply
