"""The KV compressor: which entries a call completes, and the softmax pooling that makes them."""

from __future__ import annotations

from dsv4c.ir.op import Cost, Op, elements, expect, expect_tensor, primitive
from dsv4c.types import F32, I32, TensorType, Type


@primitive
class CompletedEntries(Op):
    """Entries finished by this call: positions i32[B·T] -> i32[B·E] with E = ceil(T / ratio).

    Entry w is finished by token (w+1)·ratio - 1; unused places hold -1.
    """

    ratio: int
    sequences: int

    def infer(self, positions: Type) -> TensorType:
        rows = expect_tensor(positions, "positions", 1, I32).shape[0]
        expect(self.ratio > 0, f"ratio must be positive, got {self.ratio}")
        expect(self.sequences > 0, f"sequences must be positive, got {self.sequences}")
        expect(rows % self.sequences == 0, f"{rows} rows do not divide over {self.sequences} sequences")
        return TensorType(I32, (self.sequences * -(-(rows // self.sequences) // self.ratio),))


@primitive
class CompressPool(Op):
    """Per-channel softmax over the tokens of a window, weighting their kv -> f32[B·E, d].

    kv and score are rings f32[B, R, c·d] (token p in row p % R; score includes the position bias), entries
    i32[B·E]. With `overlap` (c = 2) entry w pools tokens ratio·(w-1).. of channels [:d] and ratio·w.. of
    [d:]; tokens before the start weigh nothing, whatever their row holds. Entry -1 gives zeros.
    """

    ratio: int
    overlap: bool

    def infer(self, kv: Type, score: Type, entries: Type) -> TensorType:
        expect(self.ratio > 0, f"ratio must be positive, got {self.ratio}")
        ring = expect_tensor(kv, "kv", 3, F32)
        expect(score == kv, f"kv {kv} and score {score} differ")
        expect_tensor(entries, "entries", 1, I32)
        sequences, count = ring.shape[0], entries.shape[0]
        expect(count % sequences == 0, f"{count} entries do not divide over {sequences} sequences")
        parts = 2 if self.overlap else 1
        expect(
            ring.shape[1] >= parts * self.ratio,
            f"a ring of {ring.shape[1]} tokens cannot hold {parts} windows of {self.ratio}",
        )
        expect(ring.shape[2] % parts == 0, f"{kv} does not split into {parts} halves")
        return TensorType(F32, (entries.shape[0], ring.shape[2] // parts))

    def cost(self, operands: tuple[Type, ...], results: tuple[Type, ...]) -> Cost:
        kv, _, entries = operands
        window = self.ratio * kv.shape[2] * 4  # bytes that one entry pools
        once_in = self.ratio if entries.shape[0] == kv.shape[0] else 1  # decode pools in one of `ratio` calls
        pooled = entries.shape[0] * window // once_in
        flops = 4 * elements(results[0]) * self.ratio
        return Cost(flops, (pooled, pooled, entries.nbytes), (results[0].nbytes,))


@primitive
class AddPositionBias(Op):
    """score + bias[position % r]: score f32[N, W], bias f32[r, W], positions i32[N] -> f32[N, W]."""

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
