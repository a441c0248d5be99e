"""The indexer of compressed sparse attention: scores over all entries, and the best of them."""

from __future__ import annotations

from typing import ClassVar

from dsv4c.ir.op import Cost, Op, elements, expect, expect_tensor, primitive, row_bytes
from dsv4c.types import BF16, F32, I32, TensorType, Type


@primitive
class IndexScores(Op):
    """Sum over heads of relu(q_h · key_w) * weight_h -> [N, C], -inf for entries w >= (t+1)//ratio.

    q[N, H, D] and keys[S, C, D], quantized or plain; weights[N, H]; positions and slots i32[N]. With bf16
    weights the dot products, the products with the weights and the sum are each rounded to bf16, and scores
    are bf16; else they are f32.
    """

    by_row: ClassVar = frozenset({0, 2, 3, 4})
    ratio: int
    by_slot: ClassVar = True
    picks: ClassVar = {4: (1, 0)}

    def infer(self, q: Type, keys: Type, weights: Type, positions: Type, slots: Type) -> TensorType:
        expect(
            len(q.shape) == 3 and len(keys.shape) == 3,
            f"q must be [N, H, D], keys [S, C, D]; got {q}, {keys}",
        )
        expect(q.shape[2] == keys.shape[2], f"q {q} and keys {keys} differ in width")
        dtype = expect_tensor(weights, "weights", 2).dtype
        expect(weights.shape == q.shape[:2], f"weights {weights} do not fit q {q}")
        expect_tensor(positions, "positions", 1, I32)
        expect(positions.shape == q.shape[:1], f"q {q} and positions {positions} differ in rows")
        expect(slots == positions, f"slots {slots} and positions {positions} differ")
        return TensorType(BF16 if dtype is BF16 else F32, (q.shape[0], keys.shape[1]))

    def cost(self, operands: tuple[Type, ...], results: tuple[Type, ...]) -> Cost:
        q, keys, *small = operands
        flops = 2 * elements(results[0]) * q.shape[1] * (q.shape[2] + 1)
        read = row_bytes(keys, min(q.shape[0], keys.shape[0]))  # of the slots that the rows are in
        return Cost(flops, (q.nbytes, read, *(o.nbytes for o in small)), (results[0].nbytes,))


@primitive
class TopK(Op):
    """Columns of the k largest scores[N, C], ascending, -1 padded at the end -> i32[N, min(k, C)].

    Ties go to the lower column; -inf is never chosen.
    """

    by_row: ClassVar = frozenset({0})
    k: int

    def infer(self, scores: Type) -> TensorType:
        tensor = expect_tensor(scores, "scores", 2)
        expect(tensor.dtype in (F32, BF16), f"scores must be f32 or bf16, got {tensor}")
        expect(self.k > 0, f"k must be positive, got {self.k}")
        return TensorType(I32, (tensor.shape[0], min(self.k, tensor.shape[1])))


index_scores, top_k = IndexScores.apply, TopK.apply
