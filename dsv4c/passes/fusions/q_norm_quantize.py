"""The q_a norm into the q_b input: norm and quantization are the prologue of the query projections."""

from __future__ import annotations

from dsv4c.ir.declare import fused
from dsv4c.ir.fused import Fused
from dsv4c.ir.graph import Value
from dsv4c.ir.ops import linear, rms_norm
from dsv4c.passes.fusions.rmsnorm_quantize import RmsnormQuantize
from dsv4c.types import DType, QuantFormat


@fused
class QNormQuantize(Fused):
    """qa[N, r] -> wq_b · quantize(rms_norm(qa)), and the indexer's projection of that row if there is one.

    The two inputs of the draft block have this form, too: enorm into e_proj, hnorm into h_proj.
    """

    literals = ("rms_norm.precision", "rmsnorm_quantize.keep")
    eps: float
    format: QuantFormat | None
    out: DType

    def body(self, qa: Value, gain: Value, wq_b: Value, index_wq_b: Value | None = None) -> tuple[Value, ...]:
        if self.format is None:
            qr = rms_norm(qa, gain, eps=self.eps)
        else:
            qr = RmsnormQuantize(eps=self.eps, format=self.format, keep=(0,))(qa, gain)
        weights = [wq_b] if index_wq_b is None else [wq_b, index_wq_b]
        return tuple(linear(qr, w, out=self.out) for w in weights)
