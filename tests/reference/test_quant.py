"""Quantize, Dequantize and Hadamard as ops; number formats are tested with the codec."""

from __future__ import annotations

import pytest
import torch

from dsv4c.ir.ops.quant import Dequantize, Hadamard, Quantize
from dsv4c.numerics.codec import quantize, round_once
from dsv4c.reference import run
from dsv4c.reference.quant import sylvester
from dsv4c.types import BF16, F32, FP8_ROW, NVFP4_ROW


def test_quantize_without_a_global_scale() -> None:
    x = torch.randn(3, 256).to(torch.bfloat16)
    q, expected = run(Quantize(format=FP8_ROW), x), quantize(x, FP8_ROW)
    assert torch.equal(q.data.float(), expected.data.float())
    assert torch.equal(q.scale, expected.scale)


def test_one_row_is_encoded_once_per_given_scale() -> None:
    x, scales = torch.randn(3, 64), torch.rand(3, 2) * 0.01 + 1e-3
    q = run(Quantize(format=NVFP4_ROW), x, scales)
    assert q.shape == (3, 2, 64)
    assert torch.equal(q.global_scale, scales)
    for slot in range(2):
        expected = quantize(x, NVFP4_ROW, scales[:, slot])
        assert torch.equal(q.data[:, slot], expected.data)
        assert torch.equal(q.scale[:, slot].float(), expected.scale.float())


def test_rows_that_have_a_scale_each() -> None:
    x, scales = torch.randn(3, 2, 64), torch.rand(3, 2) * 0.01 + 1e-3
    q = run(Quantize(format=NVFP4_ROW), x, scales)
    flat = quantize(x.reshape(6, 64), NVFP4_ROW, scales.reshape(6))
    assert torch.equal(q.data.reshape(6, 32), flat.data)


@pytest.mark.parametrize("out", [F32, BF16])
def test_dequantize(out: object) -> None:
    q = quantize(torch.randn(3, 64), NVFP4_ROW)
    exact = run(Dequantize(out=F32), q)
    assert exact.abs().max() > 1
    result = run(Dequantize(out=out), q)
    assert result.dtype == (torch.float32 if out is F32 else torch.bfloat16)
    torch.testing.assert_close(result.float(), exact, rtol=2**-8, atol=0)


@pytest.mark.parametrize("size", [1, 2, 128])
def test_hadamard_entries_are_parities(size: int) -> None:
    expected = [[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    assert sylvester(size).tolist() == expected


def test_hadamard_rounds_once_and_undoes_itself() -> None:
    x = torch.randn(4, 3, 128)
    once = run(Hadamard(), x)
    torch.testing.assert_close(run(Hadamard(), once), x, rtol=0, atol=1e-6)
    torch.testing.assert_close(once.norm(dim=-1), x.norm(dim=-1))
    low = x.to(torch.bfloat16)
    exact = low.double() @ sylvester(128) / 128**0.5
    assert torch.equal(run(Hadamard(), low), round_once(exact, torch.bfloat16))
