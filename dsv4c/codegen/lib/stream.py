"""Weight streaming: one warp of the CTA, the last, keeps a ring of bulk copies full, before and after
`griddepcontrol.wait`; the others multiply.

A round covers `tile_warps` tiles of 16 rows of each of `matrices` matrices; `k_warps` warps share a tile's k.
A step is `span` units of every warp. Packed weights put the steps that a CTA reads at the same time side by
side, so that a step of a matrix is one copy. No CTA barrier in the stream.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, const_expr, range_constexpr

from dsv4c.codegen.lib import ptx, units
from dsv4c.codegen.lib.shapes import BYTES, Product, Ring


@cute.jit
def open_ring(r: Constexpr[Ring], s_bars: Int32, lane: Int32):
    """Initialize both barriers of every slot. One warp; others use them behind a barrier of the CTA."""
    if lane == 0:
        for i in range_constexpr(r.depth):
            ptx.mbarrier_init(s_bars + 8 * i, 1)
            ptx.mbarrier_init(s_bars + 8 * (r.depth + i), r.warps)
        cute.arch.mbarrier_init_fence()
    cute.arch.sync_warp()


@cute.jit
def shuffle64(r: Int64, lane: Int32):
    """Lane `lane`'s 64-bit value."""
    lo = cute.arch.shuffle_sync(r.to(Int32), lane)
    hi = cute.arch.shuffle_sync((r >> Int64(32)).to(Int32), lane)
    return (hi.to(Int64) << Int64(32)) | (lo.to(Int64) & Int64(0xFFFFFFFF))


