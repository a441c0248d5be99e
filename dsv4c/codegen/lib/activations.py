"""Activation rows into shared memory, as `units.accumulate` reads them: the prologue stages of the GEMV family.

Call them after `ptx.wait`, with weights in flight. After a stage, one CTA barrier and, for copies, `arrived` make the
rows visible to all warps.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, Uint32, const_expr, range_constexpr

from dsv4c.codegen.lib import ptx, quantize
from dsv4c.codegen.lib.shapes import COLUMNS, Product


@cute.jit
def arrived(s_bar: Int32):
    """Wait for the bulk copies of `copy_rows` or `load_gain`."""
    ptx.mbarrier_wait(s_bar, Int32(0))


@cute.jit
def copy_rows(
    p: Constexpr[Product],
    s_x: Int32,
    s_fx: Int32,
    s_bar: Int32,
    g_x: Int64,
    g_fx: Int64,
    row_bytes: Constexpr[int],
    lane: Int32,
):
    """Rows as the producer left them: e4m3 with ue8m0 scales [rows][units], or bf16. One warp.

    `row_bytes` is the distance of rows in global memory. Scales become f32 [rows][units] at `s_fx`.
    """
    width = const_expr(p.k if p.x == "e4m3" else 2 * p.k)
    if const_expr(p.x == "bf16" and p.k % COLUMNS[p.weight]):
        zero_tails(p, s_x, width, lane)
    if lane == 0:
        ptx.mbarrier_expect(s_bar, Int32(p.rows * width))
        for m in range_constexpr(p.rows):
            ptx.bulk_load(s_x + m * p.x_stride, g_x + m * row_bytes, Int32(width), s_bar)
    if const_expr(p.x == "e4m3"):
        count = const_expr(p.rows * p.units)
        for n in range_constexpr(-(-count // 32)):
            i = lane + 32 * n
            if i < count:
                ptx.sts_f32(s_fx + i * 4, ptx.ue8m0_to_f32(ptx.ldg_u8(g_fx + i)))


@cute.jit
def zero_tails(p: Constexpr[Product], s_x: Int32, width: Constexpr[int], lane: Int32):
    """Zero what `copy_rows` leaves of each row's last unit: padding weights are zero, and 0 x NaN is not."""
    pad = const_expr((2 * p.units * COLUMNS[p.weight] - width) // 4)
    for m in range_constexpr(p.rows):
        for n in range_constexpr(-(-pad // 32)):
            i = lane + 32 * n
            if i < pad:
                ptx.sts32(s_x + m * p.x_stride + width + i * 4, Uint32(0))


@cute.jit
def quantize_rows(
    p: Constexpr[Product],
    s_x: Int32,
    s_fx: Int32,
    g_x: Int64,
    row_bytes: Constexpr[int],
    thread: Int32,
    threads: Constexpr[int],
):
    """bf16 rows of a predecessor as p.x wants them, e4m3 or scaled f16; a half-warp per block of 128.

    `row_bytes` is the distance of rows in global memory.
    """
    groups = const_expr(threads // 16)
    count = const_expr(p.rows * p.units)
    for n in range_constexpr(-(-count // groups)):
        # the last round repeats a block rather than leave half a warp behind
        block = cutlass.min(thread // 16 + n * groups, Int32(count - 1))
        row, unit = block // p.units, block % p.units
        r = quantize.load8(g_x + Int64(row * row_bytes + unit * 256 + (thread % 16) * 16))
        put_block(p, r, s_x + row * p.x_stride, s_fx + block * 4, unit, thread % 32)


@cute.jit
def put_block(p: Constexpr[Product], r: cute.Tensor, s_row: Int32, s_scale: Int32, unit: Int32, lane: Int32):
    """A block of 128 as p.x wants it, into its row."""
    if const_expr(p.x == "e4m3"):
        quantize.quantize_block(r, s_row + unit * 128, s_scale, lane)
    else:
        quantize.scale_block_f16(r, s_row + unit * 256, s_scale, lane)


@cute.jit
def load_gain(p: Constexpr[Product], s_gain: Int32, s_bar: Int32, g_gain: Int64):
    """Put the f32 gain in flight: it is a weight, so before the wait. One thread."""
    ptx.mbarrier_expect(s_bar, Int32(4 * p.k))
    ptx.bulk_load(s_gain, g_gain, Int32(4 * p.k), s_bar)


@cute.jit
def normalize_quantize_rows(
    p: Constexpr[Product],
    s_x: Int32,
    s_fx: Int32,
    s_squares: Int32,
    s_gain: Int32,
    s_bar: Int32,
    g_x: Int64,
    eps: Constexpr[float],
    thread: Int32,
    threads: Constexpr[int],
):
    """RMSNorm with f32 gain, rounded to bf16, then FP8: (x * rsqrt(mean(x^2) + eps)) * gain.

    `s_squares` is scratch, f32 [rows][units]; `s_bar` completes when the gain has arrived. Contains a CTA barrier.
    """
    groups = const_expr(threads // 16)
    count = const_expr(p.rows * p.units)
    for n in range_constexpr(-(-count // groups)):
        block = cutlass.min(thread // 16 + n * groups, Int32(count - 1))
        r = quantize.load8(g_x + Int64(block * 256 + (thread % 16) * 16))
        square = Float32(0.0)
        for j in range_constexpr(8):
            square = square + r[j] * r[j]
        square = ptx.lanes_sum(square, 16)
        if thread % 16 == 0:
            ptx.sts_f32(s_squares + block * 4, square)
    cute.arch.sync_threads()
    arrived(s_bar)
    for n in range_constexpr(-(-count // groups)):
        block = cutlass.min(thread // 16 + n * groups, Int32(count - 1))
        row, unit = block // p.units, block % p.units
        mean = Float32(0.0)
        for j in range_constexpr(p.units):
            mean = mean + ptx.lds_f32(s_squares + (row * p.units + j) * 4)
        inverse = cute.math.rsqrt(mean * Float32(1.0 / p.k) + Float32(eps))
        r = quantize.load8(g_x + Int64(block * 256 + (thread % 16) * 16))
        for half in range_constexpr(2):
            w = ptx.lds128(s_gain + (unit * 128 + (thread % 16) * 8 + half * 4) * 4)
            for j in range_constexpr(4):
                r[4 * half + j] = ptx.round_bf16(r[4 * half + j] * inverse * w[j].bitcast(Float32))
        put_block(p, r, s_x + row * p.x_stride, s_fx + block * 4, unit, thread % 32)
