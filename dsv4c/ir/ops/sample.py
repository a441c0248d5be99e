"""The next token."""

from __future__ import annotations

from dsv4c.ir.op import Op, expect_tensor, primitive
from dsv4c.types import I32, TensorType, Type


@primitive
class Argmax(Op):
    """Column of the largest logit, the lowest on ties: logits[N, V] -> i32[N]."""

    def infer(self, logits: Type) -> TensorType:
        return TensorType(I32, expect_tensor(logits, "logits", 2).shape[:1])


argmax = Argmax.apply
