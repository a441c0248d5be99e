"""Writes to state, and the positions and slots that say where.

State is [slots, ...], one slot per sequence that a session keeps. A call is about a few of them, and every
row carries the slot it belongs to.
"""

from __future__ import annotations

from typing import ClassVar

from dsv4c.ir.op import Cost, Op, expect, expect_tensor, primitive, row_bytes
from dsv4c.types import I32, TensorType, Type


def _expect_rows(cache: Type, rows: Type, slots: Type, name: str, places: Type) -> None:
    """Rows [M, ...] that fit a cache [S, C, ...], with a slot and a place each; `name` is that operand's."""
    expect_tensor(places, name, 1, I32)
    expect(len(cache.shape) >= 2, f"cache must be [S, C, ...], got {cache}")
    expect(rows.shape[:1] == places.shape, f"rows {rows} and {name} {places} differ")
    expect(slots == places, f"slots {slots} and {name} {places} differ")
    wanted = cache.with_shape((rows.shape[0], *cache.shape[2:]))
    expect(rows == wanted, f"rows must be {wanted} to fit {cache}, got {rows}")


@primitive
class CacheWrite(Op):
    """cache[S, C, ...] with rows[M, ...] stored in place: row m at index % C of its slot.

    index i32[M], slots i32[M]. Negative indices store nothing; of two rows for one place the later one stays.
    """

    alias: ClassVar = {0: 0}
    by_slot: ClassVar = True
    same_format: ClassVar = {1: 0}
    picks: ClassVar = {3: (0, 0)}

    def hands_on(self, operand: int) -> int | None:
        return 0 if operand in (0, 1) else None

    def infer(self, cache: Type, rows: Type, index: Type, slots: Type) -> Type:
        _expect_rows(cache, rows, slots, "index", index)
        return cache

    def cost(self, operands: tuple[Type, ...], results: tuple[Type, ...]) -> Cost:
        _, rows, index, slots = operands
        return Cost(0, (0, rows.nbytes, index.nbytes, slots.nbytes), (rows.nbytes,))


@primitive
class CacheExtend(Op):
    """What a ring would hold if it had `capacity` rows and the call's rows in it -> [B, capacity, ...].

    cache[S, C, ...] holds the last C positions before the call, p at p % C. rows[N, ...] are the call's,
    `tokens` of each sequence, at positions i32[N] of slots i32[N]; -1 is no row. Row r of the result is the
    sequence's latest position p with p % capacity = r: one of the call's, one that the ring still has, or
    else zeros. The ring stays as it is.
    """

    capacity: int
    tokens: int
    per_call: ClassVar = "tokens"
    room: ClassVar = "capacity"
    by_slot: ClassVar = True
    same_format: ClassVar = {1: 0}
    picks: ClassVar = {3: (0, 0)}

    def infer(self, cache: Type, rows: Type, positions: Type, slots: Type) -> Type:
        _expect_rows(cache, rows, slots, "positions", positions)
        count = rows.shape[0]
        expect(count % self.tokens == 0, f"{count} rows are not {self.tokens} of each sequence")
        expect(
            self.tokens <= self.capacity,
            f"a capacity of {self.capacity} cannot hold {self.tokens} rows of a sequence",
        )
        return cache.with_shape((count // self.tokens, self.capacity, *cache.shape[2:]))

    def cost(self, operands: tuple[Type, ...], results: tuple[Type, ...]) -> Cost:
        cache, rows, positions, slots = operands
        kept = results[0].shape[0] * min(cache.shape[1], self.capacity) - rows.shape[0]
        old = row_bytes(cache, max(0, kept), rank=2)
        return Cost(0, (old, rows.nbytes, positions.nbytes, slots.nbytes), (results[0].nbytes,))


@primitive
class Positions(Op):
    """Where the tokens of a call go: start i32[S], slots i32[B], lengths i32[B] -> (positions, row slots).

    Both are i32[B·tokens], `tokens` rows of each sequence: start[slot] + t in that slot for the first
    `lengths` of them, then position -1 in slot 0. A sequence of length 0 is idle, its slot may be -1.
    """

    tokens: int
    per_call: ClassVar = "tokens"

    def infer(self, start: Type, slots: Type, lengths: Type) -> tuple[TensorType, TensorType]:
        expect_tensor(start, "start", 1, I32)
        expect_tensor(lengths, "lengths", 1, I32)
        expect(slots == lengths, f"slots {slots} and lengths {lengths} differ")
        rows = TensorType(I32, (lengths.shape[0] * self.tokens,))
        return rows, rows


@primitive
class Owners(Op):
    """Which sequence of the call each row belongs to: lengths i32[B] -> i32[B·tokens], 0, ..., 0, 1, ...

    The slots, so to speak, of values that have one row per sequence of the call.
    """

    tokens: int
    per_call: ClassVar = "tokens"

    def infer(self, lengths: Type) -> TensorType:
        sequences = expect_tensor(lengths, "lengths", 1, I32).shape[0]
        return TensorType(I32, (sequences * self.tokens,))


@primitive
class Advance(Op):
    """start[slots] + lengths, in place: start i32[S], slots and lengths i32[B]. Length 0 moves nothing."""

    alias: ClassVar = {0: 0}

    def infer(self, start: Type, slots: Type, lengths: Type) -> TensorType:
        tensor = expect_tensor(start, "start", 1, I32)
        expect_tensor(lengths, "lengths", 1, I32)
        expect(slots == lengths, f"slots {slots} and lengths {lengths} differ")
        return tensor


cache_write, cache_extend = CacheWrite.apply, CacheExtend.apply
positions, owners, advance = Positions.apply, Owners.apply, Advance.apply
