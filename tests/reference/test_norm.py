"""Normalizations against float64 and against the model's own bf16 steps."""

from __future__ import annotations

import pytest
import torch

from dsv4c.ir.ops.norm import Normalize, RmsNorm, RsqrtMeanSquare, Softmax
from dsv4c.reference import run
from dsv4c.types import BF16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_gain", [False, True])
def test_rms_norm(dtype: torch.dtype, with_gain: bool) -> None:
    x, gain = (torch.randn(7, 96) * 3).to(dtype), torch.randn(96).to(torch.bfloat16)
    y = run(RmsNorm(eps=1e-6), x, *([gain] if with_gain else []))
    wide = x.double()
    expected = (
        wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (gain.double() if with_gain else 1)
    )
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=2**-8 if dtype is torch.bfloat16 else 1e-6, atol=0)


def test_rms_norm_rounds_to_bf16_once() -> None:
    x, gain = torch.randn(64, 96).to(torch.bfloat16), torch.randn(96)
    f32 = run(RmsNorm(eps=1e-6), x.float(), gain)
    assert torch.equal(run(RmsNorm(eps=1e-6), x, gain), f32.to(torch.bfloat16))


def test_rms_norm_in_bf16_steps() -> None:
    q = (torch.randn(5, 4, 512) * 2).to(torch.bfloat16)
    mean = q.square().mean(-1, keepdim=True) + 1e-6
    root = torch.rsqrt(mean.float()).to(torch.bfloat16)  # rounded once, as a GPU does; a CPU may not
    official = q * root
    y = run(RmsNorm(eps=1e-6, precision=BF16), q)
    assert torch.equal(y, official)
    assert not torch.equal(y, run(RmsNorm(eps=1e-6), q))


def test_rms_norm_of_zeros_is_zero() -> None:
    for op in (RmsNorm(eps=1e-6), RmsNorm(eps=1e-6, precision=BF16)):
        assert torch.equal(
            run(op, torch.zeros(2, 8).to(torch.bfloat16)), torch.zeros(2, 8).to(torch.bfloat16)
        )


def test_rsqrt_mean_square() -> None:
    x = torch.randn(3, 2, 40).to(torch.bfloat16)
    y = run(RsqrtMeanSquare(eps=1e-3), x)
    assert y.shape == (3, 2, 1)
    assert y.dtype is torch.float32
    torch.testing.assert_close(
        y.double(), (x.double().square().mean(-1, keepdim=True) + 1e-3).rsqrt(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_normalize(axis: int) -> None:
    x = torch.rand(3, 4, 4)
    wide = x.double()
    y = run(Normalize(axis=axis, eps=0.5), x)
    torch.testing.assert_close(y.double(), wide / (wide.sum(axis, keepdim=True) + 0.5), rtol=1e-6, atol=0)


@pytest.mark.parametrize("axis", [1, -1])
def test_softmax(axis: int) -> None:
    x = torch.randn(2, 4, 5) * 50
    y = run(Softmax(axis=axis), x)
    wide = x.double()
    expected = (wide - wide.amax(axis, keepdim=True)).exp()
    torch.testing.assert_close(y.double(), expected / expected.sum(axis, keepdim=True), rtol=1e-6, atol=1e-45)
    assert y.dtype is torch.float32
