"""Sinkhorn: softmax of the rows, then alternating column and row normalizations, as one op."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from dsv4c.ir.declare import fused
from dsv4c.ir.fused import Fused, Neighborhood
from dsv4c.ir.graph import Node, Value
from dsv4c.ir.op import expect
from dsv4c.ir.ops import normalize, shift, softmax
from dsv4c.ir.ops.norm import Normalize, Softmax

MOST = 256
"""Iterations that a body spells out; models have 20."""


@fused
class Sinkhorn(Fused):
    """Logits f32[N, S, S] to an almost doubly stochastic matrix: one column step, then iterations-1 row and
    column steps. DeepSeek-V4's hc_split_sinkhorn."""

    literals = ("softmax.axis", "normalize.axis")
    anchor = Softmax
    example: ClassVar[Mapping[str, Any]] = {"iterations": 2}
    iterations: int
    eps: float

    @classmethod
    def propose(cls, anchor: Node, around: Neighborhood) -> Iterable[Mapping[str, Any]]:
        """As many iterations as the chain of normalizations has."""
        steps, nodes = 0, around.users(anchor.outputs[0])
        while len(nodes) == 1:
            steps += isinstance(nodes[0].op, Normalize)
            if steps and not isinstance(nodes[0].op, Normalize):
                break
            nodes = around.users(nodes[0].outputs[0])
        return ({"iterations": (steps + 1) // 2},)

    def body(self, logits: Value) -> Value:
        expect(1 <= self.iterations <= MOST, f"iterations must be 1 to {MOST}, got {self.iterations}")
        comb = shift(softmax(logits, axis=-1), offset=self.eps)
        comb = normalize(comb, axis=-2, eps=self.eps)
        for _ in range(self.iterations - 1):
            comb = normalize(normalize(comb, axis=-1, eps=self.eps), axis=-2, eps=self.eps)
        out: Value = comb
        return out


sinkhorn = Sinkhorn.apply
