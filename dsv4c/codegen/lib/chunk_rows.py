"""What happens to many rows between products: their FP8 codes, under a norm or not, and sums over experts."""

import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, Uint32, const_expr, range_constexpr

from dsv4c.codegen.lib import ptx, quantize


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
