"""What happens to many rows between products: their FP8 codes, under a norm or not, the choice of experts,
rows listed by expert, and sums over experts.

Rows past `lengths`, where it is given, are left alone.
"""

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, Uint32, const_expr, range_constexpr

from dsv4c.codegen.lib import gemm, ptx, quantize, router
from dsv4c.codegen.lib.slices import Choice, Codes, Listing, NormedCodes, Sum

# Kernels ----------------------------------------------------------------------------------------------------


class Coded(NamedTuple):
    """x bf16[rows, k] -> q FP8 in blocks of 128; lengths i32[1]."""

    x: cute.Pointer
    q: cute.Pointer
    q_scale: cute.Pointer
    lengths: cute.Pointer | None


class NormCoded(NamedTuple):
    """The same under a norm with gain f32[k]."""

    x: cute.Pointer
    gain: cute.Pointer
    q: cute.Pointer
    q_scale: cute.Pointer
    lengths: cute.Pointer | None


class Listed(NamedTuple):
    """experts i32[rows, top_k] -> order i32[experts, rows * top_k], counts i32[experts]; lengths i32[1]."""

    experts: cute.Pointer
    order: cute.Pointer
    counts: cute.Pointer
    lengths: cute.Pointer | None


class Summed(NamedTuple):
    """routed bf16[rows, top_k, hidden], shared bf16[rows, hidden] -> y [rows, hidden]; lengths i32[1]."""

    routed: cute.Pointer
    shared: cute.Pointer
    y: cute.Pointer
    lengths: cute.Pointer | None


class Chosen(NamedTuple):
    """logits f32[rows, experts], with bias f32[experts] or table i32[*, top_k] and tokens i32[rows] ->
    experts i32, weights f32 [rows, top_k]; lengths i32[1].
    """

    logits: cute.Pointer
    bias: cute.Pointer | None
    table: cute.Pointer | None
    tokens: cute.Pointer | None
    experts: cute.Pointer
    weights: cute.Pointer
    lengths: cute.Pointer | None


@cute.jit
def counted(m_lengths: cute.Pointer | None, rows: Constexpr[int], each: Constexpr[int]) -> Int32:
    """`each` for every row that there is: `rows` where none are counted."""
    if const_expr(m_lengths is None):
        return Int32(rows * each)
    return Int32(ptx.ldg32(m_lengths.toint())) * each