@cute.jit
def produce(
    r: Constexpr[Ring],
    s_ring: Int32,
    s_bars: Int32,
    g_lane: Int64,
    apart: Int64,
    first: Int32,
    last: Int32,
    lane: Int32,
):
    """Copy steps `first` to `last` of the stream into the ring as its slots fall free, `r.ahead` in flight.

    Lane i of `g_lane` holds where the tiles of round i, modulo 32, start; a second matrix lies `apart` bytes
    behind. Whole warp.
    """
    number = first
    if const_expr(r.before > 0):
        number = first + r.before
    slot = number % r.depth
    turn = number // r.depth & 1  # how often the slot was filled, modulo 2
    for at in cutlass.range(first, last, unroll=1):
        g = shuffle64(g_lane, at // r.steps) + Int64(at % r.steps * r.stride)
        if lane == 0:
            if at >= r.depth - r.before:
                ptx.mbarrier_wait(s_bars + (r.depth + slot) * 8, turn ^ 1)
            if at >= r.ahead - r.before:
                before = at - (r.ahead - r.before)
                ptx.mbarrier_wait(s_bars + before % r.depth * 8, before // r.depth & 1)
            ptx.mbarrier_expect(s_bars + slot * 8, Int32(r.slot_bytes))
            for i in range_constexpr(r.matrices):
                s_matrix = s_ring + slot * r.slot_pitch + i * r.stride
                ptx.bulk_load(s_matrix, g + apart * i, Int32(r.stride), s_bars + slot * 8)
        slot = slot + 1
        if slot == r.depth:
            slot = Int32(0)
            turn = turn ^ 1


@cute.jit
def drained(r: Constexpr[Ring], s_bars: Int32, lane: Int32):
    """Wait until all slots have been read for the last time. Whole warp."""
    if lane == 0:
        for i in range_constexpr(r.depth):
            last = const_expr((r.steps * r.rounds - 1 - i) // r.depth)
            ptx.mbarrier_wait(s_bars + (r.depth + i) * 8, Int32(last % 2))
    cute.arch.sync_warp()


@cute.jit
def consume(
    r: Constexpr[Ring],
    s_ring: Int32,
    s_bars: Int32,
    s_x: Int32,
    s_fx: Int32,
    s_scale: Int32,
    s_part: Int32,
    warp: Int32,
    lane: Int32,
    rounds: Int32,
    x_round: Constexpr[int] = 0,
    fx_round: Constexpr[int] = 0,
    first: Int32 | int = 0,
    window: Constexpr[int] = 0,
):
    """Multiply the warp's part of the stream with the staged activations, and free the slots behind it: of
    so many rounds from step `first` on.

    `s_scale` holds the FP8 block scales of the warp's matrix; round i reads activations `x_round` and
    `fx_round` bytes after round i-1's. Leaves the warp's sums at s_part as f32 [round][warp][rows][16], or
    [round of the stream modulo `window`].
    """
    p = r.product
    tile = warp % r.tile_warps
    part = (warp // r.tile_warps) % r.k_warps
    number = Int32(first)
    if const_expr(r.before > 0):
        number = number + r.before
    slot = number % r.depth
    phase = number // r.depth & 1
    for i in cutlass.range(rounds, unroll=1):
        rC = cute.make_rmem_tensor((4,), Float32)
        rC.fill(0.0)
        for step in cutlass.range(r.steps, unroll=1):
            ptx.mbarrier_wait(s_bars + slot * 8, phase)
            s_step = s_ring + slot * r.slot_pitch + warp * r.step_bytes
            for j in range_constexpr(r.span):
                unit = (step * r.k_warps + part) * r.span + j
                scale = Float32(1.0)
                if const_expr(p.weight == "fp8"):
                    scale = ptx.lds_f32(s_scale + ((i * r.tile_warps + tile) * p.units + unit) * 4)
                s_unit = s_step + j * BYTES[p.weight]
                units.accumulate(p, rC, s_unit, s_x + i * x_round, s_fx + i * fx_round, unit, scale, lane)
            if const_expr(r.depth < r.all_steps):
                # What the next turn multiplies is on its way to registers, and a fence would wait for it.
                if const_expr(r.turns == 1 and r.after == 0):
                    ptx.fence_async()
                cute.arch.sync_warp()
                if lane == 0:
                    s_free = s_bars + (r.depth + slot) * 8
                    if const_expr(r.turns == 1 and r.after == 0):
                        ptx.mbarrier_arrive(s_free)
                    else:
                        ptx.mbarrier_arrive_after(s_free, rC[0])
            slot = slot + 1
            if slot == r.depth:
                slot = Int32(0)
                phase = phase ^ 1
        at = Int32(i)
        if const_expr(window > 0):
            at = (first // r.steps + i) % window
        store_partials(p, rC, s_part + (at * r.warps + warp) * (p.rows * 64), lane)


@cute.jit
def meet_part(r: Constexpr[Ring], warp: Int32):
    """The warps of a part of k wait for each other: what they staged is there, what they read is free."""
    if const_expr(r.sharing == 1):
        cute.arch.sync_warp()
    else:
        part = (warp // r.tile_warps) % r.k_warps
        cute.arch.barrier(barrier_id=ptx.PARTS + part, number_of_threads=32 * r.sharing)


@cute.jit
def store_partials(p: Constexpr[Product], rC: cute.Tensor, s_part: Int32, lane: Int32):
    """Write a warp's fragment as f32 [rows][16]."""
    row = units.row_of(lane)
    column = (lane % 4) * 2
    for i in range_constexpr(2):
        if column < p.rows:
            ptx.sts_f32(s_part + column * 64 + (row + 8 * i) * 4, rC[2 * i])
        if column + 1 < p.rows:
            ptx.sts_f32(s_part + column * 64 + 64 + (row + 8 * i) * 4, rC[2 * i + 1])


@cute.jit
def tile_sum(
    r: Constexpr[Ring], s_part: Int32, i: Int32, matrix: Int32, tile: Int32, row: Int32, column: Int32
):
    """Sum over the k-warps, in order: output `column` (0..15) of tile warp `tile` in round `i`, activation
    `row`.
    """
    value = Float32(0.0)
    for part in range_constexpr(r.k_warps):
        warp = (matrix * r.k_warps + part) * r.tile_warps + tile
        value = value + ptx.lds_f32(s_part + ((i * r.warps + warp) * r.product.rows + row) * 64 + column * 4)
    if const_expr(units.finish(r.product) != 1.0):
        value = value * Float32(units.finish(r.product))
    return value


@cute.jit
def load_block_scales(
    r: Constexpr[Ring],
    s_scale: Int32,
    g_scale: Int64,
    first: Int32,
    stride: Int32,
    tiles: Int32,
    thread: Int32,
    threads: Constexpr[int],
):
    """FP8 block scales of the CTA's tiles of one matrix, f32; round i holds tile group first + i * stride.

    `g_scale` is ue8m0 [ceil(tiles / 8)][units]; tiles beyond the matrix take the last block's scale.
    """
    p = r.product
    count = const_expr(r.rounds * r.tile_warps * p.units)
    for n in range_constexpr(-(-count // threads)):
        i = thread + n * threads
        if i < count:
            unit = i % p.units
            tile = (first + (i // (p.units * r.tile_warps)) * stride) * r.tile_warps + (
                i // p.units
            ) % r.tile_warps
            tile = cutlass.min(tile, tiles - 1)
            byte = ptx.ldg_u8_constant(g_scale + (tile // 8) * p.units + unit)
            ptx.sts_f32(s_scale + i * 4, ptx.ue8m0_to_f32(byte))


@cute.jit
def load_tile_scales(
    p: Constexpr[Product], s_scale: Int32, g_scale: Int64, tile: Int32, thread: Int32, threads: Constexpr[int]
):
    """FP8 block scales of one tile, f32 [units], from a matrix's ue8m0 [rows / 128][units]."""
    for n in range_constexpr(-(-p.units // threads)):
        i = thread + n * threads
        if i < p.units:
            byte = ptx.ldg_u8_constant(g_scale + (tile // 8) * p.units + i)
            ptx.sts_f32(s_scale + i * 4, ptx.ue8m0_to_f32(byte))
