"""Meanings composed into one CSA attention and one MoE sublayer, on recorded inputs of the official model.

Everything but the attention itself is bit-equal. The official kernel takes a running maximum over blocks
of 64 keys there, which moves some bf16 roundings: `sublayer_with_recorded_input_rel_l2` in the case.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from dsv4c.ir.ops.attention import AttentionScores, AttentionValues, Gather, SinkSoftmax, WindowIndex
from dsv4c.ir.ops.compress import CompletedEntries, CompressPool
from dsv4c.ir.ops.index import IndexScores, TopK
from dsv4c.ir.ops.linear import ExpertLinear, GroupedLinear, Linear
from dsv4c.ir.ops.math import Add, Cast, Clamp, Mul, Scale, Silu, SqrtSoftplus, Sum
from dsv4c.ir.ops.moe import TakeAlong
from dsv4c.ir.ops.norm import Normalize, RmsNorm
from dsv4c.ir.ops.quant import Dequantize, Hadamard, Quantize
from dsv4c.ir.ops.rope import Rope, RopeFrequencies
from dsv4c.ir.ops.state import CacheWrite
from dsv4c.numerics.codec import Quantized, nan_fill
from dsv4c.reference import run
from dsv4c.types import BF16, F32, FP8_ROW, FP8_WEIGHT, KV_FP8, MXFP4
from tests.goldens import golden_case

TOKENS, HEADS, WINDOW, TOP_K, EPS = 150, 4, 128, 6, 1e-6
POSITIONS = torch.arange(TOKENS, dtype=torch.int32)
LAYER = 1  # CSA, learned router


class Recorded:
    """Weights of the layer and its recorded tensors."""

    def __init__(self) -> None:
        folder = golden_case("official-quant")
        self.weights = load_file(folder / "model.safetensors")
        self.expected = load_file(folder / "expected.safetensors")
        self.probe_rows = json.loads((folder / "case.json").read_text())["probe_rows"]

    def weight(self, name: str) -> torch.Tensor:
        name = f"layers.{LAYER}.{name}"
        return self.weights[name] if name in self.weights else self.weights[f"{name}.weight"]

    def fp8(self, name: str) -> Quantized:
        return Quantized(FP8_WEIGHT, self.weight(name), self.weight(f"{name}.scale").view(torch.uint8))

    def experts(self, name: str) -> Quantized:
        data = [self.weight(f"ffn.experts.{e}.{name}").view(torch.uint8) for e in range(8)]
        scale = [self.weight(f"ffn.experts.{e}.{name}.scale").view(torch.uint8) for e in range(8)]
        return Quantized(MXFP4, torch.stack(data), torch.stack(scale))

    def compare(self, name: str, value: torch.Tensor) -> float:
        """Relative L2 distance from the recorded prefill tensor."""
        expected = self.expected[f"prefill.{LAYER}.{name}"].double()
        value = value if len(value) == len(expected) else value[self.probe_rows]
        assert value.shape == expected.shape
        return float((value.double() - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    return Recorded()


def fp8_linear(x: torch.Tensor, w: Quantized) -> torch.Tensor:
    return run(Linear(out=BF16), run(Quantize(format=FP8_ROW), x), w)


def bf16(q: Quantized) -> torch.Tensor:
    return run(Dequantize(out=BF16), q)


def zeros(index: torch.Tensor) -> torch.Tensor:
    """Slot 0 for every row of `index`."""
    return torch.zeros(len(index), dtype=torch.int32)


def poisoned_cache(rows: Quantized, slots: int, index: torch.Tensor) -> Quantized:
    """A one-sequence cache full of NaN, with `rows` written to `index`."""
    cache = rows.map(lambda part: torch.empty(1, slots, *part.shape[1:], dtype=part.dtype))
    nan_fill(cache)
    return run(CacheWrite(), cache, rows, index, zeros(index))


def compressor(
    recorded: Recorded, name: str, x: torch.Tensor, frequencies: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Compressed rows after norm and rope, and the entries they belong to."""
    kv = run(Linear(out=F32), x, recorded.weight(f"{name}.wkv"))
    score = run(Linear(out=F32), x, recorded.weight(f"{name}.wgate"))
    score = run(Add(), score, recorded.weight(f"{name}.ape")[POSITIONS % 4])
    rings = [torch.full((1, 156, kv.shape[1]), torch.nan) for _ in range(2)]
    slots = zeros(POSITIONS)
    rings = [run(CacheWrite(), r, rows, POSITIONS, slots) for r, rows in zip(rings, (kv, score), strict=True)]
    entries, slots = run(CompletedEntries(ratio=4, tokens=len(POSITIONS)), POSITIONS, slots)
    pool = CompressPool(ratio=4, overlap=True, tokens=len(POSITIONS))
    pooled = run(Cast(to=BF16), run(pool, *rings, entries, slots))
    normed = run(RmsNorm(eps=EPS), pooled, recorded.weight(f"{name}.norm"))
    return run(Rope(stride=4), normed, entries, frequencies), entries


