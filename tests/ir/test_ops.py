"""Type rules of every primitive, what they refuse and how they say so, and costs."""

from __future__ import annotations

import itertools
import re

import pytest

import dsv4c.ir.ops  # noqa: F401  (declares them)
from dsv4c.errors import GraphError
from dsv4c.ir.op import OPS, Cost, Op
from dsv4c.ir.text import make_op
from dsv4c.types import KV_FP8, DType, QuantType, Type, parse_type

FP8, W8, MX = "q[e4m3,ue8m0,1x128]", "q[e4m3,ue8m0,128x128]", "q[e2m1,ue8m0,1x32]"
NV, NVROW = "q[e2m1,e4m3,1x16,tensor]", "q[e2m1,e4m3,1x16,row]"
KV = "q[e4m3,ue8m0,1x64,tail=64]"
ROPE = "theta=10000.0, dims=64, factor=1.0, original_max_position=65536, beta_fast=32.0, beta_slow=1.0"


def op_of(text: str) -> Op:
    """`rms_norm {eps=1e-06}` as an op."""
    name, _, attributes = text.partition(" {")
    return make_op(name, attributes.removesuffix("}"))


def types(text: str) -> tuple[Type, ...]:
    return tuple(parse_type(t) for t in text.split())


RULES = [  # op, operands, results
    ("linear {out=bf16}", "bf16[2,3,256] bf16[64,256]", "bf16[2,3,64]"),
    ("linear {out=f32}", "f32[1,256] f32[64,256]", "f32[1,64]"),
    ("linear {out=bf16}", f"{FP8}[1,256] {W8}[128,256]", "bf16[1,128]"),
    ("linear {out=bf16}", f"{FP8}[1,256] {MX}[128,256]", "bf16[1,128]"),
    ("linear {out=bf16}", f"bf16[1,256] {W8}[128,256]", "bf16[1,128]"),
    ("linear {out=bf16}", f"{NVROW}[1,256] {NV}[128,256]", "bf16[1,128]"),
    ("grouped_linear {out=bf16}", f"bf16[3,8,256] {W8}[8,128,256]", "bf16[3,8,128]"),
    ("all_reduce {ranks=2, out=bf16}", "f32[3,64]", "bf16[3,64]"),
    ("all_gather {axis=1, ranks=4}", "bf16[3,64]", "bf16[3,256]"),
    ("expert_linear {out=bf16}", f"{FP8}[3,256] {MX}[16,64,256] i32[3,6]", "bf16[3,6,64]"),
    ("expert_linear {out=bf16}", f"{NVROW}[3,6,256] {NV}[16,64,256] i32[3,6]", "bf16[3,6,64]"),
    ("rms_norm {eps=1e-06}", "bf16[2,8] bf16[8]", "bf16[2,8]"),
    ("rms_norm {eps=1e-06}", "f32[2,4,8]", "f32[2,4,8]"),
    ("rms_norm {eps=1e-06, precision=bf16}", "bf16[2,4,8]", "bf16[2,4,8]"),
    ("rsqrt_mean_square {eps=1e-06}", "bf16[2,4,8]", "f32[2,4,1]"),
    ("normalize {axis=-2, eps=1e-06}", "f32[2,4,4]", "f32[2,4,4]"),
    ("softmax {axis=-1}", "f32[2,4,4]", "f32[2,4,4]"),
    (f"rope_frequencies {{{ROPE}}}", "", "f32[32]"),
    ("rope {inverse=true}", "bf16[3,4,128] i32[3] f32[32]", "bf16[3,4,128]"),
    (f"quantize {{format={FP8}}}", "bf16[2,256]", f"{FP8}[2,256]"),
    (f"quantize {{format={KV}}}", "bf16[2,512]", f"{KV}[2,512]"),
    (f"quantize {{format={NVROW}}}", "bf16[3,64] f32[3,6]", f"{NVROW}[3,6,64]"),
    (f"quantize {{format={NVROW}}}", "bf16[3,6,64] f32[3,6]", f"{NVROW}[3,6,64]"),
    ("dequantize {out=bf16}", f"{KV}[2,512]", "bf16[2,512]"),
    ("hadamard", "bf16[3,64,128]", "bf16[3,64,128]"),
    ("window_index {window=128}", "i32[3]", "i32[3,128]"),
    ("visible_entries {ratio=4, capacity=32}", "i32[3]", "i32[3,32]"),
    ("gather", f"{KV}[2,192,512] i32[6,128] i32[6]", f"{KV}[6,128,512]"),
    ("attention_scores {scale=0.5}", "bf16[3,4,64] bf16[3,10,64] i32[3,10]", "f32[3,4,10]"),
    ("sink_softmax {out=bf16}", "f32[3,4,10] f32[4]", "bf16[3,4,10] f32[3,4]"),
    ("attention_values", "bf16[3,4,10] f32[3,4] bf16[3,10,64]", "bf16[3,4,64]"),
    ("completed_entries {ratio=4, tokens=7}", "i32[14] i32[14]", "i32[4] i32[4]"),
    ("compress_pool {ratio=4, overlap=true, tokens=2}", "f32[2,8,64] f32[2,8,64] i32[2] i32[2]", "f32[2,32]"),
    (
        "compress_pool {ratio=4, overlap=false, tokens=9}",
        "f32[2,4,64] f32[2,4,64] i32[6] i32[6]",
        "f32[6,64]",
    ),
    ("add_position_bias", "f32[3,64] f32[4,64] i32[3]", "f32[3,64]"),
    ("cache_write", f"{KV}[2,192,512] {KV}[6,512] i32[6] i32[6]", f"{KV}[2,192,512]"),
    (
        "cache_extend {capacity=256, tokens=2}",
        f"{KV}[2,192,512] {KV}[6,512] i32[6] i32[6]",
        f"{KV}[3,256,512]",
    ),
    ("positions {tokens=5}", "i32[4] i32[2] i32[2]", "i32[10] i32[10]"),
    ("owners {tokens=5}", "i32[2]", "i32[10]"),
    ("advance", "i32[4] i32[2] i32[2]", "i32[4]"),
    ("index_scores {ratio=4}", f"{MX}[3,8,128] {MX}[2,32,128] bf16[3,8] i32[3] i32[3]", "bf16[3,32]"),
    ("top_k {k=8}", "f32[3,32]", "i32[3,8]"),
    ("top_k {k=64}", "f32[3,32]", "i32[3,32]"),
    ("add", "bf16[3,1,8] bf16[4,1]", "bf16[3,4,8]"),
    ("add", "bf16[3] f32[3]", "f32[3]"),
    ("mul", "f32[3,8] f32[1]", "f32[3,8]"),
    ("scale {factor=2.0}", "bf16[3]", "bf16[3]"),
    ("shift {offset=1e-06}", "f32[3]", "f32[3]"),
    ("clamp {low=none, high=10.0}", "f32[3]", "f32[3]"),
    ("silu", "f32[3]", "f32[3]"),
    ("sigmoid", "f32[3]", "f32[3]"),
    ("sqrt_softplus", "f32[3]", "f32[3]"),
    ("cast {to=bf16}", "f32[3]", "bf16[3]"),
    ("sum {axis=-2, out=f32}", "bf16[3,6,8]", "f32[3,8]"),
    ("reshape {shape=(3,8)}", "bf16[24]", "bf16[3,8]"),
    ("slice {axis=-1, start=2, stop=5}", "f32[3,8]", "f32[3,3]"),
    ("concat {axis=1}", "bf16[3,2,8] bf16[3,5,8] bf16[3,1,8]", "bf16[3,8,8]"),
    ("concat {axis=0}", f"{KV}[3,2,512] {KV}[1,2,512]", f"{KV}[4,2,512]"),
    ("expand_streams {streams=4}", "bf16[3,8]", "bf16[3,4,8]"),
    ("collapse_streams {out=bf16}", "bf16[3,4,8] f32[3,4]", "bf16[3,8]"),
    ("mix_streams", "bf16[3,4,8] f32[3,4,4]", "f32[3,4,8]"),
    ("spread_streams", "bf16[3,8] f32[3,4]", "f32[3,4,8]"),
    ("embedding", "bf16[100,8] i32[3]", "bf16[3,8]"),
    ("embedding", "i32[100,6] i32[3]", "i32[3,6]"),
    ("take_along", "f32[3,16] i32[3,6]", "f32[3,6]"),
    ("take_along", "f32[16] i32[3,6]", "f32[3,6]"),
    ("last_rows", "bf16[6,100] i32[2]", "bf16[2,100]"),
    ("argmax", "f32[3,100]", "i32[3]"),
    ("penalize", "f32[3,100] i32[4,64] i32[3] i32[3] i32[4] f32[4,7]", "f32[3,100]"),
    ("token_probabilities", "f32[3,100] i32[3] f32[4,7]", "f32[3,100]"),
    ("draw", "f32[3,100] i32[3] i32[3] i32[4] i32[4,2]", "i32[3]"),
    ("emit", "i32[3] i32[3] i32[3] i32[4,8]", "i32[3] i32[3]"),
    ("preceding", "bf16[4,16,64] bf16[3,64] i32[3] i32[3]", "bf16[3,64] i32[3]"),
    (
        "draft_rows {block=5, offset=0, noise=7}",
        "i32[2] i32[2] i32[2] i32[4]",
        "i32[10] i32[10] i32[10] i32[10]",
    ),
    ("candidates", "i32[2] i32[6] i32[2]", "i32[8] i32[2]"),
    ("trusted", "i32[2] f32[6,1] i32[2] f32[4]", "i32[2]"),
    ("present", "f32[3,6] i32[3]", "f32[3,6]"),
    ("accept", "i32[8] i32[8] i32[2]", "i32[8] i32[2] i32[2]"),
    ("stop", "i32[8] i32[8] i32[2] i32[2] i32[4,8]", "i32[8] i32[2] i32[2] i32[2]"),
]


