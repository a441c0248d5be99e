"""Matrix products against float64 and against a block-by-block loop."""

from __future__ import annotations

import itertools

import pytest
import torch

from dsv4c.ir.ops.linear import ExpertLinear, GroupedLinear, Linear
from dsv4c.numerics.codec import Quantized, decode_data, decode_scale, dequantize, quantize
from dsv4c.reference import linear as linear_module
from dsv4c.reference import run
from dsv4c.types import (
    BF16,
    E4M3,
    F32,
    FP8_ROW,
    FP8_WEIGHT,
    KV_FP8,
    MXFP4,
    NVFP4,
    NVFP4_ROW,
    QuantFormat,
)


def naive_product(x: Quantized, w: Quantized, step: int) -> torch.Tensor:
    """One output at a time: exact dots, f32 scaling, f32 sums in order of K; before the global scales."""
    xs, ws = decode_data(x).double(), decode_data(w).double()
    total = torch.zeros(len(xs), len(ws))
    for n in range(len(xs)):
        for m in range(len(ws)):
            for k in range(0, xs.shape[1], step):
                dot = (xs[n, k : k + step] * ws[m, k : k + step]).sum().float()
                a = decode_scale(x.scale)[n, k // x.format.block[1]]
                b = decode_scale(w.scale)[m // w.format.block[0], k // w.format.block[1]]
                total[n, m] += dot * (a * b)
    return total


PAIRS = [
    (FP8_ROW, FP8_WEIGHT, 128),
    (FP8_ROW, MXFP4, 32),
    (FP8_ROW, NVFP4, 16),
    (NVFP4_ROW, NVFP4, 16),
    (NVFP4_ROW, MXFP4, 16),
    (MXFP4, FP8_WEIGHT, 32),
    (FP8_ROW, QuantFormat(E4M3, F32, (128, 128)), 128),
]


@pytest.mark.parametrize(("left", "right", "step"), PAIRS, ids=lambda v: str(v))
@pytest.mark.parametrize("width", [256, 208])
def test_quantized_product_block_by_block(
    left: QuantFormat, right: QuantFormat, step: int, width: int
) -> None:
    x, w = quantize(torch.randn(3, width) * 10, left), quantize(torch.randn(130, width), right)
    expected = naive_product(x, w, step)
    for scale in (None if x.global_scale is None else x.global_scale[:, None], w.global_scale):
        expected = expected if scale is None else expected * scale
    assert torch.equal(run(Linear(out=F32), x, w), expected)
    assert torch.equal(run(Linear(out=BF16), x, w), expected.to(torch.bfloat16))


def test_blocks_are_added_in_order_of_k(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum that depends on its order: 2^24 + 1 - 2^24 in f32 is 0, 2^24 - 2^24 + 1 is 1."""
    x = quantize(torch.tensor([[2.0**12, 1.0, -(2.0**12)]]).repeat_interleave(128, 1) / 128, FP8_ROW)
    w = quantize(torch.tensor([[2.0**12, 1.0, 2.0**12]]).repeat_interleave(128, 1), FP8_WEIGHT)
    assert run(Linear(out=F32), x, w).item() == 0.0
    monkeypatch.setattr(linear_module, "_CHUNK", 1)  # the number of blocks held at a time changes nothing
    assert run(Linear(out=F32), x, w).item() == 0.0


@pytest.mark.parametrize("out", [F32, BF16])
@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
def test_plain_product_rounds_once(out: object, lead: tuple[int, ...]) -> None:
    x, w = torch.randn(*lead, 300).to(torch.bfloat16), torch.randn(40, 300)
    y = run(Linear(out=out), x, w)
    exact = x.double() @ w.double().T
    assert torch.equal(y, exact.to(torch.float32).to(y.dtype))
    assert y.dtype == (torch.float32 if out is F32 else torch.bfloat16)


@pytest.mark.parametrize("format", [FP8_WEIGHT, MXFP4, NVFP4], ids=str)
def test_plain_activations_use_exact_weights(format: QuantFormat) -> None:
    x, w = torch.randn(4, 256).to(torch.bfloat16), quantize(torch.randn(150, 256), format)
    exact = x.double() @ dequantize(w, torch.float64).T
    assert torch.equal(run(Linear(out=F32), x, w), exact.to(torch.float32))


def test_leading_dimensions_of_quantized_activations() -> None:
    x, w = torch.randn(2, 3, 128), quantize(torch.randn(8, 128), NVFP4)
    for format in (FP8_ROW, NVFP4_ROW):
        rows = run(Linear(out=F32), quantize(x.reshape(6, 128), format), w)
        assert torch.equal(run(Linear(out=F32), quantize(x, format), w).reshape(6, 8), rows)
    per_matrix = quantize(x, NVFP4)
    expected = [run(Linear(out=F32), per_matrix.map(lambda p, i=i: p[i]), w) for i in range(2)]
    assert torch.equal(run(Linear(out=F32), per_matrix, w), torch.stack(expected))


def test_nan_weights_reach_their_outputs_only() -> None:
    x, w = quantize(torch.randn(2, 128), FP8_ROW), quantize(torch.randn(4, 128), MXFP4)
    w.scale[1, 2] = 255
    assert run(Linear(out=F32), x, w).isnan().tolist() == [[False, True, False, False]] * 2


def test_blocks_that_do_not_nest_are_refused() -> None:
    x = quantize(torch.randn(2, 96), QuantFormat(E4M3, F32, (1, 48)))
    with pytest.raises(ValueError, match="do not nest"):
        run(Linear(out=F32), x, quantize(torch.randn(4, 96), MXFP4))


@pytest.mark.parametrize(
    ("x_format", "w_format"),
    [(None, None), *itertools.product([None, FP8_ROW, NVFP4, NVFP4_ROW], [FP8_WEIGHT, NVFP4])],
    ids=str,
)
def test_grouped_linear_is_a_linear_per_group(
    x_format: QuantFormat | None, w_format: QuantFormat | None
) -> None:
    x, w = torch.randn(5, 3, 128), torch.randn(3, 40, 128)
    xq, wq = (
        x if x_format is None else quantize(x, x_format),
        w if w_format is None else quantize(w, w_format),
    )
    y = run(GroupedLinear(out=BF16), xq, wq)
    assert y.shape == (5, 3, 40)
    for group in range(3):
        if x_format == NVFP4:  # its global scale is per token here: as given to each row
            rows = quantize(x[:, group], NVFP4_ROW, xq.global_scale)
        else:
            rows = x[:, group] if x_format is None else quantize(x[:, group], x_format)
        weight = w[group] if w_format is None else quantize(w[group], w_format)
        assert torch.equal(y[:, group], run(Linear(out=BF16), rows, weight))


@pytest.mark.parametrize("x_format", [None, FP8_ROW, NVFP4_ROW], ids=str)
@pytest.mark.parametrize("per_slot", [False, True])
def test_expert_linear_is_a_linear_per_choice(x_format: QuantFormat | None, per_slot: bool) -> None:
    experts = torch.tensor([[3, 0], [1, 3], [0, 1], [3, -1]], dtype=torch.int32)
    x = torch.randn(4, 2, 64) if per_slot else torch.randn(4, 64)
    w = quantize(torch.randn(5, 24, 64), MXFP4)
    xq = x if x_format is None else quantize(x, x_format)
    y = run(ExpertLinear(out=BF16), xq, w, experts)
    assert y.shape == (4, 2, 24)
    for n in range(4):
        for j in range(2):
            row = x[n, j] if per_slot else x[n]
            row = row[None] if x_format is None else quantize(row[None], x_format)
            chosen = experts[n, j].item()
            if chosen < 0:
                assert torch.equal(y[n, j], torch.zeros(24, dtype=torch.bfloat16))
            else:
                weight = w.map(lambda part, e=chosen: part[e])
                assert torch.equal(y[n, j], run(Linear(out=BF16), row, weight)[0])


def test_expert_linear_reads_no_other_expert() -> None:
    w = quantize(torch.randn(5, 24, 64), NVFP4)
    for part in w.parts:
        part[[0, 2, 4]] = (
            torch.full((), float("nan")).to(part.dtype) if part.dtype is not torch.uint8 else 0x77
        )
    x = quantize(torch.randn(2, 64), FP8_ROW)
    assert run(ExpertLinear(out=F32), x, w, torch.tensor([[1], [3]], dtype=torch.int32)).isfinite().all()


def test_a_tail_multiplies_exactly() -> None:
    x, w = quantize(torch.randn(3, 128), KV_FP8), quantize(torch.randn(4, 128), KV_FP8)
    exact = dequantize(x, torch.float64) @ dequantize(w, torch.float64).T
    assert torch.equal(run(Linear(out=F32), x, w), exact.to(torch.float32))
