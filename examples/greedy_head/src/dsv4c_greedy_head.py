"""lm_head and greedy sampling in one launch: the logits need not be read back to find the largest."""

from dsv4c import Fused, Value, fused
from dsv4c.ir.ops import argmax, linear
from dsv4c.types import DType


@fused
class GreedyHead(Fused):
    """x[N, H] · head[V, H]ᵀ -> the next token i32[N], and the logits [N, V] for whoever reads them."""

    out: DType

    def body(self, x: Value, head: Value) -> tuple[Value, ...]:
        logits = linear(x, head, out=self.out)
        return argmax(logits), logits
