"""Activation rows into shared memory, as `units.accumulate` reads them: the prologue stages of the GEMV
family.

Call them after `ptx.wait`, with weights in flight. After a stage, one CTA barrier and, for copies, `arrived`
make the rows visible to all warps.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, Uint32, const_expr, range_constexpr

from dsv4c.codegen.lib import ptx, quantize
from dsv4c.codegen.lib.shapes import COLUMNS, Product, Ring


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
def load_codes(
    p: Constexpr[Product], g_x: Int64, row_bytes: Constexpr[int], thread: Int32, threads: Constexpr[int]
):
    """This thread's share of e4m3 rows, in flight to registers, for `expand_rows`."""
    width = const_expr(p.k // 16)
    count = const_expr(p.rows * width)
    pieces = const_expr(-(-count // threads))
    w = cute.make_rmem_tensor((4 * pieces,), Uint32)
    for n in range_constexpr(pieces):
        i = cutlass.min(thread + n * threads, Int32(count - 1))
        v = ptx.ldg128(g_x + Int64(i // width * row_bytes + i % width * 16))
        for j in range_constexpr(4):
            w[4 * n + j] = v[j]
    return w


@cute.jit
def expand_rows(
    p: Constexpr[Product],
    w: cute.Tensor,
    s_x: Int32,
    s_fx: Int32,
    g_fx: Int64,
    thread: Int32,
    threads: Constexpr[int],
):
    """Rows of `load_codes`, with their ue8m0 scales at `g_fx`, as f16: one conversion instead of one per
    unit.
    """
    width = const_expr(p.k // 16)
    count = const_expr(p.rows * width)
    for n in range_constexpr(-(-count // threads)):
        i = cutlass.min(thread + n * threads, Int32(count - 1))
        s_piece = s_x + i // width * p.x_stride + i % width * 32
        for half in range_constexpr(2):
            lo = ptx.e4m3x4_to_f16x2x2(w[4 * n + 2 * half])
            hi = ptx.e4m3x4_to_f16x2x2(w[4 * n + 2 * half + 1])
            ptx.sts128(s_piece + half * 16, lo[0], lo[1], hi[0], hi[1])
    scales = const_expr(p.rows * p.units)
    for n in range_constexpr(-(-scales // threads)):
        i = thread + n * threads
        if i < scales:
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
def load_blocks(
    p: Constexpr[Product],
    g_x: Int64,
    row_bytes: Constexpr[int],
    first: Constexpr[int],
    number: Constexpr[int],
    thread: Int32,
    threads: Constexpr[int],
):
    """`number` blocks of bf16 rows, those of rounds `first`..., in flight together: a round trip each would
    add up.
    """
    w = cute.make_rmem_tensor((4 * number,), Uint32)
    for n in range_constexpr(number):
        block = block_of(p, first + n, thread, threads)
        column = block % p.blocks * 256 + thread % 16 * 16
        v = ptx.ldg128(g_x + Int64(block // p.blocks * row_bytes + column))
        for j in range_constexpr(4):
            w[4 * n + j] = v[j]
    return w


@cute.jit
def block_of(p: Constexpr[Product], n: Constexpr[int], thread: Int32, threads: Constexpr[int]):
    """Block of 128 that the thread's half-warp has in round `n`; the last round repeats the last block."""
    return cutlass.min(thread // 16 + n * (threads // 16), Int32(p.rows * p.blocks - 1))


@cute.jit
def store_blocks(
    p: Constexpr[Product],
    w: cute.Tensor,
    s_x: Int32,
    s_fx: Int32,
    first: Constexpr[int],
    number: Constexpr[int],
    thread: Int32,
    threads: Constexpr[int],
):
    """What `load_blocks` loaded as p.x wants it, e4m3 or scaled f16; a half-warp per block of 128."""
    for n in range_constexpr(number):
        block = block_of(p, first + n, thread, threads)
        s_row = s_x + block // p.blocks * p.x_stride
        put_block(p, quantize.floats8(w, n), s_row, s_fx + block * 4, block % p.blocks, thread % 32)


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
    """bf16 rows of a predecessor as p.x wants them; `row_bytes` is their distance in global memory."""
    rounds = const_expr(p.block_rounds(threads))
    for first in range_constexpr(0, rounds, 8):
        number = const_expr(min(8, rounds - first))
        w = load_blocks(p, g_x, row_bytes, first, number, thread, threads)
        store_blocks(p, w, s_x, s_fx, first, number, thread, threads)


@cute.jit
def put_block(p: Constexpr[Product], r: cute.Tensor, s_row: Int32, s_scale: Int32, unit: Int32, lane: Int32):
    """A block of 128 as p.x wants it, into its row."""
    if const_expr(p.x == "e4m3"):
        quantize.quantize_block(r, s_row + unit * 128, s_scale, lane)
    elif const_expr(p.x == "bf16"):
        w = [ptx.f32x2_to_bf16x2(r[2 * i], r[2 * i + 1]) for i in range(4)]
        ptx.sts128(s_row + unit * 256 + (lane % 16) * 16, w[0], w[1], w[2], w[3])
    else:
        quantize.scale_block_f16(r, s_row + unit * 256, s_scale, lane)


@cute.jit
def own_block(r: Constexpr[Ring], p: Constexpr[Product], n: Constexpr[int], warp: Int32, lane: Int32):
    """Row and unit of the block of 128 that the lane's half-warp has in round `n` of its warp's own: of all
    rows of `p`, what the warps of its part of k multiply. The last round repeats the last block.
    """
    units = const_expr(p.units // r.k_warps)
    part = (warp // r.tile_warps) % r.k_warps
    place = warp // (r.tile_warps * r.k_warps) * r.tile_warps + warp % r.tile_warps
    place = place * 2 + lane // 16 + n * 2 * r.sharing
    place = cutlass.min(place, Int32(p.rows * units - 1))
    unit = place % units
    return place // units, (unit // r.span * r.k_warps + part) * r.span + unit % r.span


@cute.jit
def load_own(
    r: Constexpr[Ring], p: Constexpr[Product], g_x: Int64, row_bytes: Constexpr[int], warp: Int32, lane: Int32
):
    """The warp's own blocks of bf16 rows, in flight together."""
    number = const_expr(r.own_rounds(p.rows))
    w = cute.make_rmem_tensor((4 * number,), Uint32)
    for n in range_constexpr(number):
        row, unit = own_block(r, p, n, warp, lane)
        v = ptx.ldg128(g_x + Int64(row * row_bytes + unit * 256 + lane % 16 * 16))
        for j in range_constexpr(4):
            w[4 * n + j] = v[j]
    return w


@cute.jit
def copy_own(
    r: Constexpr[Ring],
    p: Constexpr[Product],
    s_own: Int32,
    g_x: Int64,
    row_bytes: Constexpr[int],
    warp: Int32,
    lane: Int32,
):
    """As `load_own`, to shared memory at `s_own`, each thread's where only it looks."""
    for n in range_constexpr(r.own_rounds(p.rows)):
        row, unit = own_block(r, p, n, warp, lane)
        s = s_own + ((n * r.warps + warp) * 32 + lane) * 16
        ptx.cp_async16(s, g_x + Int64(row * row_bytes + unit * 256 + lane % 16 * 16))
    ptx.cp_async_commit()


@cute.jit
def copied_own(r: Constexpr[Ring], p: Constexpr[Product], s_own: Int32, warp: Int32, lane: Int32):
    """What `copy_own` has copied."""
    ptx.cp_async_wait(0)
    w = cute.make_rmem_tensor((4 * r.own_rounds(p.rows),), Uint32)
    for n in range_constexpr(r.own_rounds(p.rows)):
        v = ptx.lds128(s_own + ((n * r.warps + warp) * 32 + lane) * 16)
        for j in range_constexpr(4):
            w[4 * n + j] = v[j]
    return w


@cute.jit
def store_own(
    r: Constexpr[Ring],
    p: Constexpr[Product],
    w: cute.Tensor,
    s_x: Int32,
    s_fx: Int32,
    warp: Int32,
    lane: Int32,
):
    """What `load_own` loaded, FP8-quantized: codes as they are or, as p.x wants it, as f16, which spares
    whoever multiplies f16 a conversion per unit. Visible behind `stream.meet_part`.
    """
    for n in range_constexpr(r.own_rounds(p.rows)):
        row, unit = own_block(r, p, n, warp, lane)
        s_row = s_x + row * p.x_stride
        s_scale = s_fx + (row * p.units + unit) * 4
        if const_expr(p.x == "e4m3"):
            quantize.quantize_block(quantize.floats8(w, n), s_row + unit * 128, s_scale, lane)
        else:
            quantize.widen_block(quantize.floats8(w, n), s_row + unit * 256, s_scale, lane)


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
    """RMSNorm with f32 gain, rounded to bf16, then as p.x wants it: (x * rsqrt(mean(x^2) + eps)) * gain.

    `s_squares` is scratch, f32 [rows][blocks]; `s_bar` completes when the gain has arrived. Contains a CTA
    barrier.
    """
    rounds = const_expr(p.block_rounds(threads))
    w = load_blocks(p, g_x, 2 * p.k, 0, rounds, thread, threads)
    for n in range_constexpr(rounds):
        r = quantize.floats8(w, n)
        square = Float32(0.0)
        for j in range_constexpr(8):
            square = square + r[j] * r[j]
        square = ptx.lanes_sum(square, 16)
        if thread % 16 == 0:
            ptx.sts_f32(s_squares + block_of(p, n, thread, threads) * 4, square)
    ptx.sync_threads(threads)
    arrived(s_bar)
    for n in range_constexpr(rounds):
        block = block_of(p, n, thread, threads)
        row, unit = block // p.blocks, block % p.blocks
        mean = Float32(0.0)
        for j in range_constexpr(p.blocks):
            mean = mean + ptx.lds_f32(s_squares + (row * p.blocks + j) * 4)
        inverse = cute.math.rsqrt(mean * Float32(1.0 / p.k) + Float32(eps))
        r = quantize.floats8(w, n)
        for half in range_constexpr(2):
            gain = ptx.lds128(s_gain + (unit * 128 + thread % 16 * 8 + half * 4) * 4)
            for j in range_constexpr(4):
                r[4 * half + j] = ptx.round_bf16(r[4 * half + j] * inverse * gain[j].bitcast(Float32))
        put_block(p, r, s_x + row * p.x_stride, s_fx + block * 4, unit, thread % 32)