def test_compressed_sparse_attention(recorded: Recorded) -> None:
    x, weight, fp8 = recorded.expected[f"prefill.{LAYER}.attn_in"], recorded.weight, recorded.fp8
    frequencies = run(RopeFrequencies(160000.0, 64, 16.0, 65536, 32.0, 1.0))

    qr = run(RmsNorm(eps=EPS), fp8_linear(x, fp8("attn.wq_a")), weight("attn.q_norm"))
    q = fp8_linear(qr, fp8("attn.wq_b")).reshape(TOKENS, HEADS, 512)
    q = run(Rope(), run(RmsNorm(eps=EPS, precision=BF16), q), POSITIONS, frequencies)
    kv = run(RmsNorm(eps=EPS), fp8_linear(x, fp8("attn.wkv")), weight("attn.kv_norm"))
    kv = run(Quantize(format=KV_FP8), run(Rope(), kv, POSITIONS, frequencies))
    assert recorded.compare("qr", qr) == recorded.compare("kv", bf16(kv)) == 0

    pooled, which = compressor(recorded, "attn.compressor", x, frequencies)
    entries = run(Quantize(format=KV_FP8), pooled)
    pooled, _ = compressor(recorded, "attn.indexer.compressor", x, frequencies)
    keys = run(Quantize(format=MXFP4), run(Hadamard(), pooled))
    assert (
        recorded.compare("entries", bf16(entries)[:37])
        == recorded.compare("index_keys", bf16(keys)[:37])
        == 0
    )

    index_q = fp8_linear(qr, fp8("attn.indexer.wq_b")).reshape(TOKENS, 32, 128)
    index_q = run(Quantize(format=MXFP4), run(Hadamard(), run(Rope(), index_q, POSITIONS, frequencies)))
    index_w = run(Linear(out=BF16), x, weight("attn.indexer.weights_proj"))
    index_w = run(Scale(factor=128**-0.5 * 32**-0.5), index_w)
    assert recorded.compare("index_q", bf16(index_q)) == recorded.compare("index_w", index_w) == 0
    slots = zeros(POSITIONS)
    scores = run(IndexScores(ratio=4), index_q, poisoned_cache(keys, 40, which), index_w, POSITIONS, slots)
    selected = run(TopK(k=TOP_K), scores)
    assert torch.equal(scores[:, :37], recorded.expected[f"prefill.{LAYER}.index_scores"])
    assert torch.equal(selected, recorded.expected[f"prefill.{LAYER}.index_sel"])

    window = run(WindowIndex(window=WINDOW), POSITIONS)
    gathered = [
        bf16(run(Gather(), poisoned_cache(kv, 320, POSITIONS), window, slots)),
        bf16(run(Gather(), poisoned_cache(entries, 40, which), selected, slots)),
    ]
    attended, index = torch.cat(gathered, 1), torch.cat([window, selected], 1)
    logits = run(AttentionScores(scale=512**-0.5), q, attended, index)
    p, denominator = run(SinkSoftmax(out=BF16), logits, weight("attn.attn_sink"))
    o = run(AttentionValues(), p, denominator, attended)
    grouped = run(Rope(inverse=True), o, POSITIONS, frequencies).reshape(TOKENS, 2, 1024)
    wo_a = run(Dequantize(out=BF16), fp8("attn.wo_a")).reshape(2, 128, 1024)
    z = run(GroupedLinear(out=BF16), grouped, wo_a).reshape(TOKENS, 256)
    assert recorded.compare("z", z) < 0.0029
    assert recorded.compare("attn_out", fp8_linear(z, fp8("attn.wo_b"))) < 0.012


def test_mixture_of_experts(recorded: Recorded) -> None:
    x, limit = recorded.expected[f"prefill.{LAYER}.ffn_in"], 1.0
    affinity = run(SqrtSoftplus(), run(Linear(out=F32), x, recorded.weight("ffn.gate")))
    chosen = run(TopK(k=2), run(Add(), affinity, recorded.weight("ffn.gate.bias")))
    weights = run(Scale(factor=1.5), run(Normalize(axis=-1, eps=0.0), run(TakeAlong(), affinity, chosen)))
    recorded_chosen = recorded.expected[f"prefill.{LAYER}.router_idx"]
    recorded_chosen = (
        recorded_chosen[recorded.probe_rows] if len(recorded_chosen) != len(x) else recorded_chosen
    )
    assert torch.equal(chosen, recorded_chosen.sort(1).values)

    def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate = run(Silu(), run(Clamp(low=None, high=limit), gate.float()))
        return run(Mul(), gate, run(Clamp(low=-limit, high=limit), up.float()))

    xq = run(Quantize(format=FP8_ROW), x)
    w1, w2, w3 = (recorded.experts(n) for n in ("w1", "w2", "w3"))
    hidden = swiglu(*(run(ExpertLinear(out=BF16), xq, w, chosen) for w in (w1, w3)))
    hidden = run(Cast(to=BF16), run(Mul(), hidden, weights[..., None]))
    routed = run(ExpertLinear(out=BF16), run(Quantize(format=FP8_ROW), hidden), w2, chosen)
    shared = swiglu(*(fp8_linear(x, recorded.fp8(f"ffn.shared_experts.{n}")) for n in ("w1", "w3")))
    shared = fp8_linear(run(Cast(to=BF16), shared), recorded.fp8("ffn.shared_experts.w2"))
    y = run(Cast(to=BF16), run(Add(), run(Sum(axis=1, out=F32), routed), shared))
    assert recorded.compare("ffn_out", y) == 0
