"""Quantization; the formulas are in `dsv4c.numerics.codec`."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4c.ir.ops.quant import Dequantize, Hadamard, Quantize
from dsv4c.numerics import codec
from dsv4c.numerics.codec import TORCH_DTYPES, Quantized, round_once
from dsv4c.reference.registry import meaning


@meaning(Quantize)
def quantize(op: Quantize, x: Tensor, global_scale: Tensor | None = None) -> Quantized:
    if global_scale is None:
        return codec.quantize(x, op.format)
    if global_scale.ndim == x.ndim:  # one row per token, several scales: encode it once for each
        x = x.unsqueeze(-2).expand(*global_scale.shape, x.shape[-1])
    return codec.quantize(x, op.format, global_scale)


@meaning(Dequantize)
def dequantize(op: Dequantize, x: Quantized) -> Tensor:
    return codec.dequantize(x, TORCH_DTYPES[op.out])


@meaning(Hadamard)
def hadamard(op: Hadamard, x: Tensor) -> Tensor:
    size = x.shape[-1]
    return round_once(x.to(torch.float64) @ sylvester(size) / size**0.5, x.dtype)


def sylvester(size: int) -> Tensor:
    """Hadamard matrix of a power-of-two size, entries ±1, symmetric, float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix
