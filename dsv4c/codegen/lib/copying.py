"""Copies of a tile of `gemm` into its ring: rows of x, their factors, units of weights.

Copies are asynchronous, past registers; those of weights are bulk copies, a thread's. Rows that no row is for
are the last one again.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, Int64, Uint32, const_expr, range_constexpr

from dsv4c.codegen.lib import ptx
from dsv4c.codegen.lib.tiles import Tiles


@cute.jit
def wait_free(t: Constexpr[Tiles], s: Int32, step: Int32):
    """Until what was in step `step`'s stage before is multiplied."""
    ptx.mbarrier_wait(s + t.o_bars + 8 * (t.stages + step % t.stages), (step // t.stages & 1) ^ 1)


# Weights ----------------------------------------------------------------------------------------------------


@cute.jit
def copy_units(
    t: Constexpr[Tiles],
    s: Int32,
    at: Int32,
    g_w: tuple,
    first: Int32,
    last: Int32,
    begin: Int32,
    feeder: Constexpr[int],
):
    """A feeder's part of a tile's units, from step `begin` of k on, into the ring; `at` steps were copied
    before. One thread.

    Of each matrix, one or two, the tile has the 16-row tiles from `first` on, none after `last`.
    """
    each = const_expr(t.UNITS // t.run // t.feeders)  # copies of a feeder
    nbytes = const_expr(t.run * t.unit)
    g_tiles = []
    for n in range_constexpr(each):
        unit = const_expr((feeder * each + n) * t.run)
        base = g_w[unit % 2] if const_expr(t.paired) else g_w[0]
        tile = cutlass.min(first + (unit // 2 if const_expr(t.paired) else unit), last)
        g_tiles.append(base + Int64(tile // t.tiles * t.group_bytes + tile % t.tiles * (t.span * t.unit)))
    for n in cutlass.range(t.steps, unroll=1):
        unit, stage = begin + n, (at + n) % t.stages
        behind = Int64(unit // t.span * (t.tiles * t.span * t.unit) + unit % t.span * t.unit)
        full = s + t.o_bars + 8 * stage
        wait_free(t, s, at + n)
        ptx.mbarrier_expect(full, Int32(each * nbytes))
        for i in range_constexpr(each):
            s_unit = s + t.o_w + stage * t.w_stage + (feeder * each + i) * nbytes
            ptx.bulk_load(s_unit, g_tiles[i] + behind, Int32(nbytes), full)


@cute.jit
def copy_plain(
    t: Constexpr[Tiles], s_w: Int32, g_w: Int64, first: Int32, last: Int32, step: Int32, thread: Int32
):
    """A step of rows of w as they lie in memory, those of 16-row tiles from `first` to `last`, in flight."""
    for i in range_constexpr(128 * 8 // t.COPIERS):
        row = thread // 8 + t.COPIERS // 8 * i
        own = cutlass.min(first + row // 16, last) * 16 + row % 16
        g = g_w + Int64(own) * (2 * t.k) + step * 128 + thread % 8 * 16
        ptx.cp_async16(s_w + row * 128 + (thread % 8 ^ row % 8) * 16, g)


# Rows -------------------------------------------------------------------------------------------------------


@cute.jit
def x_row(t: Constexpr[Tiles], i: Constexpr[int], thread: Int32):
    """The tile's row that is number `i` of those a thread copies pieces of."""
    return thread // 8 + i * (t.COPIERS // 8)


@cute.jit
def copy_rows(
    t: Constexpr[Tiles],
    s: Int32,
    at: Int32,
    g_x: Int64,
    g_fx: Int64,
    rows: cute.Tensor,
    scaled_rows: cute.Tensor,
    g_w: tuple,
    g_fw: tuple,
    first: Int32,
    last: Int32,
    begin: Int32,
    thread: Int32,
):
    """A tile's rows of x and factors from step `begin` of k on into the ring; `at` steps were copied before.
    Thread of two warps. Of plain weights these, too.

    `rows` are the thread's rows of x, `scaled_rows` those whose factors it lays down; `g_fw` is where FP8
    block scales of the tile's rows of weights start.
    """
    g_rows = cute.make_rmem_tensor((t.x_rows,), Int64)
    for i in range_constexpr(t.x_rows):
        g_rows[i] = g_x + (Int64(rows[i]) * t.stride + thread % 8 * 16)
    scales = cute.make_rmem_tensor((t.height // t.COPIERS + t.row_factors,), Int32)
    fetch_scales(t, scales, g_fx, scaled_rows, g_fw, begin)
    for step in cutlass.range(t.steps, unroll=1):
        now = at + step
        stage = now % t.stages
        wait_free(t, s, now)
        full, s_x = s + t.o_bars + 8 * stage, s + stage * t.x_stage
        s_own = s_x + thread // 8 * 128 + (thread % 8 ^ thread // 8) * 16  # rows are 8 apart
        for i in range_constexpr(t.x_rows):
            ptx.cp_async16(s_own + i * 1024, g_rows[i] + Int64((begin + step) * 128))
        if const_expr(t.weight == "plain"):
            copy_plain(t, s + t.o_w + stage * t.w_stage, g_w[0], first, last, begin + step, thread)
        ptx.cp_async_arrive(full)
        lay_factors(t, s + t.o_factors + stage * t.FACTORS, scales, thread)
        cute.arch.sync_warp()
        if thread % 32 == 0:
            ptx.mbarrier_arrive(full)
        following = begin + cutlass.min(step + 1, Int32(t.steps - 1))
        fetch_scales(t, scales, g_fx, scaled_rows, g_fw, following)


@cute.jit
def fetch_scales(
    t: Constexpr[Tiles], scales: cute.Tensor, g_fx: Int64, rows: cute.Tensor, g_fw: tuple, step: Int32
):
    """Scales of a step's rows and of its FP8 blocks, in flight to registers."""
    own = const_expr(t.height // t.COPIERS)
    if const_expr(t.scaled):
        for i in range_constexpr(own):
            scales[i] = Int32(ptx.ldg_u8(g_fx + Int64(rows[i]) * t.blocks + step))
        for m in range_constexpr(t.row_factors):
            scales[own + m] = Int32(ptx.ldg_u8_constant(g_fw[m] + step))


@cute.jit
def lay_factors(t: Constexpr[Tiles], s_f: Int32, scales: cute.Tensor, thread: Int32):
    """What each row's products of the step are multiplied by: the scales of x, and of FP8 weights."""
    own = const_expr(t.height // t.COPIERS)
    for i in range_constexpr(own):
        for m in range_constexpr(t.row_factors):
            f = ptx.ue8m0_to_f32(Uint32(scales[i])) * ptx.ue8m0_to_f32(Uint32(scales[own + m]))
            ptx.sts_f32(s_f + 512 * m + (thread + t.COPIERS * i) * 4, f)
