"""Elementwise arithmetic: result types, rounding, and the ends of the range."""

from __future__ import annotations

import math

import pytest
import torch

from dsv4c.ir.op import Op
from dsv4c.ir.ops.math import Add, Cast, Clamp, Mul, Scale, Shift, Sigmoid, Silu, SqrtSoftplus, Sum
from dsv4c.reference import run
from dsv4c.types import BF16, F32, I32


def bf16(*values: float) -> torch.Tensor:
    return torch.tensor(values).to(torch.bfloat16)


@pytest.mark.parametrize(("op", "function"), [(Add(), torch.add), (Mul(), torch.mul)])
def test_arithmetic_rounds_once_to_the_common_type(op: Op, function: object) -> None:
    a, b = torch.randn(4, 1, 64), torch.randn(3, 64)
    for x, y in (
        (a, b),
        (a.to(torch.bfloat16), b),
        (a, b.to(torch.bfloat16)),
        (a.to(torch.bfloat16), b.to(torch.bfloat16)),
    ):
        result = run(op, x, y)
        dtype = torch.bfloat16 if x.dtype == y.dtype == torch.bfloat16 else torch.float32
        assert result.shape == (4, 3, 64)
        assert torch.equal(result, function(x.double(), y.double()).to(torch.float32).to(dtype))


def test_a_scalar_tensor_has_a_type_too() -> None:
    assert run(Mul(), bf16(1.0, 2.0), torch.tensor(1.001)).dtype is torch.float32
    assert run(Add(), torch.tensor(1.001), bf16(1.0)).dtype is torch.float32


def test_scale_shift_clamp_keep_the_type() -> None:
    x = bf16(-3.0, 0.1, 7.0)
    assert torch.equal(run(Scale(factor=0.3), x), (x.float() * 0.3).to(torch.bfloat16))
    assert torch.equal(run(Shift(offset=0.3), x), (x.float() + 0.3).to(torch.bfloat16))
    assert run(Clamp(low=None, high=5.0), x).tolist() == [-3.0, x[1].item(), 5.0]
    assert run(Clamp(low=-1.0, high=None), x).tolist() == [-1.0, x[1].item(), 7.0]
    assert run(Clamp(low=-1.0, high=1.0), x.float()).tolist() == [-1.0, x[1].item(), 1.0]
    assert run(Clamp(low=-1.0, high=1.0), torch.tensor([math.nan])).isnan().all()


@pytest.mark.parametrize(
    ("op", "function"),
    [
        (Silu(), lambda v: v / (1 + math.exp(-v))),
        (Sigmoid(), lambda v: 1 / (1 + math.exp(-v))),
        (SqrtSoftplus(), lambda v: math.sqrt(v if v > 20 else math.log1p(math.exp(v)))),
    ],
    ids=["silu", "sigmoid", "sqrt_softplus"],
)
def test_transcendental_functions(op: Op, function: object) -> None:
    x = torch.tensor([-80.0, -20.0, -1.0, -0.0, 0.0, 1e-6, 0.5, 3.0, 19.9, 20.0, 20.1, 80.0, 1e4])
    expected = torch.tensor([function(v) for v in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(run(op, x).double(), expected, rtol=1e-7, atol=0)
    low = x.to(torch.bfloat16)
    expected = torch.tensor([function(v) for v in low.tolist()], dtype=torch.float64)
    assert torch.equal(run(op, low), expected.to(torch.float32).to(torch.bfloat16))


def test_softplus_is_linear_above_20() -> None:
    x = torch.tensor([20.5, 100.0, 1e30])
    assert torch.equal(run(SqrtSoftplus(), x), x.double().sqrt().float())


def test_cast() -> None:
    x = torch.tensor([1.0, 1 + 2.0**-9, -(1 + 3 * 2.0**-8)])
    assert run(Cast(to=BF16), x).tolist() == [1.0, 1.0, -(1 + 2 * 2.0**-7)]
    assert run(Cast(to=F32), bf16(1.5)).dtype is torch.float32
    assert run(Cast(to=I32), torch.tensor([7, -1])).dtype is torch.int32


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_sum_rounds_once(axis: int) -> None:
    x = torch.randn(5, 6, 7).to(torch.bfloat16)
    assert torch.equal(run(Sum(axis=axis, out=F32), x), x.double().sum(axis).float())
    assert torch.equal(run(Sum(axis=axis, out=BF16), x), x.double().sum(axis).float().to(torch.bfloat16))
    cancelling = torch.tensor([[2.0**24, 1.0, -(2.0**24)]])
    assert run(Sum(axis=1, out=F32), cancelling).tolist() == [1.0]