def primitives() -> set[str]:
    return {name for name, op in OPS.items() if op.__module__.startswith("dsv4c.ir.ops.")}


@pytest.mark.parametrize(("op", "operands", "results"), RULES)
def test_type_rule(op: str, operands: str, results: str) -> None:
    assert op_of(op).results(types(operands)) == types(results)


REFUSALS = [  # op, operands, what the message says
    (
        "linear {out=bf16}",
        "bf16[1,256] bf16[64,128]",
        "x bf16[1,256] does not fit w bf16[64,128]: 256 != 128",
    ),
    ("linear {out=bf16}", "bf16[1,256] bf16[2,64,256]", "w must be [out, in], got bf16[2,64,256]"),
    ("linear {out=bf16}", f"{FP8}[1,256] bf16[64,256]", "quantize w, or dequantize x to bf16"),
    ("linear {out=bf16}", f"{W8}[128,256] {W8}[128,256]", f"x must have row-wise scales, got {W8}"),
    ("linear {out=bf16}", f"{KV}[1,256] {W8}[128,256]", f"x must have row-wise scales, got {KV}"),
    ("linear {out=bf16}", "i32[1,256] bf16[64,256]", "x must be f32, bf16 or quantized, got i32[1,256]"),
    ("linear {out=bf16}", "bf16[1,256]", "linear takes 2 operands, got 1"),
    ("grouped_linear {out=bf16}", "bf16[3,8,256] bf16[4,64,256]", "has 8 groups, w bf16[4,64,256] has 4"),
    ("grouped_linear {out=bf16}", "bf16[3,2048] bf16[8,64,256]", "x must be [N, G, K] and w [G, M, K]"),
    (
        "grouped_linear {out=bf16}",
        "bf16[3,8,128] bf16[8,64,256]",
        "does not fit w bf16[8,64,256]: 128 != 256",
    ),
    ("expert_linear {out=bf16}", "bf16[2,256] bf16[8,64,256] i32[3,6]", "x must be [N, K] or [N, k, K]"),
    ("expert_linear {out=bf16}", "bf16[3,256] bf16[64,256] i32[3,6]", "w must be [experts, out, in]"),
    ("expert_linear {out=bf16}", "bf16[3,256] bf16[8,64,256] i64[3,6]", "experts must be i32, got i64[3,6]"),
    ("expert_linear {out=bf16}", "bf16[3,128] bf16[8,64,256] i32[3,6]", "128 != 256"),
    ("rms_norm {eps=1e-06}", "bf16[2,8] bf16[4]", "gain bf16[4] does not fit bf16[2,8]"),
    (
        "rms_norm {eps=1e-06}",
        f"{FP8}[2,128]",
        f"x must be a plain tensor, got {FP8}[2,128]; dequantize it first",
    ),
    ("rms_norm {eps=1e-06}", "i32[2,8]", "x must be floating point, got i32[2,8]"),
    ("rms_norm {eps=1e-06, precision=bf16}", "bf16[2,8] bf16[8]", "a gain goes with f32 precision"),
    ("rms_norm {eps=1e-06, precision=f16}", "bf16[2,8]", "precision must be f32 or bf16, got f16"),
    ("rms_norm {eps=1e-06}", "bf16[] ", "x must have at least 1 dimension"),
    ("rms_norm {eps=1e-06}", "bf16[2] bf16[2] bf16[2]", "rms_norm takes 1 to 2 operands, got 3"),
    ("rsqrt_mean_square {eps=1e-06}", "bf16[]", "x must have at least 1 dimension"),
    ("normalize {axis=2, eps=0.0}", "f32[4,4]", "axis 2 is outside f32[4,4]"),
    ("normalize {axis=0, eps=0.0}", "bf16[4,4]", "x must be f32, got bf16[4,4]"),
    ("softmax {axis=-3}", "f32[4,4]", "axis -3 is outside f32[4,4]"),
    (
        f"rope_frequencies {{{ROPE.replace('dims=64', 'dims=63')}}}",
        "",
        "dims must be even and positive, got 63",
    ),
    ("rope", "bf16[3,128] i32[2] f32[32]", "x bf16[3,128] and positions i32[2] differ in rows"),
    ("rope", "bf16[3,32] i32[3] f32[32]", "frequencies f32[32] exceed the rows of bf16[3,32]"),
    ("rope", "bf16[3,128] i64[3] f32[32]", "positions must be i32, got i64[3]"),
    (f"quantize {{format={KV}}}", "bf16[2,64]", "leaves nothing to quantize in bf16[2,64]"),
    (f"quantize {{format={MX}}}", "bf16[2,63]", "packs pairs: the last dimension of (2, 63) is odd"),
    (f"quantize {{format={W8}}}", "bf16[256]", "needs 2 dimensions"),
    (f"quantize {{format={FP8}}}", "i32[2,128]", "x must be floating point"),
    (f"quantize {{format={NV}}}", "bf16[3,64] f32[3,6]", "needs a format with one per row"),
    (
        f"quantize {{format={NVROW}}}",
        "bf16[3,64] f32[2,6]",
        "global_scale f32[2,6] does not fit x bf16[3,64]",
    ),
    ("dequantize {out=bf16}", "bf16[2,64]", "x must be quantized, got bf16[2,64]"),
    ("hadamard", "bf16[2,96]", "the last dimension must be a power of two, got bf16[2,96]"),
    ("window_index {window=0}", "i32[3]", "window must be positive, got 0"),
    ("window_index {window=4}", "i32[3,1]", "positions must have 1 dimensions, got i32[3,1]"),
    ("visible_entries {ratio=0, capacity=4}", "i32[3]", "ratio must be positive, got 0"),
    ("gather", "bf16[192,512] i32[6,128] i32[6]", "cache must be [S, C, D], got bf16[192,512]"),
    ("gather", "bf16[4,192,512] i32[6,128] i32[4]", "slots i32[4] and index i32[6,128] differ in rows"),
    ("attention_scores {scale=1.0}", "bf16[3,4,64] bf16[3,10,32] i32[3,10]", "differ in width"),
    (
        "attention_scores {scale=1.0}",
        "bf16[3,4,64] bf16[3,10,64] i32[3,9]",
        "keys bf16[3,10,64] and index i32[3,9]",
    ),
    ("attention_scores {scale=1.0}", "bf16[2,4,64] bf16[3,10,64] i32[3,10]", "differ in rows"),
    ("sink_softmax {out=bf16}", "f32[3,4,10] f32[3]", "sink f32[3] does not fit the heads of f32[3,4,10]"),
    ("attention_values", "bf16[3,4,10] f32[3,4] bf16[3,9,64]", "differ in keys"),
    ("attention_values", "bf16[3,4,10] f32[3,5] bf16[3,10,64]", "and denominator f32[3,5] differ"),
    ("attention_values", "bf16[3,4,10] f32[3,4] bf16[2,10,64]", "differ in rows"),
    ("completed_entries {ratio=4, tokens=7}", "i32[13] i32[13]", "13 rows are not 7 of each sequence"),
    (
        "completed_entries {ratio=4, tokens=7}",
        "i32[14] i32[2]",
        "slots i32[2] and positions i32[14] differ",
    ),
    (
        "compress_pool {ratio=4, overlap=true, tokens=2}",
        "f32[2,7,64] f32[2,7,64] i32[2] i32[2]",
        "cannot hold 2 windows of 4",
    ),
    (
        "compress_pool {ratio=4, overlap=true, tokens=2}",
        "f32[2,8,63] f32[2,8,63] i32[2] i32[2]",
        "does not split into 2 halves",
    ),
    (
        "compress_pool {ratio=4, overlap=false, tokens=2}",
        "f32[2,8,64] f32[2,4,64] i32[2] i32[2]",
        "kv f32[2,8,64] and score f32[2,4,64] differ",
    ),
    (
        "compress_pool {ratio=4, overlap=false, tokens=2}",
        "f32[2,8,64] f32[2,8,64] i32[3] i32[2]",
        "slots i32[2] and entries i32[3] differ",
    ),
    ("add_position_bias", "f32[3,64] f32[4,32] i32[3]", "bias f32[4,32] does not fit score f32[3,64]"),
    ("add_position_bias", "f32[3,64] f32[4,64] i32[2]", "differ in rows"),
    (
        "cache_write",
        "bf16[2,192,512] bf16[6,256] i32[6] i32[6]",
        "rows must be bf16[6,512] to fit bf16[2,192,512]",
    ),
    ("cache_write", f"{KV}[2,192,512] bf16[6,512] i32[6] i32[6]", f"rows must be {KV}[6,512]"),
    ("cache_write", "bf16[4,192,512] bf16[6,512] i32[6] i32[4]", "slots i32[4] and index i32[6] differ"),
    ("cache_write", "bf16[2,192,512] bf16[6,512] i32[4] i32[4]", "rows bf16[6,512] and index i32[4] differ"),
    ("cache_write", "bf16[192] bf16[6] i32[6] i32[6]", "cache must be [S, C, ...], got bf16[192]"),
    (
        "cache_extend {capacity=256, tokens=4}",
        "bf16[2,192,512] bf16[6,512] i32[6] i32[6]",
        "6 rows are not 4 of each sequence",
    ),
    (
        "cache_extend {capacity=2, tokens=3}",
        "bf16[2,192,512] bf16[6,512] i32[6] i32[6]",
        "a capacity of 2 cannot hold 3 rows of a sequence",
    ),
    (
        "cache_extend {capacity=256, tokens=3}",
        f"{KV}[2,192,512] bf16[6,512] i32[6] i32[6]",
        f"rows must be {KV}[6,512] to fit {KV}[2,192,512]",
    ),
    (
        "cache_extend {capacity=256, tokens=3}",
        "bf16[2,192,512] bf16[6,512] i32[6] i32[2]",
        "slots i32[2] and positions i32[6] differ",
    ),
    ("positions {tokens=5}", "i32[2] i32[2] i32[3]", "slots i32[2] and lengths i32[3] differ"),
    ("owners {tokens=5}", "f32[2]", "lengths must be i32, got f32[2]"),
    ("advance", "i32[2] i32[2] i32[3]", "slots i32[2] and lengths i32[3] differ"),
    ("index_scores {ratio=4}", "bf16[3,8,128] bf16[1,32,64] bf16[3,8] i32[3] i32[3]", "differ in width"),
    (
        "index_scores {ratio=4}",
        "bf16[3,128] bf16[1,32,128] bf16[3,8] i32[3] i32[3]",
        "q must be [N, H, D], keys [S, C, D]",
    ),
    (
        "index_scores {ratio=4}",
        "bf16[3,8,128] bf16[1,32,128] bf16[3,4] i32[3] i32[3]",
        "weights bf16[3,4] do not fit q",
    ),
    ("index_scores {ratio=4}", "bf16[3,8,128] bf16[1,32,128] bf16[3,8] i32[2] i32[2]", "differ in rows"),
    (
        "index_scores {ratio=4}",
        "bf16[3,8,128] bf16[2,32,128] bf16[3,8] i32[3] i32[2]",
        "slots i32[2] and positions i32[3] differ",
    ),
    ("top_k {k=0}", "f32[3,32]", "k must be positive, got 0"),
    ("top_k {k=1}", "i32[3,32]", "scores must be f32 or bf16, got i32[3,32]"),
    ("add", "f32[3,8] f32[4]", "f32[3,8] and f32[4] do not broadcast"),
    ("mul", "bf16[3] i32[3]", "bf16[3] and i32[3] differ in type; cast one"),
    ("add", f"{FP8}[2,128] bf16[2,128]", "a must be a plain tensor"),
    ("clamp {low=none, high=none}", "f32[3]", "clamp needs a bound"),
    ("clamp {low=2.0, high=1.0}", "f32[3]", "low 2.0 is above high 1.0"),
    ("silu", "i32[3]", "x must be floating point, got i32[3]"),
    ("cast {to=bf16}", f"{FP8}[2,128]", "x must be a plain tensor"),
    ("cast {to=e4m3}", "f32[3]", "cast gives f32, bf16, f16 or an integer, not e4m3; use quantize"),
    ("sum {axis=3, out=f32}", "bf16[3,6,8]", "axis 3 is outside bf16[3,6,8]"),
    ("reshape {shape=(3,9)}", "bf16[24]", "bf16[24] has 24 elements, bf16[3,9] has 27"),
    ("slice {axis=0, start=2, stop=5}", "f32[4]", "[2:5] is outside axis 0 of f32[4]"),
    ("slice {axis=1, start=0, stop=1}", "f32[4]", "axis 1 is outside f32[4]"),
    ("slice {axis=0, start=3, stop=3}", "f32[4]", "[3:3] is outside axis 0"),
    ("concat {axis=0}", "f32[4]", "concat joins at least two values"),
    ("concat {axis=0}", "f32[4] bf16[4]", "bf16[4] does not join f32[4] along axis 0"),
    ("concat {axis=0}", "f32[4,2] f32[4,3]", "f32[4,3] does not join f32[4,2] along axis 0"),
    ("concat {axis=0}", "f32[4] f32[4,1]", "f32[4,1] differs in rank from f32[4]"),
    ("concat {axis=2}", "f32[4] f32[4]", "axis 2 is outside f32[4]"),
    ("concat {axis=-1}", f"{KV}[3,2,512] {KV}[3,2,512]", "quantized values join along leading dimensions"),
    ("expand_streams {streams=4}", "bf16[3,2,8]", "h must have 2 dimensions, got bf16[3,2,8]"),
    ("collapse_streams {out=bf16}", "bf16[3,4,8] f32[3,3]", "weights f32[3,3] do not fit the streams"),
    ("mix_streams", "bf16[3,4,8] f32[3,4,3]", "comb f32[3,4,3] does not fit the streams"),
    ("spread_streams", "bf16[3,8] f32[2,4]", "post f32[2,4] and f bf16[3,8] differ in rows"),
    ("embedding", "bf16[100,8] i64[3]", "ids must be i32, got i64[3]"),
    ("embedding", "bf16[] i32[3]", "table must have at least 1 dimension"),
    ("take_along", "f32[2,16] i32[3,6]", "x f32[2,16] and index i32[3,6] differ in rows"),
    ("last_rows", "bf16[5,100] i32[2]", "5 rows do not divide over 2 sequences"),
    ("argmax", "f32[100]", "logits must have 2 dimensions, got f32[100]"),
    (
        "penalize",
        "f32[3,100] i32[4,64] i32[2] i32[2] i32[4] f32[4,7]",
        "3 rows and positions i32[2] differ",
    ),
    (
        "penalize",
        "f32[3,100] i32[4,64] i32[3] i32[3] i32[4] f32[4,6]",
        "knobs must be f32[4,7] for the history i32[4,64], got f32[4,6]",
    ),
    ("token_probabilities", "f32[3,100] i32[3] f32[4,6]", "knobs must have 7 columns, got f32[4,6]"),
    (
        "draw",
        "f32[3,100] i32[3] i32[3] i32[4] i32[4,3]",
        "seeds must be i32[4,2] for the origin i32[4], got i32[4,3]",
    ),
    ("emit", "i32[3] i32[4] i32[3] i32[4,8]", "lengths i32[4] and chosen i32[3] differ"),
    ("emit", "i32[3] i32[3] i32[3] i32[4,2]", "stops must have 8 columns, got i32[4,2]"),
    (
        "preceding",
        "bf16[4,16,32] bf16[3,64] i32[3] i32[3]",
        "cache bf16[4,16,32] and rows bf16[3,64] differ in width",
    ),
    (
        "preceding",
        "bf16[4,16,64] bf16[3,64] i32[2] i32[2]",
        "rows bf16[3,64] and positions i32[2] differ",
    ),
    (
        "draft_rows {block=0, offset=0, noise=7}",
        "i32[2] i32[2] i32[2] i32[4]",
        "a block of 0 rows, expected at least 1",
    ),
    ("candidates", "i32[2] i32[5] i32[2]", "i32[5] are not drafts of 2 sequences"),
    ("trusted", "i32[2] f32[5,1] i32[2] f32[4]", "f32[5,1] is no confidence in drafts of 2 sequences"),
    ("trusted", "i32[2] f32[6,1] i32[3] f32[4]", "slots i32[3] and lengths i32[2] differ"),
    ("present", "f32[3,6] i32[2]", "weights f32[3,6] and positions i32[2] differ"),
    ("accept", "i32[8] i32[7] i32[2]", "tokens i32[7] and chosen i32[8] differ"),
    ("accept", "i32[8] i32[8] i32[3]", "i32[8] are not rows of 3 sequences"),
    ("stop", "i32[8] i32[8] i32[2] i32[1] i32[4,8]", "following i32[1] and counts i32[2] differ"),
    ("stop", "i32[8] i32[8] i32[2] i32[2] i32[4,7]", "stops must have 8 columns, got i32[4,7]"),
    ("all_reduce {ranks=2, out=bf16}", "bf16[3,64]", "x must be f32, got bf16[3,64]"),
    ("all_reduce {ranks=1, out=bf16}", "f32[3,64]", "ranks must be at least 2, got 1"),
    ("all_gather {axis=2, ranks=2}", "f32[3,64]", "axis 2 is outside f32[3,64]"),
    ("all_gather {axis=1, ranks=2}", f"{FP8}[3,128]", "a piece must be a plain tensor"),
]


