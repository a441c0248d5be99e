"""Meanings against the recorded outputs of the official kernels."""

from __future__ import annotations

import pytest
import torch

from dsv4c.ir.ops.attention import AttentionScores, AttentionValues, Gather, SinkSoftmax
from dsv4c.ir.ops.linear import ExpertLinear, Linear
from dsv4c.ir.ops.math import Add, Mul, Scale, Shift, Sigmoid, SqrtSoftplus
from dsv4c.ir.ops.norm import Normalize, Softmax
from dsv4c.ir.ops.quant import Dequantize, Hadamard, Quantize
from dsv4c.ir.ops.rope import Rope, RopeFrequencies
from dsv4c.numerics.codec import Quantized, quantize
from dsv4c.reference import run
from dsv4c.types import BF16, E4M3, FP8_ROW, FP8_WEIGHT, MXFP4, NVFP4, NVFP4_ROW, UE8M0, QuantFormat

Kernels = dict[str, torch.Tensor]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative L2 distance."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8)


def nvfp4_weight(kernels: Kernels) -> Quantized:
    scale_2 = kernels["nvfp4.weight_scale_2"]
    return Quantized(NVFP4, kernels["nvfp4.w"], kernels["nvfp4.weight_scale"], global_scale=scale_2)


@pytest.mark.parametrize(("name", "format"), [("fp8_gemm", FP8_WEIGHT), ("fp4_gemm", MXFP4)])
def test_linear_is_bit_equal(kernels: Kernels, name: str, format: QuantFormat) -> None:
    w = kernels[f"{name}.w"]
    w = as_bytes(w) if format == MXFP4 else w
    x = run(Quantize(format=FP8_ROW), kernels["act_quant.x"])
    y = run(Linear(out=BF16), x, Quantized(format, w, as_bytes(kernels[f"{name}.w_scale"])))
    assert torch.equal(y, kernels[f"{name}.y"])


def test_nvfp4_weights_with_fp8_activations_are_bit_equal(kernels: Kernels) -> None:
    x = run(Quantize(format=FP8_ROW), kernels["nvfp4.x"])
    assert torch.equal(run(Linear(out=BF16), x, nvfp4_weight(kernels)), kernels["nvfp4.y_w4a8"])


def test_nvfp4_weights_with_nvfp4_activations_are_bit_equal(kernels: Kernels) -> None:
    x = run(Quantize(format=NVFP4_ROW), kernels["nvfp4.x"], kernels["nvfp4.input_scale"].expand(16, 1))
    assert torch.equal(as_bytes(x.data[:, 0]), kernels["nvfp4.x_q"])
    w = nvfp4_weight(kernels).map(lambda part: part[None])
    y = run(ExpertLinear(out=BF16), x, w, torch.zeros(16, 1, dtype=torch.int32))
    assert torch.equal(y[:, 0], kernels["nvfp4.y_w4a4"])


def test_a_static_scale_per_tensor_means_the_same_as_per_row(kernels: Kernels) -> None:
    x = quantize(kernels["nvfp4.x"], NVFP4, kernels["nvfp4.input_scale"])
    assert torch.equal(run(Linear(out=BF16), x, nvfp4_weight(kernels)), kernels["nvfp4.y_w4a4"])


@pytest.mark.parametrize(
    ("name", "format"), [("kv_sim", QuantFormat(E4M3, UE8M0, (1, 64))), ("fp4_sim", MXFP4)]
)
def test_simulated_quantization(kernels: Kernels, name: str, format: QuantFormat) -> None:
    y = run(Dequantize(out=BF16), run(Quantize(format=format), kernels[f"{name}.x"]))
    assert torch.equal(as_bytes(y), as_bytes(kernels[f"{name}.y"]))


def test_hadamard(kernels: Kernels) -> None:
    assert torch.equal(run(Hadamard(), kernels["hadamard.x"]), kernels["hadamard.y"])


def test_router_scores(kernels: Kernels) -> None:
    y = run(SqrtSoftplus(), kernels["sqrtsoftplus.x"])
    torch.testing.assert_close(y, kernels["sqrtsoftplus.y"], rtol=2e-6, atol=0)


TABLES = {
    "main": RopeFrequencies(10000.0, 64, 1.0, 65536, 32.0, 1.0),
    "compress": RopeFrequencies(160000.0, 64, 16.0, 65536, 32.0, 1.0),
}


@pytest.mark.parametrize("table", TABLES)
def test_rope_up_to_a_million_positions(kernels: Kernels, table: str) -> None:
    frequencies = run(TABLES[table])
    assert kernels["rope.pos"].max() > 1_000_000
    for op, name in ((Rope(), "y"), (Rope(inverse=True), "y_inverse")):
        y = run(op, kernels["rope.x"], kernels["rope.pos"], frequencies)
        torch.testing.assert_close(y, kernels[f"rope.{table}.{name}"], rtol=2e-6, atol=1e-7)
    # cos and sin themselves are what rotating (1, 0) gives
    unit = torch.tensor([1.0, 0.0]).repeat(len(kernels["rope.pos"]), 32)
    turned = run(Rope(), unit, kernels["rope.pos"], frequencies)
    torch.testing.assert_close(turned[:, 0::2], kernels[f"rope.{table}.cos"], rtol=2e-6, atol=0)
    torch.testing.assert_close(turned[:, 1::2], kernels[f"rope.{table}.sin"], rtol=2e-6, atol=0)


def test_sparse_attention(kernels: Kernels) -> None:
    cache, index = kernels["sparse_attn.kv"][None], kernels["sparse_attn.idx"]
    keys = run(Gather(), cache, index, torch.zeros(len(index), dtype=torch.int32))
    scores = run(AttentionScores(scale=512**-0.5), kernels["sparse_attn.q"], keys, index)
    p, denominator = run(SinkSoftmax(out=BF16), scores, kernels["sparse_attn.sink"])
    o = run(AttentionValues(), p, denominator, keys)
    assert distance(o, kernels["sparse_attn.o"]) < 0.0025
    # The recorded kernel sums probabilities before rounding them: summing after fits worse.
    sink = (kernels["sparse_attn.sink"] - scores.amax(-1)).exp()
    after = run(AttentionValues(), p, p.float().sum(-1) + sink, keys)
    assert distance(o, kernels["sparse_attn.o"]) < distance(after, kernels["sparse_attn.o"])


def test_sinkhorn(kernels: Kernels) -> None:
    mixes, scale, base = (kernels[f"sinkhorn.{n}"] for n in ("mixes", "scale", "base"))

    def affine(columns: slice, which: int) -> torch.Tensor:
        return run(Add(), run(Mul(), mixes[:, columns], scale[which]), base[columns])

    pre = run(Shift(offset=1e-6), run(Sigmoid(), affine(slice(0, 4), 0)))
    post = run(Scale(factor=2.0), run(Sigmoid(), affine(slice(4, 8), 1)))
    comb = run(Shift(offset=1e-6), run(Softmax(axis=2), affine(slice(8, 24), 2).reshape(-1, 4, 4)))
    comb = run(Normalize(axis=1, eps=1e-6), comb)
    for _ in range(19):
        comb = run(Normalize(axis=1, eps=1e-6), run(Normalize(axis=2, eps=1e-6), comb))
    for name, value in (("pre", pre), ("post", post), ("comb", comb)):
        torch.testing.assert_close(value, kernels[f"sinkhorn.{name}"], rtol=2e-6, atol=0)
