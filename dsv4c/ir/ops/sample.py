"""The next token, and the rows it is read from."""

from __future__ import annotations

from typing import ClassVar

from dsv4c.ir.op import Cost, Op, expect, expect_tensor, primitive
from dsv4c.types import I32, TensorType, Type


@primitive
class LastRows(Op):
    """Row of each sequence's last token: x[B·T, ...], lengths i32[B] -> [B, ...]; zeros where length is 0."""

    def infer(self, x: Type, lengths: Type) -> TensorType:
        tensor = expect_tensor(x, "x", least=1)
        rows, sequences = tensor.shape[0], expect_tensor(lengths, "lengths", 1, I32).shape[0]
        expect(rows % sequences == 0, f"{rows} rows do not divide over {sequences} sequences")
        return tensor.with_shape((sequences, *tensor.shape[1:]))

    def cost(self, operands: tuple[Type, ...], results: tuple[Type, ...]) -> Cost:
        return Cost(0, (results[0].nbytes, operands[1].nbytes), (results[0].nbytes,))


@primitive
class Argmax(Op):
    """Column of the largest logit, the lowest on ties: logits[N, V] -> i32[N]."""

    by_row: ClassVar = frozenset({0})

    def infer(self, logits: Type) -> TensorType:
        return TensorType(I32, expect_tensor(logits, "logits", 2).shape[:1])


last_rows, argmax = LastRows.apply, Argmax.apply
