"""Products of few rows of each expert with MXFP4 weights on tensor cores (sm_90a): what it takes is to read
the weights. They come by bulk copies as the GEMVs read them, and are multiplied as the GEMVs do it, out of
registers by 8 rows of x at a time. Exact up to the sums: those of 32 columns, a block, are multiplied by its
scale.

Rows of x lie as f16 in the order in which lanes read them. Two warps have the same 32 rows of w, each every
other unit along k.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, Uint32, const_expr, range_constexpr

from dsv4c.codegen.lib import gemm, ptx, swiglu, units
from dsv4c.codegen.lib.many_rows import Place
from dsv4c.codegen.lib.tiles import Few, FewRows


class Operands(NamedTuple):
    """x [M, k], e4m3 with ue8m0 scales per 128; w [experts, rows, k], or w and v whose columns SwiGLU pairs
    -> y bf16[N, rows]. order i32[experts, N], the numbers of rows of results of each expert, counts
    i32[experts], how many these are, weights f32[N], factors of rows of paired results.
    """

    x: cute.Pointer
    x_scale: cute.Pointer
    w: cute.Pointer
    v: cute.Pointer | None
    y: cute.Pointer
    order: cute.Pointer
    counts: cute.Pointer
    weights: cute.Pointer | None


class Work(NamedTuple):
    """Tiles of rows of all experts, and all tiles."""

    row_tiles: Int32
    tiles: Int32


class Rows(NamedTuple):
    """What a lane of the warp that copies rows knows of a tile: how many rows it has, the number of the one
    that is the lane's, two lanes having one, and where that row of x and its scales are.
    """

    rows: Int32
    number: Int32
    g_x: Int64
    g_scales: Int64


@cute.jit
def take_tiles(f: Constexpr[FewRows], m: Operands, s: Int32, place: Place, work: Work) -> None:
    """The first eight warps: products of the CTA's tiles, and their results."""
    t, thread = f.tiles, place.thread
    at, tile = Int32(0), Int32(place.block)
    while tile < work.tiles:
        _, x_bar, x_parity = stage_of(s + t.o_x_bars, t.X_STAGES, at)
        ptx.mbarrier_wait(x_bar, x_parity)
        s_numbers = s + t.o_numbers + at // t.steps % 2 * t.NUMBERS
        rows = Int32(ptx.lds32(s_numbers))
        to = Int32(ptx.lds32(s_numbers + 4 + thread // 16 * 4))
        weight = Float32(1.0)
        if const_expr(t.paired):
            weight = ptx.ldg_f32(m.weights.toint() + Int64(cutlass.max(to, Int32(0))) * 4)
        sums = cute.make_rmem_tensor((4, t.ROWS // 8, 2), Float32)
        sums.fill(0.0)
        if rows <= 8:
            multiply(t, s, at, sums, 1, place.warp, place.lane)
        else:
            multiply(t, s, at, sums, 2, place.warp, place.lane)
        meet_sums(t, s, sums, rows, place.warp, place.lane)
        first = tile // work.row_tiles * t.made
        store(t, s, m.y.toint(), to, Int32(f.columns), first, weight, f.limit, thread)
        at = at + t.steps
        tile = tile + f.ctas


@cute.jit
def read_weights(f: Constexpr[FewRows], m: Operands, s: Int32, place: Place, work: Work) -> None:
    """A warp: the tiles' weights into their ring."""
    t = f.tiles
    at, tile = Int32(0), Int32(place.block)
    while tile < work.tiles:
        number = tile // work.row_tiles
        expert, _ = gemm.find_expert(t, s, tile % work.row_tiles)
        weights = [m.w, *([m.v] if t.paired else [])]
        g_w = tuple(p.toint() + Int64(expert) * f.expert_bytes for p in weights)
        last = Int32((f.columns + 15) // 16 - 1)
        copy_weights(t, s, at, g_w, number * (t.made // 16), last, place.lane)
        at = at + t.steps
        tile = tile + f.ctas


@cute.jit
def read_rows(f: Constexpr[FewRows], m: Operands, s: Int32, place: Place, work: Work) -> None:
    """A warp: the tiles' rows into their ring. `AHEAD` steps of them are on their way, also from one tile to
    the next.
    """
    t, lane = f.tiles, place.lane
    at, tile, last = Int32(0), Int32(place.block), work.tiles - 1
    held = cute.make_rmem_tensor((t.AHEAD, t.TOGETHER, 17), Uint32)
    if tile <= last:
        own = _look_up(f, m, s, work, tile, lane)
        for i in range_constexpr(t.AHEAD):
            _fetch(t, held, i, own.g_x, own.g_scales, Int32(i))
        rows, number, g_x, g_scales = own.rows, own.number, own.g_x, own.g_scales
        while tile <= last:
            tile = tile + f.ctas
            following = _look_up(f, m, s, work, cutlass.min(tile, last), lane)
            copy_rows(t, s, at, held, Rows(rows, number, g_x, g_scales), following, lane)
            rows, number = following.rows, following.number
            g_x, g_scales = following.g_x, following.g_scales
            at = at + t.steps


@cute.jit
def _look_up(f: Constexpr[FewRows], m: Operands, s: Int32, work: Work, tile: Int32, lane: Int32) -> Rows:
    """The lane's row of tile number `tile`, its last one in place of one that it has not."""
    t = f.tiles
    expert, part = gemm.find_expert(t, s, tile % work.row_tiles)
    rows = Int32(ptx.ldg32(m.counts.toint() + expert * 4)) - part * t.ROWS
    row = part * t.ROWS + cutlass.min(lane // 2, rows - 1)
    number = Int32(ptx.ldg32(m.order.toint() + (Int64(expert) * f.rows + row) * 4))
    of_x = Int64(number // f.divide)
    g_x, g_scales = m.x.toint() + of_x * t.stride + lane % 2 * 16, m.x_scale.toint() + of_x * t.blocks
    return Rows(cutlass.min(rows, Int32(t.ROWS)), number, g_x, g_scales)


@cute.jit
def count(f: Constexpr[FewRows], m: Operands, s: Int32, place: Place) -> Work:
    """What there is to do. All threads."""
    row_tiles = gemm.count_tiles(f.tiles, s, m.counts.toint(), place.warp, place.lane)
    return Work(row_tiles, row_tiles * f.column_tiles)


# Stages -----------------------------------------------------------------------------------------------------


@cute.jit
def open_rings(t: Constexpr[Few], s: Int32, thread: Int32):
    """The barriers of every stage of weights and of rows: full, and free. All threads."""
    if thread == 0:
        for i in range_constexpr(t.STAGES + t.X_STAGES):
            ptx.mbarrier_init(s + t.o_bars + 16 * i, 1)
            ptx.mbarrier_init(s + t.o_bars + 16 * i + 8, t.CONSUMERS // 32)
        cute.arch.mbarrier_init_fence()
    cute.arch.sync_threads()


@cute.jit
def stage_of(s_bars: Int32, stages: Constexpr[int], step: Int32):
    """(A step's stage of a ring of so many, a power of two; its barriers; the parity of its turn.)"""
    stage = step & (stages - 1)
    return stage, s_bars + 16 * stage, step >> (stages.bit_length() - 1) & 1


@cute.jit
def copy_weights(t: Constexpr[Few], s: Int32, at: Int32, g_w: tuple, first: Int32, last: Int32, lane: Int32):
    """A tile's weights into their ring, of each matrix the 16-row tiles from `first` on, none after `last`;
    `at` steps were laid down before. A warp: eight lanes have a tile each.
    """
    tile, base = lane % 8, g_w[0]
    if const_expr(t.paired):
        tile = lane % 4
        if lane >= 4:
            base = g_w[1]
    tile = cutlass.min(first + tile, last)
    g = base + Int64(tile // t.tiles * t.group_bytes + tile % t.tiles * (t.span * t.UNIT))
    for step in cutlass.range(t.steps, unroll=1):
        stage, bar, turn = stage_of(s + t.o_bars, t.STAGES, at + step)
        ptx.mbarrier_wait(bar + 8, turn ^ 1)
        if lane == 0:
            ptx.mbarrier_expect(bar, Int32(t.w_stage))
        cute.arch.sync_warp()
        if lane < 8:
            unit = step * t.TOGETHER
            behind = unit // t.span * (t.tiles * t.span * t.UNIT) + unit % t.span * t.UNIT
            s_tile = s + t.o_w + stage * t.w_stage + lane * t.w_tile
            ptx.bulk_load(s_tile, g + Int64(behind), Int32(t.w_tile), bar)


@cute.jit
def copy_rows(
    t: Constexpr[Few],
    s: Int32,
    at: Int32,
    held: cute.Tensor,
    own: Rows,
    following: Rows,
    lane: Int32,
):
    """A tile's rows of x, as f16, and their scales into their ring. Its first steps are `held`, and those of
    the tile behind it when this returns; `at` steps were laid down before. A warp: two lanes have a row, each
    every other 16 columns. How many rows there are, and their numbers, -1 for none, are in shared memory when
    the first step is.
    """
    row, half = lane // 2, lane % 2
    s_numbers = s + t.o_numbers + at // t.steps % 2 * t.NUMBERS
    ptx.sts32(s_numbers, Uint32(own.rows))
    ptx.sts32(s_numbers + 4 + row * 4, Uint32(own.number if row < own.rows else Int32(-1)))
    # Of 32 columns; two pieces of 16 bytes change places so that lanes that write together meet in no bank.
    s_own = s + row // 8 * 512 + row % 8 * 64 + half * 32 + row // 2 % 2 * 16
    across = 16 - row // 2 % 2 * 32
    groups = const_expr(t.steps // t.AHEAD)
    for group in cutlass.range(groups, unroll=1):
        behind = (group + 1) * t.AHEAD
        g_x, g_scales = own.g_x, own.g_scales
        if group == groups - 1:
            behind, g_x, g_scales = Int32(0), following.g_x, following.g_scales
        for n in range_constexpr(t.AHEAD):
            stage, bar, parity = stage_of(s + t.o_x_bars, t.X_STAGES, at + group * t.AHEAD + n)
            ptx.mbarrier_wait(bar + 8, parity ^ 1)
            for i in range_constexpr(t.TOGETHER):
                unit = stage * t.TOGETHER + i
                s_unit = s_own + unit * t.X_UNIT
                for c in range_constexpr(4):
                    w = [ptx.e4m3x4_to_f16x2x2(held[n, i, 4 * c + j]) for j in range(4)]
                    ptx.sts128(s_unit + c * t.X_CHUNK, *w[0], *w[1])
                    ptx.sts128(s_unit + c * t.X_CHUNK + across, *w[2], *w[3])
                if half == 0:
                    f = ptx.ue8m0_to_f32(held[n, i, 16])
                    ptx.sts_f32(s + t.o_factors + (unit * t.ROWS + row) * 4, f)
            cute.arch.sync_warp()
            if lane == 0:
                ptx.mbarrier_arrive(bar)
            _fetch(t, held, n, g_x, g_scales, behind + n)


@cute.jit
def _fetch(t: Constexpr[Few], held: cute.Tensor, n: Constexpr[int], g_x: Int64, g_scales: Int64, step: Int32):
    """The lane's bytes of its row in step `step` and their scales, in flight to the registers of `n`."""
    for i in range_constexpr(t.TOGETHER):
        unit = step * t.TOGETHER + i
        for c in range_constexpr(4):
            w = ptx.ldg128(g_x + Int64(unit * 128 + c * 32))
            for j in range_constexpr(4):
                held[n, i, 4 * c + j] = w[j]
        held[n, i, 16] = ptx.ldg_u8(g_scales + unit)


@cute.jit
def multiply(
    t: Constexpr[Few],
    s: Int32,
    at: Int32,
    sums: cute.Tensor,
    eights: Constexpr[int],
    warp: Int32,
    lane: Int32,
):
    """Add the products of the warp's rows of w and part of k with `eights` times 8 rows of x, times 2^-14, to
    `sums`: f32 [4, a fragment of mma.sync][8 rows of x][16 rows of w]; `at` steps were multiplied before.
    """
    place, part = warp % t.PLACES, warp // t.PLACES
    s_w = s + t.o_w + place * (2 * t.w_tile) + part * t.UNIT
    s_x = s + part * t.X_UNIT + (lane ^ lane // 8 % 2) * 16
    s_f = s + t.o_factors + part * (t.ROWS * 4) + lane % 4 * 8
    for step in cutlass.range(t.steps, unroll=1):
        stage, bar, parity = stage_of(s + t.o_bars, t.STAGES, at + step)
        x_stage, x_bar, x_parity = stage_of(s + t.o_x_bars, t.X_STAGES, at + step)
        ptx.mbarrier_wait(x_bar, x_parity)
        ptx.mbarrier_wait(bar, parity)
        s_unit, s_row, s_scale = s_w + stage * t.w_stage, s_x + x_stage * t.x_stage, s_f + x_stage * t.F_STAGE
        _multiply_unit(t, sums, eights, s_unit, s_row, s_scale, lane)
        ptx.fence_async()
        cute.arch.sync_warp()
        if lane == 0:
            ptx.mbarrier_arrive(bar + 8)
            ptx.mbarrier_arrive(x_bar + 8)


@cute.jit
def _multiply_unit(
    t: Constexpr[Few],
    sums: cute.Tensor,
    eights: Constexpr[int],
    s_unit: Int32,
    s_x: Int32,
    s_f: Int32,
    lane: Int32,
):
    """Two units of w by one of x, scales included, to the sums."""
    scales = [ptx.lds64(s_unit + m * t.w_tile + 1024 + lane // 4 * 8) for m in range(2)]
    blocks = cute.make_rmem_tensor((4, eights, 2), Float32)
    blocks.fill(0.0)
    for c in range_constexpr(4):
        if const_expr(c % 2 == 0):
            w = [ptx.lds128(s_unit + m * t.w_tile + 256 * c + lane * 16) for m in range(2)]
        x = [ptx.lds128(s_x + c * t.X_CHUNK + j * 512) for j in range(eights)]
        for m in range_constexpr(2):
            products = cute.make_rmem_tensor((4, eights), Float32)
            products.fill(0.0)
            for h in range_constexpr(2):
                a = units.place_e2m1x8(w[m][c % 2 * 2 + h])
                for j in range_constexpr(eights):
                    ptx.mma_f16(products[None, j], a[0], a[1], a[2], a[3], x[j][2 * h], x[j][2 * h + 1])
            for row in range_constexpr(2):
                f = units.scale_byte(scales[m][c // 2], 2 * (c % 2) + row)
                for j in range_constexpr(eights):
                    for k in range_constexpr(2):
                        n = const_expr(2 * row + k)
                        blocks[n, j, m] = blocks[n, j, m] + products[n, j] * f
    for j in range_constexpr(eights):
        fx = ptx.lds64(s_f + 32 * j)
        for m in range_constexpr(2):
            for n in range_constexpr(4):
                sums[n, j, m] = sums[n, j, m] + blocks[n, j, m] * fx[n % 2].bitcast(Float32)


@cute.jit
def meet_sums(t: Constexpr[Few], s: Int32, sums: cute.Tensor, rows: Int32, warp: Int32, lane: Int32):
    """The tile's sums in shared memory, f32 [height][128]. All that multiply."""
    place, part = warp % t.PLACES, warp // t.PLACES
    s_own = s + t.o_sums + lane % 4 * 2 * t.PITCH + (place * 32 + units.row_of(lane)) * 4
    for turn in range_constexpr(t.TOGETHER):
        ptx.sync_threads(t.CONSUMERS)  # all have read the last tile's, or the other part is there
        if part == turn:
            for j in range_constexpr(t.ROWS // 8):
                if 8 * j < rows:
                    for m in range_constexpr(2):
                        for n in range_constexpr(4):
                            s_sum = s_own + (8 * j + n % 2) * t.PITCH + 64 * m + 32 * (n // 2)
                            total = sums[n, j, m] * Float32(t.FINISH)
                            if const_expr(turn > 0):
                                total = total + ptx.lds_f32(s_sum)
                            ptx.sts_f32(s_sum, total)
    ptx.sync_threads(t.CONSUMERS)


@cute.jit
def store(
    t: Constexpr[Few],
    s: Int32,
    g_y: Int64,
    row: Int32,
    columns: Int32,
    column: Int32,
    weight: Float32,
    limit: Constexpr[float],
    thread: Int32,
):
    """bf16 results from `column` on, of which those below `columns` exist, to `row` of y, -1 for none: row
    thread / 16 of the tile. Of paired matrices SwiGLU under `weight`.
    """
    s_row = s + t.o_sums + thread // 16 * t.PITCH
    first = column + thread % 16 * (t.made // 16)
    if row >= 0 and first < columns:
        g = g_y + (Int64(row) * columns + first) * 2
        if const_expr(t.paired):
            gate, up = ptx.lds128(s_row + thread % 16 * 16), ptx.lds128(s_row + 256 + thread % 16 * 16)
            made = [
                swiglu.swiglu(gate[i].bitcast(Float32), up[i].bitcast(Float32), limit, weight)
                for i in range(4)
            ]
            ptx.stg64(g, ptx.f32x2_to_bf16x2(made[0], made[1]), ptx.f32x2_to_bf16x2(made[2], made[3]))
        else:
            r = [*ptx.lds128(s_row + thread % 16 * 32), *ptx.lds128(s_row + thread % 16 * 32 + 16)]
            f = [word.bitcast(Float32) for word in r]
            ptx.stg128(g, *[ptx.f32x2_to_bf16x2(f[2 * i], f[2 * i + 1]) for i in range(4)])
