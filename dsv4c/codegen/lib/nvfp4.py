"""NVFP4 rows: quantized by one CTA each, and expanded to f16 for the GEMVs.

As `numerics/codec.py`: g = amax(row) / (6 * 448), scale = e4m3(amax16 / (6 g)), code = e2m1(x / (scale g)). A
code times its scale has six significant bits and lies within 2^-10 .. 2688: exact in f16.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, Uint32, const_expr, range_constexpr

from dsv4c.codegen.lib import hadamard, ptx
from dsv4c.codegen.lib.shapes import Product
from dsv4c.codegen.lib.slices import Nvfp4Row

_2P14 = 0x74007400  # f16x2


# Quantize ---------------------------------------------------------------------------------------------------


class Operands(NamedTuple):
    """x bf16[N, k], under a norm with gain bf16[k] -> q NVFP4[N, k] with a global scale per row."""

    x: cute.Pointer
    gain: cute.Pointer | None
    q: cute.Pointer
    q_scale: cute.Pointer
    q_global_scale: cute.Pointer


@cute.jit
def quantize_row(v: Constexpr[Nvfp4Row], m: Operands, s: Int32) -> None:
    """A row by each CTA. `s`: 256 bytes."""
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    row = Int64(block)
    r = load_row(m.x.toint() + row * (2 * v.k), v.k, thread, v.threads)
    if const_expr(v.eps is not None):
        normalize(r, s, m.gain.toint(), v.k, v.eps, thread, v.threads)
    scale = row_scale(r, s + 128, v.held, thread, v.threads)
    g_codes = m.q.toint() + row * (v.k // 2)
    g_scales = m.q_scale.toint() + row * (v.k // 16)
    store_row(r, scale, g_codes, g_scales, v.k, thread, v.threads)
    if thread == 0:
        ptx.stg_f32(m.q_global_scale.toint() + row * 4, scale)


@cute.jit
def load_row(g_row: Int64, k: Constexpr[int], thread: Int32, threads: Constexpr[int]):
    """The thread's blocks of 16 of a bf16 row, as floats; past the end, the last block again."""
    rounds = -(-k // (16 * threads))
    r = cute.make_rmem_tensor((16 * rounds,), Float32)
    for n in range_constexpr(rounds):
        block = cutlass.min(thread + n * threads, Int32(k // 16 - 1))
        for half in range_constexpr(2):
            w = ptx.ldg128(g_row + block * 32 + half * 16)
            for j in range_constexpr(4):
                at = 16 * n + 8 * half + 2 * j
                r[at], r[at + 1] = ptx.bf16x2_to_f32x2(w[j])
    return r


@cute.jit
def normalize(
    r: cute.Tensor,
    s: Int32,
    g_gain: Int64,
    k: Constexpr[int],
    eps: Constexpr[float],
    thread: Int32,
    threads: Constexpr[int],
):
    """RMSNorm of the row with bf16 gain, rounded to bf16. `s`: 128 bytes. One barrier."""
    rounds = -(-k // (16 * threads))
    square = Float32(0.0)
    for n in range_constexpr(rounds):
        own = Float32(0.0)
        for j in range_constexpr(16):
            own = own + r[16 * n + j] * r[16 * n + j]
        if thread + n * threads < k // 16:
            square = square + own
    square = ptx.lanes_sum(square, 32)
    if thread % 32 == 0:
        ptx.sts_f32(s + thread // 32 * 4, square)
    ptx.sync_threads(threads)
    total = Float32(0.0)
    for i in range_constexpr(threads // 32):
        total = total + ptx.lds_f32(s + i * 4)
    inverse = cute.math.rsqrt(total * Float32(1.0 / k) + Float32(eps))
    for n in range_constexpr(rounds):
        block = cutlass.min(thread + n * threads, Int32(k // 16 - 1))
        for half in range_constexpr(2):
            w = ptx.ldg128(g_gain + block * 32 + half * 16)
            for j in range_constexpr(4):
                lo, hi = ptx.bf16x2_to_f32x2(w[j])
                at = 16 * n + 8 * half + 2 * j
                r[at] = ptx.round_bf16(r[at] * inverse * lo)
                r[at + 1] = ptx.round_bf16(r[at + 1] * inverse * hi)


@cute.jit
def magnitude(r: cute.Tensor, first: Constexpr[int], count: Constexpr[int]):
    """Bits of the largest magnitude of r[first ..]; those of NaN are larger than any number's."""
    bits = Int32(0)
    for i in range_constexpr(count):
        bits = cutlass.max(bits, r[first + i].bitcast(Int32) & Int32(0x7FFFFFFF))
    return bits


@cute.jit
def row_scale(r: cute.Tensor, s: Int32, count: Constexpr[int], thread: Int32, threads: Constexpr[int]):
    """The row's global scale, from all threads' `count` values. `s`: 128 bytes. One barrier."""
    bits = magnitude(r, 0, count)
    for i in range_constexpr(5):
        bits = cutlass.max(bits, cute.arch.shuffle_sync_bfly(bits, offset=1 << i))
    if thread % 32 == 0:
        ptx.sts32(s + thread // 32 * 4, bits.to(Uint32))
    ptx.sync_threads(threads)
    for i in range_constexpr(threads // 32):
        bits = cutlass.max(bits, ptx.lds32(s + i * 4).bitcast(Int32))
    return ptx.divide(bits.bitcast(Float32), Float32(6.0 * 448.0))


@cute.jit
def store_row(
    r: cute.Tensor,
    scale: Float32,
    g_codes: Int64,
    g_scales: Int64,
    k: Constexpr[int],
    thread: Int32,
    threads: Constexpr[int],
):
    """Codes, the even element in the low nibble, and e4m3 scales of the thread's blocks under `scale`."""
    for n in range_constexpr(-(-k // (16 * threads))):
        block = thread + n * threads
        amax = magnitude(r, 16 * n, 16).bitcast(Float32)
        ratio = Float32(0.0)
        if amax != Float32(0.0):
            ratio = ptx.divide(amax, Float32(6.0) * scale)
        byte = ptx.f32x2_to_e4m3x2(ratio, Float32(0.0))
        block_scale, _ = ptx.f16x2_to_f32x2(ptx.e4m3x4_to_f16x2x2(byte)[0])
        divisor = block_scale * scale
        low, high = codes8(r, 16 * n, divisor), codes8(r, 16 * n + 8, divisor)
        if divisor == Float32(0.0):
            low, high = Uint32(0), Uint32(0)
        if block < k // 16:
            ptx.stg64(g_codes + block * 8, low, high)
            ptx.stg_u8(g_scales + block, byte)


@cute.jit
def codes8(r: cute.Tensor, first: Constexpr[int], divisor: Float32):
    """Codes of r[first .. first + 7] / divisor, which is not zero."""
    word = Uint32(0)
    if const_expr(ptx.converts_e2m1()):
        for i in range_constexpr(4):
            lo, hi = ptx.divide(r[first + 2 * i], divisor), ptx.divide(r[first + 2 * i + 1], divisor)
            word = word | (ptx.f32x2_to_e2m1x2(lo, hi) << Uint32(8 * i))
    else:
        for i in range_constexpr(8):
            x = r[first + i]
            y = cute.arch.fmin(ptx.divide(ptx.magnitude(x), divisor), Float32(6.0))
            sign = (x.bitcast(Uint32) >> Uint32(31)) << Uint32(3)
            word = word | ((hadamard.code_of(y) | sign) << Uint32(4 * i))
    return word


# Expand -----------------------------------------------------------------------------------------------------


@cute.jit
def load_packed(
    p: Constexpr[Product],
    g_x: Int64,
    g_scales: Int64,
    row_bytes: Constexpr[int],
    thread: Int32,
    threads: Constexpr[int],
):
    """This thread's share of NVFP4 rows, in flight to registers: per block of 16 two words of codes and a
    scale. Rows are `row_bytes` of codes apart.
    """
    width = p.k // 16
    count = p.rows * width
    rounds = -(-count // threads)
    w = cute.make_rmem_tensor((3 * rounds,), Uint32)
    for n in range_constexpr(rounds):
        i = cutlass.min(thread + n * threads, Int32(count - 1))
        codes = ptx.ldg64(g_x + Int64(i // width * row_bytes + i % width * 8))
        w[3 * n] = codes[0]
        w[3 * n + 1] = codes[1]
        w[3 * n + 2] = ptx.ldg_u8(g_scales + Int64(i // width * (row_bytes // 8) + i % width))
    return w


@cute.jit
def expand_rows(
    p: Constexpr[Product],
    w: cute.Tensor,
    s_x: Int32,
    s_fx: Int32,
    g_global: Int64,
    row_bytes: Constexpr[int],
    thread: Int32,
    threads: Constexpr[int],
):
    """Rows of `load_packed` as f16, codes times block scales; each unit's scale is its row's global one."""
    width = p.k // 16
    count = p.rows * width
    for n in range_constexpr(-(-count // threads)):
        i = cutlass.min(thread + n * threads, Int32(count - 1))
        scale = ptx.e4m3x4_to_f16x2x2(w[3 * n + 2] * Uint32(0x101))[0]
        for half in range_constexpr(2):
            v = scaled_pairs(w[3 * n + half], scale)
            ptx.sts128(s_x + i // width * p.x_stride + i % width * 32 + half * 16, v[0], v[1], v[2], v[3])
    scales = p.rows * p.units
    for n in range_constexpr(-(-scales // threads)):
        i = thread + n * threads
        if i < scales:
            row = i // p.units * (row_bytes // (p.k // 2))
            ptx.sts_f32(s_fx + i * 4, ptx.ldg_f32(g_global + Int64(row * 4)))


@cute.jit
def scaled_pairs(codes: Uint32, scale: Uint32):
    """A word of eight codes as four f16x2, times `scale`."""
    if const_expr(ptx.converts_e2m1()):
        return [ptx.mul_f16x2(pair, scale) for pair in ptx.e2m1x8_to_f16x2x4(codes)]
    return [ptx.mul_f16x2(ptx.mul_f16x2(code_pair(codes, j), Uint32(_2P14)), scale) for j in range(4)]


@cute.jit
def code_pair(codes: Uint32, pair: Constexpr[int]):
    """Codes 2 pair and 2 pair + 1 of a word of eight as f16x2, times 2^-14."""
    byte = codes >> Uint32(8 * pair)
    lo = ((byte & Uint32(0x08)) << Uint32(12)) | ((byte & Uint32(0x07)) << Uint32(9))
    hi = ((byte & Uint32(0x80)) << Uint32(24)) | ((byte & Uint32(0x70)) << Uint32(21))
    return lo | hi
