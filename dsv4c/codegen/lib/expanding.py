"""MXFP4 weights of a tile of `gemm`: bulk copies bring units as they are packed, warps expand them to e4m3 in
rows of 128 swizzled bytes. Two more copy rows of x meanwhile.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, Uint32, const_expr, range_constexpr

from dsv4c.codegen.lib import gemm, ptx, quantize, units
from dsv4c.codegen.lib.tiles import Tiles

_asm = cute.arch.inline_ptx

FAR = 9  # powers of two below the largest scale where e4m3 still holds all of e2m1, 12 being the largest

# Copying ----------------------------------------------------------------------------------------------------


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
    """A feeder's part of a tile's units, from step `begin` of k on, to the slots in front of those that
    expand them; `at` steps were copied before. One thread.

    Of each matrix, one or two, the tile has the 16-row tiles from `first` on, none after `last`.
    """
    each = const_expr(t.UNITS // t.FEEDERS)
    nbytes = const_expr(t.together * t.unit)
    g_tiles = []
    for n in range_constexpr(each):
        unit = const_expr(feeder * each + n)
        base = g_w[unit % 2] if const_expr(t.paired) else g_w[0]
        tile = cutlass.min(first + (unit // 2 if const_expr(t.paired) else unit), last)
        g_tiles.append(base + Int64(tile // t.tiles * t.group_bytes + tile % t.tiles * (t.span * t.unit)))
    for n in cutlass.range(t.steps // t.together, unroll=1):
        unit = begin + n * t.together
        behind = Int64(unit // t.span * (t.tiles * t.span * t.unit) + unit % t.span * t.unit)
        now = at // t.together + n
        slot = now % t.slots
        full = s + t.o_bars + 8 * (2 * t.stages + slot)
        ptx.mbarrier_wait(full + 8 * t.slots, (now // t.slots & 1) ^ 1)
        ptx.mbarrier_expect(full, Int32(each * nbytes))
        for i in range_constexpr(each):
            s_units = s + t.o_slots + slot * t.slot + (feeder * each + i) * nbytes
            ptx.bulk_load(s_units, g_tiles[i] + behind, Int32(nbytes), full)


@cute.jit
def copy_rows(
    t: Constexpr[Tiles],
    s: Int32,
    at: Int32,
    g_x: Int64,
    g_fx: Int64,
    rows: cute.Tensor,
    scaled_rows: cute.Tensor,
    begin: Int32,
    thread: Int32,
):
    """A tile's rows of x and their scales from step `begin` of k on into the ring; `at` steps were copied
    before. Thread of two warps, whose rows of x are `rows`; it lays down the scales of `scaled_rows`.
    """
    each = const_expr(t.height // t.COPIERS)
    g_rows = cute.make_rmem_tensor((t.own_rows,), Int64)
    for i in range_constexpr(t.own_rows):
        g_rows[i] = g_x + (Int64(rows[i]) * t.stride + thread % 8 * 16)
    scales = cute.make_rmem_tensor((each,), Uint32)
    for i in range_constexpr(each):
        scales[i] = ptx.ldg_u8(g_fx + Int64(scaled_rows[i]) * t.blocks + begin)
    for step in cutlass.range(t.steps, unroll=1):
        now = at + step
        stage = now % t.stages
        gemm.wait_free(t, s, now)
        full = s + t.o_bars + 8 * stage
        s_own = s + stage * t.x_stage + thread // 8 * 128 + (thread % 8 ^ thread // 8) * 16  # 8 rows apart
        for i in range_constexpr(t.own_rows):
            ptx.cp_async16(s_own + i * 1024, g_rows[i] + Int64((begin + step) * 128))
        ptx.cp_async_arrive(full)
        s_f = s + t.o_factors + stage * t.factors + thread * 4
        for i in range_constexpr(each):
            ptx.sts_f32(s_f + 4 * t.COPIERS * i, ptx.ue8m0_to_f32(scales[i]))
        cute.arch.sync_warp()
        if thread % 32 == 0:
            ptx.mbarrier_arrive(full)
        following = begin + cutlass.min(step + 1, Int32(t.steps - 1))
        for i in range_constexpr(each):
            scales[i] = ptx.ldg_u8(g_fx + Int64(scaled_rows[i]) * t.blocks + following)


# Expanding --------------------------------------------------------------------------------------------------


@cute.jit
def expand(t: Constexpr[Tiles], s: Int32, at: Int32, warp: Int32, lane: Int32):
    """A tile's weights from slots into its stages; `at` steps were expanded before. Warp of `t.EXPANDERS`.

    What is read is on its way before the stage is free, which hides most of it.
    """
    each = const_expr(t.UNITS // t.EXPANDERS)
    codes = cute.make_rmem_tensor((each, 8), Uint32)
    scales = cute.make_rmem_tensor((each, 2), Uint32)
    for n in cutlass.range(t.steps // t.together, unroll=1):
        now = at // t.together + n
        slot = now % t.slots
        full = s + t.o_bars + 8 * (2 * t.stages + slot)
        ptx.mbarrier_wait(full, now // t.slots & 1)
        s_slot = s + t.o_slots + slot * t.slot
        ranges = [scale_range(t, s_slot + i * t.unit, lane) for i in range(t.together)]
        for i in range_constexpr(t.together):
            top, least = ranges[i]
            step = at + n * t.together + i
            stage = step % t.stages
            s_own = s_slot + warp * (each * t.together * t.unit) + i * t.unit
            load_units(t, s_own, codes, scales, lane)
            gemm.wait_free(t, s, step)
            s_w = s + t.o_w + stage * t.w_stage + warp * (each * 2048)
            s_f = s + t.o_factors + stage * t.factors
            if top - least <= Uint32(FAR):
                if warp == 0 and lane == 0:
                    ptx.sts_f32(s_f + 2 * t.row_bytes, scaled_down(top, 1))
                lay_near(t, s_w, codes, scales, top, lane)
            else:
                if warp == 0 and lane == 0:
                    ptx.sts_f32(s_f + 2 * t.row_bytes, Float32(0.0))
                lay_far(t, s_w, s_f + t.row_bytes + warp * (each * 64), codes, scales, lane)
            cute.arch.sync_warp()
            if lane == 0:
                ptx.mbarrier_arrive(s + t.o_bars + 8 * stage)
        ptx.fence_async()
        cute.arch.sync_warp()
        if lane == 0:
            ptx.mbarrier_arrive(full + 8 * t.slots)


@cute.jit
def load_units(t: Constexpr[Tiles], s_own: Int32, codes: cute.Tensor, scales: cute.Tensor, lane: Int32):
    """A warp's units of a step, the first at `s_own`, to registers."""
    for n in range_constexpr(t.UNITS // t.EXPANDERS):
        s_unit = s_own + n * (t.together * t.unit)
        for half in range_constexpr(2):
            words = ptx.lds128(s_unit + 512 * half + lane * 16)
            for j in range_constexpr(4):
                codes[n, 4 * half + j] = words[j]
        pair = ptx.lds64(s_unit + 1024 + lane // 4 * 8)
        for half in range_constexpr(2):
            scales[n, half] = pair[half]


@cute.jit
def lay_near(
    t: Constexpr[Tiles], s_w: Int32, codes: cute.Tensor, scales: cute.Tensor, top: Uint32, lane: Int32
):
    """Units whose scales are 2^-`FAR` of 2^`top` or more as e4m3 in their rows, exact: times 2^(1 - top), by
    way of f16.
    """
    q, row = lane % 4, units.row_of(lane)
    less = (Uint32(30) - top) * Uint32(0x04000400)  # exponent of 2^15, which 2^1 and placed bits' 2^14 make
    for n in range_constexpr(t.UNITS // t.EXPANDERS):
        for c in range_constexpr(4):
            factors = []
            for r in range_constexpr(2):
                scale = scales[n, c // 2] >> Uint32(16 * (c % 2) + 8 * r) & Uint32(255)
                factors.append(scale * Uint32(0x04000400) + less)
            a = units.place_e2m1x8(codes[n, 2 * c])
            b = units.place_e2m1x8(codes[n, 2 * c + 1])
            s_piece = s_w + n * 2048 + row * 128 + ((2 * c + q // 2) ^ row) * 16 + q % 2 * 8
            for r in range_constexpr(2):
                low = scaled_to_e4m3x4(a[r], a[2 + r], factors[r])
                high = scaled_to_e4m3x4(b[r], b[2 + r], factors[r])
                ptx.sts64(s_piece + 1024 * r, low, high)


@cute.jit
def scaled_to_e4m3x4(low: Uint32, high: Uint32, factor: Uint32):
    """Two f16x2 times an f16x2 as four e4m3, rounded."""
    return _asm(
        "{ .reg .b32 a, b; .reg .b16 c, d; mul.rn.f16x2 a, {$r0}, {$r2}; mul.rn.f16x2 b, {$r1}, {$r2}; "
        "cvt.rn.satfinite.e4m3x2.f16x2 c, a; cvt.rn.satfinite.e4m3x2.f16x2 d, b; mov.b32 {$w0}, {c, d}; }",
        write_only_types=[Uint32],
        read_only_args=[low, high, factor],
    )


@cute.jit
def lay_far(
    t: Constexpr[Tiles],
    s_w: Int32,
    s_tops: Int32,
    codes: cute.Tensor,
    scales: cute.Tensor,
    lane: Int32,
):
    """Units as e4m3 in their rows, times 2^6 over the largest scale of their row, and what that leaves out to
    the row's factor.
    """
    q, row = lane % 4, units.row_of(lane)
    for n in range_constexpr(t.UNITS // t.EXPANDERS):
        tops = row_tops(scales[n, 0], scales[n, 1])
        if q == 0:
            for r in range_constexpr(2):
                ptx.sts_f32(s_tops + (n * 16 + row + 8 * r) * 4, scaled_down(tops[r], 6))
        for c in range_constexpr(4):
            tables = []
            for r in range_constexpr(2):
                scale = scales[n, c // 2] >> Uint32(16 * (c % 2) + 8 * r) & Uint32(255)
                tables.extend(e4m3_table(scale, tops[r]))
            a = e2m1x8_to_e4m3x4x2(codes[n, 2 * c], *tables)
            b = e2m1x8_to_e4m3x4x2(codes[n, 2 * c + 1], *tables)
            s_piece = s_w + n * 2048 + row * 128 + ((2 * c + q // 2) ^ row) * 16 + q % 2 * 8
            for r in range_constexpr(2):
                ptx.sts64(s_piece + 1024 * r, a[r], b[r])


@cute.jit
def e2m1x8_to_e4m3x4x2(r: Uint32, low: Uint32, high: Uint32, low8: Uint32, high8: Uint32):
    """A word of MXFP4 codes as placed -> four e4m3 of row g, four of row g + 8, neighbors along k.

    Magnitudes are looked up in the rows' tables of e4m3 bytes, of codes 0..3 and 4..7; signs are bits.
    """
    return _asm(
        "{ .reg .b32 t, u, s, p; "
        "shr.u32 t, {$r0}, 1; and.b32 u, t, 0x07070707; lop3.b32 s, {$r0}, 0x70707070, u, 0xEA; "
        "shf.r.wrap.b32 s, s, s, 12; prmt.b32 s, s, s, 0x2013; "
        "prmt.b32 p, {$r1}, {$r2}, s; lop3.b32 p, {$r0}, 0x80008000, p, 0xEA; "
        "lop3.b32 p, t, 0x00800080, p, 0xEA; prmt.b32 {$w0}, p, p, 0x2031; "
        "shr.u32 u, s, 16; prmt.b32 p, {$r3}, {$r4}, u; "
        "shl.b32 u, {$r0}, 7; lop3.b32 p, u, 0x00800080, p, 0xEA; "
        "shf.r.wrap.b32 u, {$r0}, {$r0}, 8; lop3.b32 p, u, 0x80008000, p, 0xEA; "
        "prmt.b32 {$w1}, p, p, 0x2013; }",
        write_only_types=[Uint32] * 2,
        read_only_args=[r, low, high, low8, high8],
    )


@cute.jit
def scale_range(t: Constexpr[Tiles], s_unit: Int32, lane: Int32):
    """(The largest, the least) of the tile's block scales. Whole warp."""
    words = ptx.lds128(s_unit + lane // 4 * (t.together * t.unit) + 1024 + lane % 4 * 16)
    halves = [half for r in words for half in (r & Uint32(0x00FF00FF), r >> Uint32(8) & Uint32(0x00FF00FF))]
    top, least = halves[0], halves[0]
    for n in range_constexpr(1, 8):
        top, least = _max16x2(top, halves[n]), _min16x2(least, halves[n])
    top = cutlass.max(top >> Uint32(16), top & Uint32(0xFFFF))
    least = cutlass.min(least >> Uint32(16), least & Uint32(0xFFFF))
    return _warp_max(top), Uint32(255) - _warp_max(Uint32(255) - least)


@cute.jit
def row_tops(low: Uint32, high: Uint32):
    """The largest of the four block scales of both rows of a lane: bytes are those of (one, other) in block 0
    and 1, then in block 2 and 3.
    """
    tops = []
    for r in range_constexpr(2):
        a = low >> Uint32(8 * r) & Uint32(0x00FF00FF)
        b = high >> Uint32(8 * r) & Uint32(0x00FF00FF)
        top = _max16x2(a, b)
        tops.append(cutlass.max(top >> Uint32(16), top & Uint32(255)))
    return tops


@cute.jit
def _max16x2(a: Uint32, b: Uint32):
    """The larger of each half."""
    return _asm("max.u16x2 {$w0}, {$r0}, {$r1};", write_only_types=[Uint32], read_only_args=[a, b])


@cute.jit
def _min16x2(a: Uint32, b: Uint32):
    """The smaller of each half."""
    return _asm("min.u16x2 {$w0}, {$r0}, {$r1};", write_only_types=[Uint32], read_only_args=[a, b])


@cute.jit
def _warp_max(r: Uint32):
    """The largest of a warp's."""
    return _asm("redux.sync.max.u32 {$w0}, {$r0}, 0xFFFFFFFF;", write_only_types=[Uint32], read_only_args=[r])


@cute.jit
def scaled_down(top: Uint32, by: Constexpr[int]):
    """2^(top - by - 127); no less than 2^-126."""
    return Uint32(cutlass.max(Int32(top) - by, Int32(1)) << Int32(23)).bitcast(Float32)


@cute.jit
def e4m3_table(scale: Uint32, top: Uint32):
    """e4m3 bytes of 2^(scale - top + 6) times 0 .5 1 1.5 and 2 3 4 6. Exact down to 2^-14 of 2^`top`; what is
    below is rounded as e4m3 rounds.
    """
    j = Int32(scale) - Int32(top) + 6  # at most 6
    f = Uint32(cutlass.max(j + 127, Int32(0)) << Int32(23)).bitcast(Float32)
    low = quantize.codes4(Float32(0.0), f * Float32(0.5), f, f * Float32(1.5))
    high = quantize.codes4(f * Float32(2.0), f * Float32(3.0), f * Float32(4.0), f * Float32(6.0))
    return low, high