@pytest.mark.parametrize(("op", "operands", "message"), REFUSALS)
def test_refusal(op: str, operands: str, message: str) -> None:
    with pytest.raises(GraphError, match=re.escape(message)):
        op_of(op).results(types(operands))


def test_every_primitive_has_its_rule_and_its_refusals_here() -> None:
    ruled = {op.partition(" ")[0] for op, _, _ in RULES}
    refused = {op.partition(" ")[0] for op, _, _ in REFUSALS}
    assert ruled == primitives()
    # These accept every plain float tensor; `silu` stands for what they refuse.
    assert primitives() - refused == {"scale", "shift", "sigmoid", "sqrt_softplus"}


SAMPLES = types(
    "f32[] f32[4] bf16[4] i32[4] f32[3,4] bf16[3,4] i32[3,4] bf16[2,3,4] f32[2,3,4] i64[2] "
    f"{FP8}[128] {MX}[3,4] {W8}[3,4] {KV}[2,3,128] {NVROW}[3,4]"
)


@pytest.mark.parametrize("text", sorted({op for op, _, _ in RULES}))
def test_a_type_rule_never_breaks(text: str) -> None:
    """Whatever the operands, the answer is types or a GraphError."""
    op = op_of(text)
    for count in range(4):
        for operands in itertools.product(SAMPLES if count < 3 else SAMPLES[::2], repeat=count):
            try:
                results = op.results(operands)
            except GraphError:
                continue
            cost = op.cost(operands, results)
            assert len(cost.reads) == len(operands)
            assert len(cost.writes) == len(results)
            assert min(cost.flops, *cost.reads, *cost.writes, 0) == 0


