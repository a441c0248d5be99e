"""Changes of shape. They cost nothing: the bytes stay where they are, or move with the consumer."""

from __future__ import annotations

from math import prod
from typing import ClassVar

from dsv4c.ir.op import Cost, Op, elements, expect, expect_tensor, primitive
from dsv4c.types import QuantType, TensorType, Type


@primitive
class Reshape(Op):
    """The same elements in another shape, of which one dimension may be -1: what is left."""

    by_row: ClassVar = frozenset({0})
    view: ClassVar = True
    addressed: ClassVar = True
    geometry: ClassVar = frozenset({"shape"})
    shape: tuple[int, ...]

    def hands_on(self, operand: int) -> int | None:
        return 0

    def infer(self, x: Type) -> TensorType:
        dtype, count = expect_tensor(x, "x").dtype, elements(x)
        given = prod(n for n in self.shape if n != -1)
        expect(self.shape.count(-1) <= 1, f"shape {self.shape} leaves several dimensions open")
        expect(-1 not in self.shape or count % given == 0, f"{x} does not divide into {self.shape}")
        result = TensorType(dtype, tuple(count // given if n == -1 else n for n in self.shape))
        expect(
            elements(x) == elements(result),
            f"{x} has {elements(x)} elements, {result} has {elements(result)}",
        )
        return result

    def cost(self, operands: tuple[Type, ...], results: tuple[Type, ...]) -> Cost:
        return Cost(0, (0,), (0,))


@primitive
class Slice(Op):
    """x[start:stop] along `axis`."""

    addressed: ClassVar = True
    geometry: ClassVar = frozenset({"start", "stop"})
    axis: int
    start: int
    stop: int

    def hands_on(self, operand: int) -> int | None:
        return 0

    def rows_of(self, operands: tuple[Type, ...]) -> frozenset[int] | None:
        leading = self.axis % len(operands[0].shape) == 0
        return None if leading else frozenset(range(len(operands)))

    def infer(self, x: Type) -> TensorType:
        shape = list(expect_tensor(x, "x").shape)
        expect(-len(shape) <= self.axis < len(shape), f"axis {self.axis} is outside {x}")
        expect(
            0 <= self.start < self.stop <= shape[self.axis],
            f"[{self.start}:{self.stop}] is outside axis {self.axis} of {x}",
        )
        shape[self.axis] = self.stop - self.start
        return TensorType(expect_tensor(x, "x").dtype, tuple(shape))

    def cost(self, operands: tuple[Type, ...], results: tuple[Type, ...]) -> Cost:
        return Cost(0, (results[0].nbytes,), (results[0].nbytes,))


@primitive
class Concat(Op):
    """Values joined along `axis`; all other dimensions, and the types, agree."""

    axis: int

    def hands_on(self, operand: int) -> int | None:
        return 0

    def rows_of(self, operands: tuple[Type, ...]) -> frozenset[int] | None:
        leading = self.axis % len(operands[0].shape) == 0
        return None if leading else frozenset(range(len(operands)))

    def infer(self, *parts: Type) -> Type:
        expect(len(parts) >= 2, "concat joins at least two values")
        rank = len(parts[0].shape)
        expect(-rank <= self.axis < rank, f"axis {self.axis} is outside {parts[0]}")
        axis = self.axis % rank
        shape = list(parts[0].shape)
        shape[axis] = 0
        for part in parts:
            expect(len(part.shape) == len(shape), f"{part} differs in rank from {parts[0]}")
            shape[axis] += part.shape[axis]
            expect(
                parts[0].with_shape(part.shape) == part
                and all(
                    m == n
                    for i, (m, n) in enumerate(zip(part.shape, parts[0].shape, strict=True))
                    if i != axis
                ),
                f"{part} does not join {parts[0]} along axis {axis}",
            )
        if isinstance(parts[0], QuantType):
            expect(axis < len(shape) - 2, f"quantized values join along leading dimensions, not axis {axis}")
        return parts[0].with_shape(tuple(shape))


reshape, slice_, concat = Reshape.apply, Slice.apply, Concat.apply
