"""Weight streaming: every warp keeps its own ring of bulk copies full, before and after
`griddepcontrol.wait`.

A round covers `tile_warps` tiles of 16 rows of each of `matrices` matrices; `k_warps` warps share a tile's k.
A step is `span` units of one warp. Packed weights put the steps that a CTA reads at the same time side by
side. No CTA barrier in the stream.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, const_expr, range_constexpr

from dsv4c.codegen.lib import ptx, units
from dsv4c.codegen.lib.shapes import BYTES, Product, Ring


@cute.jit
def open_ring(r: Constexpr[Ring], s_bars: Int32, warp: Int32, lane: Int32):
    """Initialize the warp's barriers."""
    if lane == 0:
        for i in range_constexpr(r.depth):
            ptx.mbarrier_init(s_bars + warp * (r.depth * 8) + 8 * i, 1)
        cute.arch.mbarrier_init_fence()
    cute.arch.sync_warp()


@cute.jit
def warp_base(r: Constexpr[Ring], g_group: Int64, warp: Int32):
    """Where the warp's stream starts in the tile group at `g_group` (of the warp's own matrix)."""
    return g_group + Int64((warp % (r.tile_warps * r.k_warps)) * r.step_bytes)


@cute.jit
def step_address(r: Constexpr[Ring], g_lane: Int64, step: Int32):
    """Address of a step of the warp's stream; lane i of `g_lane` holds round i's base. Whole warp."""
    if const_expr(r.rounds == 1):
        return g_lane + Int64(step * r.stride)
    base = shuffle64(g_lane, step // r.steps)
    return base + Int64((step % r.steps) * r.stride)


@cute.jit
def shuffle64(r: Int64, lane: Int32):
    """Lane `lane`'s 64-bit value."""
    lo = cute.arch.shuffle_sync(r.to(Int32), lane)
    hi = cute.arch.shuffle_sync((r >> Int64(32)).to(Int32), lane)
    return (hi.to(Int64) << Int64(32)) | (lo.to(Int64) & Int64(0xFFFFFFFF))


@cute.jit
def fill(r: Constexpr[Ring], s_ring: Int32, s_bars: Int32, warp: Int32, slot: Int32, g: Int64):
    """Put the step at `g` in flight into the warp's ring slot `slot`. One lane."""
    bar = s_bars + (warp * r.depth + slot) * 8
    ptx.mbarrier_expect(bar, Int32(r.step_bytes))
    ptx.bulk_load(s_ring + (warp * r.depth + slot) * r.step_bytes, g, Int32(r.step_bytes), bar)


@cute.jit
def prefetch(
    r: Constexpr[Ring], s_ring: Int32, s_bars: Int32, warp: Int32, lane: Int32, g_lane: Int64, rounds: Int32
):
    """Fill the warp's ring with the first steps of its `rounds` rounds (at most `r.rounds`)."""
    for i in range_constexpr(r.depth):
        g = step_address(r, g_lane, Int32(i))
        if lane == 0 and i < rounds * r.steps:
            fill(r, s_ring, s_bars, warp, Int32(i), g)


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
    g_lane: Int64,
    rounds: Int32,
    x_round: Constexpr[int] = 0,
    fx_round: Constexpr[int] = 0,
):
    """Multiply the warp's stream with the staged activations, refilling behind it.

    `s_scale` holds the FP8 block scales of the warp's matrix; round i reads activations `x_round` and
    `fx_round` bytes after round i-1's. Leaves the warp's sums at s_part as f32 [round][warp][rows][16].
    """
    p = r.product
    tile = warp % r.tile_warps
    part = (warp // r.tile_warps) % r.k_warps
    total = rounds * r.steps
    slot = Int32(0)
    phase = Int32(0)
    at = Int32(0)
    for i in cutlass.range(rounds, unroll=1):
        rC = cute.make_rmem_tensor((4,), Float32)
        rC.fill(0.0)
        for step in cutlass.range(r.steps, unroll=1):
            ptx.mbarrier_wait(s_bars + (warp * r.depth + slot) * 8, phase)
            s_step = s_ring + (warp * r.depth + slot) * r.step_bytes
            for j in range_constexpr(r.span):
                unit = (step * r.k_warps + part) * r.span + j
                scale = Float32(1.0)
                if const_expr(p.weight == "fp8"):
                    scale = ptx.lds_f32(s_scale + ((i * r.tile_warps + tile) * p.units + unit) * 4)
                s_unit = s_step + j * BYTES[p.weight]
                units.accumulate(p, rC, s_unit, s_x + i * x_round, s_fx + i * fx_round, unit, scale, lane)
            if const_expr(r.depth < r.steps * r.rounds):
                g = step_address(r, g_lane, at + r.depth)
                cute.arch.sync_warp()
                if lane == 0 and at + r.depth < total:
                    fill(r, s_ring, s_bars, warp, slot, g)
            at = at + 1
            slot = slot + 1
            if slot == r.depth:
                slot = Int32(0)
                phase = phase ^ 1
        store_partials(p, rC, s_part + (i * r.warps + warp) * (p.rows * 64), lane)


@cute.jit
def store_partials(p: Constexpr[Product], rC: cute.Tensor, s_part: Int32, lane: Int32):
    """Write a warp's fragment as f32 [rows][16]."""
    g = lane // 4
    column = (lane % 4) * 2
    for i in range_constexpr(2):
        if column < p.rows:
            ptx.sts_f32(s_part + column * 64 + (g + 8 * i) * 4, rC[2 * i])
        if column + 1 < p.rows:
            ptx.sts_f32(s_part + column * 64 + 64 + (g + 8 * i) * 4, rC[2 * i + 1])


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
