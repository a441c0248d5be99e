"""Elementwise arithmetic in f32 with one cast; transcendental functions are correctly rounded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsv4c.ir.ops.math import Add, Cast, Clamp, Mul, Scale, Shift, Sigmoid, Silu, SqrtSoftplus, Sum
from dsv4c.numerics.codec import TORCH_DTYPES, round_once
from dsv4c.reference.registry import meaning


@meaning(Add)
def add(op: Add, a: Tensor, b: Tensor) -> Tensor:
    common = torch.promote_types(a.dtype, b.dtype)  # torch itself ignores the type of a scalar tensor
    return a.to(common) + b.to(common)


@meaning(Mul)
def mul(op: Mul, a: Tensor, b: Tensor) -> Tensor:
    common = torch.promote_types(a.dtype, b.dtype)
    return a.to(common) * b.to(common)


@meaning(Scale)
def scale(op: Scale, x: Tensor) -> Tensor:
    return (x.to(torch.float32) * op.factor).to(x.dtype)


@meaning(Shift)
def shift(op: Shift, x: Tensor) -> Tensor:
    return (x.to(torch.float32) + op.offset).to(x.dtype)


@meaning(Clamp)
def clamp(op: Clamp, x: Tensor) -> Tensor:
    return x.clamp(op.low, op.high)


@meaning(Silu)
def silu(op: Silu, x: Tensor) -> Tensor:
    return _rounded(torch.nn.functional.silu, x)


@meaning(Sigmoid)
def sigmoid(op: Sigmoid, x: Tensor) -> Tensor:
    return _rounded(torch.sigmoid, x)


@meaning(SqrtSoftplus)
def sqrt_softplus(op: SqrtSoftplus, x: Tensor) -> Tensor:
    return _rounded(lambda wide: torch.nn.functional.softplus(wide).sqrt(), x)


def _rounded(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return round_once(function(x.to(torch.float64)), x.dtype)


@meaning(Cast)
def cast(op: Cast, x: Tensor) -> Tensor:
    return x.to(TORCH_DTYPES[op.to])


@meaning(Sum)
def sum_(op: Sum, x: Tensor) -> Tensor:
    return round_once(x.to(torch.float64).sum(op.axis), TORCH_DTYPES[op.out])