@cute.jit
def quantize_rows(c: Constexpr[Codes], m: Coded) -> None:
    """Rows to FP8."""
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    own = block * c.together + thread // 16
    if own < counted(m.lengths, c.rows // c.each, c.each * c.blocks):
        quantize_block(m.x.toint(), m.q.toint(), m.q_scale.toint(), Int64(own), thread % 32)


@cute.jit
def normalize_rows(c: Constexpr[NormedCodes], m: NormCoded, s: Int32) -> None:
    """Rows to FP8 under a norm."""
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    if block < counted(m.lengths, c.rows, 1):
        g_x, g_gain, g_codes, g_scales = m.x.toint(), m.gain.toint(), m.q.toint(), m.q_scale.toint()
        normalize_quantize(s, g_x, g_gain, g_codes, g_scales, Int64(block), c.k, c.eps, thread)


@cute.jit
def list_rows(t: Constexpr[Listing], m: Listed, s: Int32) -> None:
    """The numbers that chose the CTA's expert."""
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    g_order = m.order.toint() + Int64(block) * (t.numbers * 4)
    count = counted(m.lengths, t.rows, t.top_k)
    gemm.list_rows(m.experts.toint(), g_order, m.counts.toint(), s, block, count, thread, t.threads)


@cute.jit
def sum_experts(t: Constexpr[Sum], m: Summed) -> None:
    """A row's sum over its experts."""
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    row = block // t.ctas
    piece = block % t.ctas * t.threads + thread
    if row < counted(m.lengths, t.rows, 1) and piece < t.hidden // 8:
        g_rows, g_shared = m.routed.toint(), m.shared.toint()
        sum_rows(g_rows, g_shared, m.y.toint(), Int64(row), piece, t.hidden, t.top_k, t.size)


@cute.jit
def choose_experts(t: Constexpr[Choice], m: Chosen, s: Int32) -> None:
    """A row's experts, the best of score + bias or the table's, and their weights."""
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    if block < counted(m.lengths, t.rows, 1):
        g_logits = m.logits.toint() + Int64(block) * (4 * t.experts)
        if const_expr(m.table is None):
            router.stage_bias(s, m.bias.toint(), t.experts, t.padded, thread, t.threads)
            logits = router.load_logits(g_logits, t.experts, thread, t.threads)
            router.stage_scores(s, logits, t.experts, t.padded, thread, t.threads)
            cute.arch.sync_threads()
        if thread < 32:
            if const_expr(m.table is None):
                expert, chosen = router.top_experts(s, t.padded, t.top_k, thread)
            else:
                number = ptx.ldg32(m.tokens.toint() + block * 4).to(Int64)
                expert = router.table_experts(m.table.toint() + number * (4 * t.top_k), t.top_k, thread)
                chosen = router.logit_scores(g_logits, expert, t.top_k, thread)
            weight = router.keep_weights(s + t.o_kept, chosen, t.top_k, t.factor, thread)
            if thread < t.top_k:
                at = Int64(block * t.top_k + thread) * 4
                ptx.stg32(m.experts.toint() + at, expert.bitcast(Uint32))
                ptx.stg_f32(m.weights.toint() + at, weight)


# Rows -------------------------------------------------------------------------------------------------------


@cute.jit
def quantize_block(g_x: Int64, g_codes: Int64, g_scales: Int64, block: Int64, lane: Int32):
    """128 bf16 numbers to FP8 by a half-warp: block `block` of x, of codes and of scales."""
    w = ptx.ldg128(g_x + block * 256 + lane % 16 * 16)
    held = cute.make_rmem_tensor((4,), Uint32)
    for i in range_constexpr(4):
        held[i] = w[i]
    store_block(quantize.floats8(held, 0), g_codes, g_scales, block, lane)


@cute.jit
def store_block(r: cute.Tensor, g_codes: Int64, g_scales: Int64, block: Int64, lane: Int32):
    """128 floats, 8 a lane of a half-warp, as FP8."""
    byte = quantize.fp8_exponent(quantize.block_amax(r))
    f = quantize.reciprocal(byte)
    low = quantize.codes4(r[0] * f, r[1] * f, r[2] * f, r[3] * f)
    high = quantize.codes4(r[4] * f, r[5] * f, r[6] * f, r[7] * f)
    ptx.stg64(g_codes + block * 128 + lane % 16 * 8, low, high)
    if lane % 16 == 0:
        ptx.stg_u8(g_scales + block, Uint32(byte))


@cute.jit
def normalize_quantize(
    s: Int32,
    g_x: Int64,
    g_gain: Int64,
    g_codes: Int64,
    g_scales: Int64,
    row: Int64,
    k: Constexpr[int],
    eps: Constexpr[float],
    thread: Int32,
):
    """bf16(x * rsqrt(mean(x^2) + eps) * gain) of a row of `k` to FP8, by k / 8 threads, as the GEMVs do it:
    sums of 128 squares, added in order.
    """
    blocks = const_expr(k // 128)
    w = ptx.ldg128(g_x + row * (2 * k) + thread * 16)
    held = cute.make_rmem_tensor((4,), Uint32)
    for i in range_constexpr(4):
        held[i] = w[i]
    r = quantize.floats8(held, 0)
    square = Float32(0.0)
    for j in range_constexpr(8):
        square = square + r[j] * r[j]
    square = ptx.lanes_sum(square, 16)
    if thread % 16 == 0:
        ptx.sts_f32(s + thread // 16 * 4, square)
    cute.arch.sync_threads()
    mean = Float32(0.0)
    for j in range_constexpr(blocks):
        mean = mean + ptx.lds_f32(s + j * 4)
    inverse = cute.math.rsqrt(mean * Float32(1.0 / k) + Float32(eps))
    for half in range_constexpr(2):
        gain = ptx.ldg128_constant(g_gain + thread * 32 + half * 16)
        for j in range_constexpr(4):
            r[4 * half + j] = ptx.round_bf16(r[4 * half + j] * inverse * gain[j].bitcast(Float32))
    store_block(r, g_codes, g_scales, row * blocks + thread // 16, thread % 32)


@cute.jit
def sum_rows(
    g_rows: Int64,
    g_shared: Int64,
    g_y: Int64,
    row: Int64,
    piece: Int32,
    k: Constexpr[int],
    count: Constexpr[int],
    size: Constexpr[int],
):
    """Eight columns of the sum over `count` rows, in order, plus the shared row, as numbers of `size` bytes:
    2 for bf16, 4 for f32.
    """
    total = cute.make_rmem_tensor((8,), Float32)
    total.fill(0.0)
    g = g_rows + row * (count * 2 * k) + piece * 16
    words = [ptx.ldg128(g + i * (2 * k)) for i in range(count)]
    words.append(ptx.ldg128(g_shared + row * (2 * k) + piece * 16))
    for i in range_constexpr(count + 1):
        for j in range_constexpr(4):
            low, high = ptx.bf16x2_to_f32x2(words[i][j])
            total[2 * j] = total[2 * j] + low
            total[2 * j + 1] = total[2 * j + 1] + high
    if const_expr(size == 2):
        made = [ptx.f32x2_to_bf16x2(total[2 * j], total[2 * j + 1]) for j in range(4)]
        ptx.stg128(g_y + row * (2 * k) + piece * 16, *made)
    else:
        for half in range_constexpr(2):
            words = [total[4 * half + j].bitcast(Uint32) for j in range(4)]
            ptx.stg128(g_y + row * (4 * k) + piece * 32 + half * 16, *words)
