"""Writes to state, and the positions that say where."""

from __future__ import annotations

from typing import ClassVar

from dsv4c.ir.op import Cost, Op, expect, expect_tensor, primitive
from dsv4c.types import I32, TensorType, Type


@primitive
class CacheWrite(Op):
    """cache[B, C, ...] with rows[M, ...] stored at slots index % C, in place; negative indices store nothing.

    Row m belongs to sequence m // (M/B).
    """

    alias: ClassVar = {0: 0}

    def infer(self, cache: Type, rows: Type, index: Type) -> Type:
        expect_tensor(index, "index", 1, I32)
        expect(len(cache.shape) >= 2, f"cache must be [B, C, ...], got {cache}")
        expect(rows.shape[:1] == index.shape, f"rows {rows} and index {index} differ")
        expect(
            index.shape[0] % cache.shape[0] == 0, f"{index} does not divide over {cache.shape[0]} sequences"
        )
        wanted = cache.with_shape((rows.shape[0], *cache.shape[2:]))
        expect(rows == wanted, f"rows must be {wanted} to go into {cache}, got {rows}")
        return cache

    def cost(self, operands: tuple[Type, ...], results: tuple[Type, ...]) -> Cost:
        _, rows, index = operands
        return Cost(0, (0, rows.nbytes, index.nbytes), (rows.nbytes,))


@primitive
class Positions(Op):
    """start i32[B], lengths i32[B] -> i32[B·tokens]: start + t for the first `lengths` tokens, then -1."""

    tokens: int

    def infer(self, start: Type, lengths: Type) -> TensorType:
        expect_tensor(start, "start", 1, I32)
        expect_tensor(lengths, "lengths", 1, I32)
        expect(start == lengths, f"start {start} and lengths {lengths} differ")
        return TensorType(I32, (start.shape[0] * self.tokens,))


@primitive
class Advance(Op):
    """start + lengths, in place."""

    alias: ClassVar = {0: 0}

    def infer(self, start: Type, lengths: Type) -> TensorType:
        tensor = expect_tensor(start, "start", 1, I32)
        expect(start == lengths, f"start {start} and lengths {lengths} differ")
        return tensor


cache_write, positions, advance = CacheWrite.apply, Positions.apply, Advance.apply
