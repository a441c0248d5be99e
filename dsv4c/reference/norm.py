"""Normalizations. Sums are exact and rounded to f32 (or to bf16, where the model works in bf16 steps)."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4c.ir.ops.norm import Normalize, RmsNorm, RsqrtMeanSquare, Softmax
from dsv4c.numerics.codec import round_once
from dsv4c.reference.registry import meaning
from dsv4c.types import BF16


def mean_square(x: Tensor) -> Tensor:
    """mean(x²) over the last dimension, kept, in f32."""
    return x.to(torch.float64).square().mean(-1, keepdim=True).to(torch.float32)


@meaning(RmsNorm)
def rms_norm(op: RmsNorm, x: Tensor, gain: Tensor | None = None) -> Tensor:
    if op.precision is BF16:
        return _rms_norm_bf16(x, op.eps)
    wide = x.to(torch.float32)
    normed = wide * torch.rsqrt(mean_square(x) + op.eps)
    return (normed if gain is None else normed * gain.to(torch.float32)).to(x.dtype)


def _rms_norm_bf16(x: Tensor, eps: float) -> Tensor:
    """`q *= torch.rsqrt(q.square().mean(-1, keepdim=True) + eps)` on bf16 tensors, every step rounded once.

    The root is taken in f32: torch's own bf16 rsqrt rounds twice on a CPU when the tensor is short.
    """
    rounded = x.to(torch.bfloat16)
    mean = round_once(rounded.square().to(torch.float64).mean(-1, keepdim=True), torch.bfloat16)
    root = torch.rsqrt((mean + eps).to(torch.float32)).to(torch.bfloat16)
    return (rounded * root).to(x.dtype)


@meaning(RsqrtMeanSquare)
def rsqrt_mean_square(op: RsqrtMeanSquare, x: Tensor) -> Tensor:
    return torch.rsqrt(mean_square(x) + op.eps)


@meaning(Normalize)
def normalize(op: Normalize, x: Tensor) -> Tensor:
    total = x.to(torch.float64).sum(op.axis, keepdim=True).to(torch.float32)
    return x / (total + op.eps)


@meaning(Softmax)
def softmax(op: Softmax, x: Tensor) -> Tensor:
    return torch.softmax(x.to(torch.float64), op.axis).to(torch.float32)