COSTS = [  # op, operands, flops, bytes read, bytes written
    ("linear {out=bf16}", "bf16[2,256] bf16[64,256]", 2 * 2 * 64 * 256, (1024, 32768), (256,)),
    ("linear {out=bf16}", f"{FP8}[1,256] {W8}[128,256]", 2 * 128 * 256, (256 + 2, 32768 + 2), (256,)),
    ("grouped_linear {out=bf16}", "bf16[1,8,256] bf16[8,64,256]", 2 * 8 * 64 * 256, (4096, 262144), (1024,)),
    # two tokens choose three experts each: six of sixteen matrices, never more than all
    (
        "expert_linear {out=bf16}",
        "bf16[2,256] bf16[16,64,256] i32[2,3]",
        2 * 6 * 64 * 256,
        (1024, 6 * 32768, 24),
        (768,),
    ),
    (
        "expert_linear {out=bf16}",
        "bf16[9,256] bf16[16,64,256] i32[9,3]",
        2 * 27 * 64 * 256,
        (4608, 16 * 32768, 108),
        (3456,),
    ),
    (
        "attention_scores {scale=1.0}",
        "bf16[1,4,64] bf16[1,10,64] i32[1,10]",
        2 * 40 * 64,
        (512, 1280, 40),
        (160,),
    ),
    ("attention_values", "bf16[1,4,10] f32[1,4] bf16[1,10,64]", 2 * 40 * 64, (80, 16, 1280), (512,)),
    (
        "index_scores {ratio=4}",
        "bf16[1,8,128] bf16[3,32,128] bf16[1,8] i32[1] i32[1]",
        2 * 32 * 8 * 129,
        (2048, 8192, 16, 4, 4),
        (64,),
    ),
    ("gather", "bf16[2,192,64] i32[1,10] i32[1]", 0, (1280, 40, 4), (1280,)),
    ("cache_write", "bf16[2,192,64] bf16[2,64] i32[2] i32[2]", 0, (0, 256, 8, 8), (256,)),
    # what the ring keeps of the 20 rows that are remembered when 16 are new
    (
        "cache_extend {capacity=32, tokens=16}",
        "bf16[4,20,64] bf16[16,64] i32[16] i32[16]",
        0,
        (4 * 128, 16 * 128, 64, 64),
        (32 * 128,),
    ),
    ("last_rows", "f32[6,10] i32[2]", 0, (80, 8), (80,)),
    ("embedding", "bf16[1000,8] i32[3]", 0, (48, 12), (48,)),
    ("take_along", "f32[3,16] i32[3,6]", 0, (72, 72), (72,)),
    ("reshape {shape=(8)}", "bf16[2,4]", 0, (0,), (0,)),
    ("slice {axis=0, start=0, stop=2}", "f32[100]", 0, (8,), (8,)),
    ("mix_streams", "f32[1,4,8] f32[1,4,4]", 2 * 4 * 4 * 8, (128, 64), (128,)),
    ("collapse_streams {out=bf16}", "bf16[1,4,8] f32[1,4]", 2 * 4 * 8, (64, 16), (16,)),
    ("silu", "f32[8]", 8, (32,), (32,)),
    # one row of the bias for every token
    ("add_position_bias", "f32[1,64] f32[4,64] i32[1]", 64, (256, 256, 4), (256,)),
    # decode finishes an entry every fourth time: half of each of 8 rows, a quarter of that per token
    (
        "compress_pool {ratio=4, overlap=true, tokens=1}",
        "f32[3,8,64] f32[3,8,64] i32[1] i32[1]",
        4 * 32 * 4,
        (256, 256, 4, 4),
        (128,),
    ),
]


@pytest.mark.parametrize(("op", "operands", "flops", "reads", "writes"), COSTS)
def test_cost(op: str, operands: str, flops: int, reads: tuple[int, ...], writes: tuple[int, ...]) -> None:
    made, given = op_of(op), types(operands)
    cost = made.cost(given, made.results(given))
    assert cost == Cost(flops, reads, writes)
    assert cost.bytes == sum(reads) + sum(writes)


def test_only_state_ops_overwrite() -> None:
    assert {name: dict(OPS[name].alias) for name in primitives() if OPS[name].alias} == {
        "cache_write": {0: 0},
        "advance": {0: 0},
    }


def test_a_type_keeps_its_format_through_a_gather() -> None:
    (gathered,) = op_of("gather").results(types(f"{KV}[1,8,512] i32[1,4] i32[1]"))
    assert isinstance(gathered, QuantType)
    assert gathered.format is KV_FP8 or gathered.format == KV_FP8
    assert DType.E4M3 is gathered.format.value
