"""The entries a token attends to: the best of the indexer's scores."""

from __future__ import annotations

from dsv4c.ir.declare import fused
from dsv4c.ir.fused import Fused
from dsv4c.ir.graph import Value
from dsv4c.ir.ops import top_k


@fused
class IndexTopk(Fused):
    """scores [N, C] -> i32[N, min(k, C)], -1 padded."""

    optional = True
    k: int

    def body(self, scores: Value) -> Value:
        chosen: Value = top_k(scores, k=self.k)
        return chosen
