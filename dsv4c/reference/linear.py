"""Matrix products: exact and rounded once, except between two quantized operands.

Those multiply in steps of the narrower block: dot products are exact within a step, rounded to f32, times the
product of both block scales, and added in f32 in order of K; global scales (x, then w) multiply the sum. This
is the two-level sum of `fp8_gemm` and `fp4_gemm` in DeepSeek-V4 `inference/kernel.py`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dsv4c.ir.ops.linear import ExpertLinear, GroupedLinear, Linear
from dsv4c.numerics.codec import (
    TORCH_DTYPES,
    Quantized,
    Value,
    decode_data,
    decode_scale,
    dequantize,
    round_once,
)
from dsv4c.reference.registry import meaning
from dsv4c.types import GlobalScale

_CHUNK = 1 << 22  # partial products held at a time


def product(x: Value, w: Value, out: torch.dtype) -> Tensor:
    """x[..., N, K] · w[..., M, K]ᵀ -> out[..., N, M], equal leading dimensions."""
    if isinstance(x, Quantized) and isinstance(w, Quantized) and not (x.format.tail or w.format.tail):
        return round_once(_block_product(x, w), out)
    return round_once(exact(x) @ exact(w).mT, out)


def exact(x: Value) -> Tensor:
    """The value in float64."""
    return dequantize(x, torch.float64) if isinstance(x, Quantized) else x.to(torch.float64)


def _block_product(x: Quantized, w: Quantized) -> Tensor:
    widths = x.format.block[1], w.format.block[1]
    step = min(widths)
    if max(widths) % step:
        raise ValueError(f"blocks of {x.format} and {w.format} do not nest")
    left, right = _steps(decode_data(x), step), _steps(decode_data(w), step)  # [..., steps, rows, step]
    left_scale, right_scale = _scales(x, left), _scales(w, right)  # [..., steps, rows]
    steps, rows, columns = left.shape[-3], left.shape[-2], right.shape[-2]
    total = torch.zeros(*left.shape[:-3], rows, columns)
    group = max(1, _CHUNK // max(1, total.numel()))
    for start in range(0, steps, group):
        some = slice(start, start + group)
        dots = left[..., some, :, :] @ right[..., some, :, :].mT
        scales = left_scale[..., some, :, None] * right_scale[..., some, None, :]
        for partial in (dots.to(torch.float32) * scales).unbind(-3):
            total += partial
    for scale in (_rows_of(x, x.global_scale), _rows_of(w, w.global_scale, columns=True)):
        total = total if scale is None else total * scale
    return total


def _steps(data: Tensor, step: int) -> Tensor:
    padded = torch.nn.functional.pad(data.to(torch.float64), (0, -data.shape[-1] % step))
    return padded.reshape(*data.shape[:-1], padded.shape[-1] // step, step).transpose(-3, -2)


def _scales(q: Quantized, steps: Tensor) -> Tensor:
    rows, columns = q.format.block
    scale = decode_scale(q.scale).repeat_interleave(rows, -2)[..., : steps.shape[-2], :]
    repeated = scale.repeat_interleave(columns // steps.shape[-1], -1)[..., : steps.shape[-3]]
    return repeated.transpose(-2, -1)


def _rows_of(q: Quantized, scale: Tensor | None, columns: bool = False) -> Tensor | None:
    """A global scale, shaped to multiply the rows (or columns) of a product."""
    if scale is None:
        return None
    if q.format.global_scale is GlobalScale.TENSOR:
        return scale[..., None, None]
    return scale[..., None, :] if columns else scale[..., None]


@meaning(Linear)
def linear(op: Linear, x: Value, w: Value) -> Tensor:
    return product(_as_matrix(x), w, TORCH_DTYPES[op.out]).reshape(*x.shape[:-1], w.shape[0])


@meaning(GroupedLinear)
def grouped_linear(op: GroupedLinear, x: Value, w: Value) -> Tensor:
    x = _row_wise(x)
    by_group = x.map(_swap_first) if isinstance(x, Quantized) else _swap_first(x)
    return _swap_first(product(by_group, w, TORCH_DTYPES[op.out]))


@meaning(ExpertLinear)
def expert_linear(op: ExpertLinear, x: Value, w: Value, experts: Tensor) -> Tensor:
    """Touches the weights of the chosen experts only; a negative expert gives zeros."""
    tokens, slots = experts.shape
    rows = _as_matrix(x)
    result = torch.zeros(tokens, slots, w.shape[1], dtype=TORCH_DTYPES[op.out])
    for expert in torch.unique(experts[experts >= 0]).tolist():
        token, slot = (experts == expert).nonzero(as_tuple=True)
        row = token if len(x.shape) == 2 else token * slots + slot
        result[token, slot] = product(_take(rows, row), _take(w, expert), TORCH_DTYPES[op.out])
    return result


def _row_wise(x: Value) -> Value:
    """The same value with its global scale, if any, given per row: every part then has the rows of x."""
    if not isinstance(x, Quantized) or x.format.global_scale is not GlobalScale.TENSOR:
        return x
    assert x.global_scale is not None
    format = replace(x.format, global_scale=GlobalScale.ROW)
    return x._replace(format=format, global_scale=x.global_scale[..., None].expand(x.shape[:-1]))


def _as_matrix(x: Value) -> Value:
    """All rows of an operand whose scales are row-wise: [..., K] to [N, K]."""
    x = _row_wise(x)
    if not isinstance(x, Quantized):
        return x.reshape(-1, x.shape[-1])
    global_scale = None if x.global_scale is None else x.global_scale.reshape(-1)
    data, scale = (part.reshape(-1, part.shape[-1]) for part in (x.data, x.scale))
    return x._replace(data=data, scale=scale, global_scale=global_scale)


def _swap_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1)


def _take(x: Value, index: int | Tensor) -> Value:
    return x.map(lambda part: part[index]) if isinstance(x, Quantized) else x[index]
