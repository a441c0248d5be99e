"""The KV compressor: which entries a call completes, and the softmax pooling that makes them."""

from __future__ import annotations

from typing import ClassVar

from dsv4c.ir.op import Cost, Op, elements, expect, expect_tensor, primitive
from dsv4c.types import F32, I32, TensorType, Type


@primitive
class CompletedEntries(Op):
    """Entries finished by this call: positions, slots i32[B·T] -> (entries, their slots), both i32[B·E].

    E = ceil(T / ratio) for T = `tokens` of each sequence. Entry w is finished by token (w+1)·ratio - 1 and
    lies in that token's slot; unused places hold -1 in slot 0.
    """

    ratio: int
    tokens: int
    per_call: ClassVar = "tokens"

    def hands_on(self, operand: int) -> int | None:
        return 1 if operand == 1 else None  # slots

    def infer(self, positions: Type, slots: Type) -> tuple[TensorType, TensorType]:
        rows = expect_tensor(positions, "positions", 1, I32).shape[0]
        expect(slots == positions, f"slots {slots} and positions {positions} differ")
        expect(self.ratio > 0, f"ratio must be positive, got {self.ratio}")
        expect(self.tokens > 0, f"tokens must be positive, got {self.tokens}")
        expect(rows % self.tokens == 0, f"{rows} rows are not {self.tokens} of each sequence")
        entries = TensorType(I32, (rows // self.tokens * -(-self.tokens // self.ratio),))
        return entries, entries


@primitive
class CompressPool(Op):
    """Per-channel softmax over the tokens of a window, weighting their kv -> f32[M, d].

    kv and score are rings f32[S, R, c·d] (token p in row p % R; score includes the position bias), entries
    and slots i32[M]. With `overlap` (c = 2) entry w pools tokens ratio·(w-1).. of channels [:d] and
    ratio·w.. of [d:]; tokens before the start weigh nothing, whatever their row holds. Entry -1 gives zeros.
    `tokens` is how many of each sequence a call has: in the long run one entry is pooled per `ratio` of them.
    """

    by_row: ClassVar = frozenset({2, 3})
    ratio: int
    overlap: bool
    tokens: int
    per_call: ClassVar = "tokens"
    geometry: ClassVar = frozenset({"tokens"})
    by_slot: ClassVar = True
    picks: ClassVar = {3: (0, 0)}

    def infer(self, kv: Type, score: Type, entries: Type, slots: Type) -> TensorType:
        expect(self.ratio > 0, f"ratio must be positive, got {self.ratio}")
        expect(self.tokens > 0, f"tokens must be positive, got {self.tokens}")
        ring = expect_tensor(kv, "kv", 3, F32)
        expect(score == kv, f"kv {kv} and score {score} differ")
        expect_tensor(entries, "entries", 1, I32)
        expect(slots == entries, f"slots {slots} and entries {entries} differ")
        parts = 2 if self.overlap else 1
        expect(
            ring.shape[1] >= parts * self.ratio,
            f"a ring of {ring.shape[1]} tokens cannot hold {parts} windows of {self.ratio}",
        )
        expect(ring.shape[2] % parts == 0, f"{kv} does not split into {parts} halves")
        return TensorType(F32, (entries.shape[0], ring.shape[2] // parts))

    def cost(self, operands: tuple[Type, ...], results: tuple[Type, ...]) -> Cost:
        kv, _, entries, slots = operands
        window = self.ratio * kv.shape[2] * 4  # bytes that one entry pools
        most = -(-self.tokens // self.ratio)  # entries that a sequence may complete in a call
        pooled = entries.shape[0] * window * self.tokens // (most * self.ratio)
        flops = 4 * elements(results[0]) * self.ratio
        return Cost(flops, (pooled, pooled, entries.nbytes, slots.nbytes), (results[0].nbytes,))


@primitive
class AddPositionBias(Op):
    """score + bias[position % r]: score f32[N, W], bias f32[r, W], positions i32[N] -> f32[N, W]."""

    by_row: ClassVar = frozenset({0, 2})

    def infer(self, score: Type, bias: Type, positions: Type) -> TensorType:
        tensor = expect_tensor(score, "score", 2, F32)
        expect_tensor(bias, "bias", 2, F32)
        expect_tensor(positions, "positions", 1, I32)
        expect(bias.shape[1] == tensor.shape[1], f"bias {bias} does not fit score {score}")
        expect(positions.shape == tensor.shape[:1], f"score {score} and positions {positions} differ in rows")
        return tensor

    def cost(self, operands: tuple[Type, ...], results: tuple[Type, ...]) -> Cost:
        score, bias, positions = operands
        touched = min(bias.nbytes, score.nbytes)  # one row of the bias per token
        return Cost(elements(score), (score.nbytes, touched, positions.nbytes), (results[0].nbytes,))


completed_entries, compress_pool = CompletedEntries.apply, CompressPool.apply
add_position_bias = AddPositionBias.apply
