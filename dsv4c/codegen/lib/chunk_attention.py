"""Attention of many tokens on wgmma (sm_90a): scores and values of 64 heads over 64 gathered keys at a time.

An item is 64 heads of a token; a CTA takes items in turn. One warpgroup finds the item's keys, its window's
newest first, and lays them down as bf16 rows [64][512] in eight columns of 128-byte swizzled pieces: the
right operand of the scores and, read along the keys, of the values. Two warpgroups compute the same scores
and softmax, and the values of half of the dimensions each. e4m3 codes become bf16 exactly: their bits, and a
power of two of at most 2^7.
"""

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import BFloat16, Boolean, Constexpr, Float32, Int32, Int64, Uint32, const_expr, range_constexpr
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.tensor_utils.layout import LayoutEnum

from dsv4c.codegen.lib import attention, ptx, rope, softmax
from dsv4c.codegen.lib.geometry import ROPE, Chunk

CONSUMERS = 256  # threads that multiply; the first
UNSEEN = -1.0e30  # is added to scores of keys that do not exist
LOWEST = -1.0e29  # of all scores that do

_asm = cute.arch.inline_ptx


@cute.jit
def open_ring(a: Constexpr[Chunk], s: Int32, tid: Int32):
    """The barriers of every stage: filled, and free. All threads."""
    if tid == 0:
        for i in range_constexpr(a.stages):
            ptx.mbarrier_init(s + a.o_bars + 8 * i, 4)
            ptx.mbarrier_init(s + a.o_bars + 8 * (a.stages + i), CONSUMERS // 32)
        cute.arch.mbarrier_init_fence()
    cute.arch.sync_threads()


@cute.jit
def tiles_of(a: Constexpr[Chunk], position: Int32):
    """Tiles of keys that a token sees; none without a position."""
    tiles = Int32(0)
    if position >= 0:
        tiles = (attention.visible_entries(a, position) + (a.window + a.tile - 1)) // a.tile
    return tiles


# Keys -------------------------------------------------------------------------------------------------------


@cute.jit
def gather(
    a: Constexpr[Chunk],
    s: Int32,
    window: tuple,
    entries: tuple,
    g_selected: Int64,
    g_positions: Int64,
    g_ring_slots: Int64,
    g_slots: Int64,
    block: Int32,
    warp: Int32,
    lane: Int32,
):
    """Four warps: the keys of this CTA's items into the ring, tile by tile. `window` and `entries` are the
    addresses of data, scale and tail.
    """
    cute.arch.setmaxregister_decrease(104)  # the multiplying threads have the others
    at, item = Int32(0), Int32(block)
    first = warp * 16 + lane // 4
    while item < a.items:
        token = item // a.head_tiles
        position = ptx.ldg32(g_positions + token * 4).bitcast(Int32)
        ring_slot = ptx.ldg32(g_ring_slots + token * 4).bitcast(Int32)
        slot = ptx.ldg32(g_slots + token * 4).bitcast(Int32)
        visible, tiles = attention.visible_entries(a, position), tiles_of(a, position)
        next0 = attention.read_selection(a, g_selected, token, first)
        next8 = attention.read_selection(a, g_selected, token, first + 8)
        for tile in cutlass.range(tiles, unroll=1):
            key = tile * a.tile + first
            place0 = attention.find_key(a, key, next0, position, visible)
            place8 = attention.find_key(a, key + 8, next8, position, visible)
            rows = read_row(a, window, entries, ring_slot, slot, place0, lane)
            next0 = attention.read_selection(a, g_selected, token, key + a.tile)
            next8 = attention.read_selection(a, g_selected, token, key + a.tile + 8)
            stage = at % a.stages
            full = s + a.o_bars + 8 * stage
            ptx.mbarrier_wait(full + 8 * a.stages, (at // a.stages & 1) ^ 1)
            if lane % 4 == 0:
                s_bias = s + a.o_bias + (stage * a.tile + first) * 4
                ptx.sts_f32(s_bias, Float32(0.0) if place0 >= 0 else Float32(UNSEEN))
                ptx.sts_f32(s_bias + 32, Float32(0.0) if place8 >= 0 else Float32(UNSEEN))
            s_tile = s + a.o_keys + stage * a.tile_bytes
            lay_row(a, s_tile, first, lane, place0 >= 0, rows)
            rows = read_row(a, window, entries, ring_slot, slot, place8, lane)
            lay_row(a, s_tile, first + 8, lane, place8 >= 0, rows)
            ptx.fence_async()
            cute.arch.sync_warp()
            if lane == 0:
                ptx.mbarrier_arrive(full)
            at = at + 1
        item = item + a.ctas


@cute.jit
def read_row(
    a: Constexpr[Chunk],
    window: tuple,
    entries: tuple,
    ring_slot: Int32,
    slot: Int32,
    place: Int32,
    lane: Int32,
):
    """A quarter of each block of a row at `place` (-1: any row), in flight: codes, two of their scales, and
    what is bf16.
    """
    row = Int64(ring_slot) * a.ring + cutlass.max(place, Int32(0))
    g_data, g_scale, g_tail = window
    if place >= a.ring:
        row = Int64(slot) * a.capacity + place - a.ring
        g_data, g_scale, g_tail = entries
    quarter = lane % 4
    codes, scales = [], []
    if const_expr(a.coded):
        scales = [ptx.ldg_u8(g_scale + row * 7 + at) for at in (quarter, cutlass.min(quarter + 4, Int32(6)))]
        codes = [ptx.ldg128(g_data + row * 448 + i * 64 + quarter * 16) for i in range(7)]
    g_plain = g_tail if const_expr(a.coded) else g_data
    g_plain = g_plain + row * (2 * a.width - 128 * a.coded) + quarter * 32
    plain = [ptx.ldg128(g_plain + i // 2 * 128 + i % 2 * 16) for i in range(2 * (8 - a.coded))]
    return codes, scales, plain


@cute.jit
def lay_row(a: Constexpr[Chunk], s_tile: Int32, key: Int32, lane: Int32, present: Boolean, row: tuple):
    """What `read_row` read, as bf16, to row `key` of a tile: pieces of 16 bytes, eight swizzled to a line. A
    key that does not exist is zeros, since its weight of 0 times whatever lies there may not be.
    """
    codes, scales, plain = row
    quarter, turn = lane % 4, key % 8
    s_line = s_tile + key * 128
    for i in range_constexpr(a.coded):
        byte = cute.arch.shuffle_sync(scales[i // 4], (lane & ~3) + i % 4)
        power = (byte + Uint32(120)) << Uint32(7)  # bf16 of 2^(byte - 7): codes in place lack 2^120
        power = (power | (power << Uint32(16))) if present else Uint32(0)
        words = [word for c in codes[i] for word in widened(c, power)]
        for half in range_constexpr(2):
            s_piece = s_line + i * 8192 + ((2 * quarter + half) ^ turn) * 16
            ptx.sts128(s_piece, *words[4 * half : 4 * half + 4])
    for i in range_constexpr(len(plain)):
        words = [word if present else Uint32(0) for word in plain[i]]
        s_piece = s_line + (a.coded + i // 2) * 8192 + ((2 * quarter + i % 2) ^ turn) * 16
        ptx.sts128(s_piece, *words)


@cute.jit
def widened(codes: Uint32, power: Uint32):
    """Four e4m3 as bf16 times a power of two, in two words: exact."""
    return _asm(
        "{ .reg .b32 t, u; "
        "prmt.b32 t, {$r0}, 0, 0x1404; shr.u32 u, t, 4; and.b32 u, u, 0x07F007F0; "
        "lop3.b32 u, t, 0x80008000, u, 0xEA; mul.rn.bf16x2 {$w0}, u, {$r1}; "
        "prmt.b32 t, {$r0}, 0, 0x3424; shr.u32 u, t, 4; and.b32 u, u, 0x07F007F0; "
        "lop3.b32 u, t, 0x80008000, u, 0xEA; mul.rn.bf16x2 {$w1}, u, {$r1}; }",
        write_only_types=[Uint32] * 2,
        read_only_args=[codes, power],
    )


# Queries ----------------------------------------------------------------------------------------------------


@cute.jit
def lay_queries(
    a: Constexpr[Chunk],
    s: Int32,
    g_q: Int64,
    frequency: Float32,
    token: Int32,
    head: Int32,
    position: Int32,
    warp: Int32,
    lane: Int32,
):
    """Eight warps: 64 heads of a token, normed per head and rotated, to the tile of queries; and the pairs'
    cosines and sines. All have multiplied the queries before; lane n knows frequency n.
    """
    cosine, sine = rope.cos_sin(position.to(Float32) * frequency)
    together = const_expr(4)  # heads in registers
    words = cute.make_rmem_tensor((together, 2, 4), Uint32)
    for part in range_constexpr(8 // together):
        first = warp * 8 + part * together
        g = g_q + ((Int64(token) * a.heads + head + first) * a.width + lane * 8) * 2
        for r in range_constexpr(together):
            for half in range_constexpr(2):
                piece = ptx.ldg128(g + (r * a.width + half * (a.width // 2)) * 2)
                for n in range_constexpr(4):
                    words[r, half, n] = piece[n]
        if const_expr(part == 0):
            ptx.sync_threads(CONSUMERS)
            if warp == 0:
                ptx.sts64(s + a.o_turns + lane * 8, cosine.bitcast(Uint32), sine.bitcast(Uint32))
        for r in range_constexpr(together):
            total = Float32(0.0)
            for half in range_constexpr(2):
                for n in range_constexpr(4):
                    total = total + attention.squares(a, words[r, half, n])
            f = attention.inverse_norm(a, ptx.lanes_sum(total, 32))
            for half in range_constexpr(2):
                for n in range_constexpr(4):
                    words[r, half, n] = attention.scaled(a, words[r, half, n], f)
        for n in range_constexpr(4):  # the last 64 elements: the second pieces of the last eight lanes
            pair = lane % 8 * 4 + n
            c, d = cute.arch.shuffle_sync(cosine, pair), cute.arch.shuffle_sync(sine, pair)
            if lane >= 24:
                for r in range_constexpr(together):
                    even, odd = ptx.bf16x2_to_f32x2(words[r, 1, n])
                    words[r, 1, n] = ptx.f32x2_to_bf16x2(even * c - odd * d, even * d + odd * c)
        for r in range_constexpr(together):
            row = first + r
            for half in range_constexpr(2):
                s_piece = s + a.o_q + (lane // 8 + 4 * half) * 8192 + row * 128 + (lane % 8 ^ row % 8) * 16
                ptx.sts128(s_piece, *[words[r, half, n] for n in range(4)])
    ptx.fence_async()
    ptx.sync_threads(CONSUMERS)


# Products ---------------------------------------------------------------------------------------------------


@cute.jit
def attend(
    a: Constexpr[Chunk],
    s: Int32,
    g_q: Int64,
    g_sink: Int64,
    g_frequencies: Int64,
    g_positions: Int64,
    g_out: Int64,
    block: Int32,
    tid: Int32,
    warp: Int32,
    lane: Int32,
):
    """Eight warps: queries, scores, softmax, values and results of this CTA's items."""
    cute.arch.setmaxregister_increase(200)
    group, thread = warp // 4, tid % 128
    k_major = OperandMajorMode.K
    by_keys = sm90.make_trivial_tiled_mma(BFloat16, BFloat16, k_major, k_major, Float32, (1, 1, 1), (64, 64))
    registers = warpgroup.OperandSource.RMEM
    by_values = sm90.make_trivial_tiled_mma(
        *(BFloat16, BFloat16, k_major, OperandMajorMode.MN, Float32, (1, 1, 1), (64, 256)), a_source=registers
    )
    queries = sm90.make_smem_layout_a(LayoutEnum.ROW_MAJOR, (64, 64, a.width), BFloat16, 1)
    keys = sm90.make_smem_layout_b(LayoutEnum.ROW_MAJOR, (64, 64, a.width), BFloat16, a.stages)
    s_q, s_k = _operand(s + a.o_q, queries), _operand(s + a.o_keys, keys)
    along_keys = cute.make_layout(
        ((64, 4), (8, 8), a.stages), stride=((1, 4096), (64, 512), a.tile_bytes // 2)
    )
    s_v = cute.make_tensor(s_k.iterator + group * (4 * 4096), along_keys)
    own, own_values = by_keys.get_slice(thread), by_values.get_slice(thread)
    q = by_keys.make_fragment_A(own.partition_A(s_q))
    k = by_keys.make_fragment_B(own.partition_B(s_k))
    v = by_values.make_fragment_B(own_values.partition_B(s_v))
    p = by_values.make_fragment_A(by_values.partition_shape_A((64, 64)))
    p_words = cute.recast_tensor(p, Uint32)
    score = cute.make_rmem_tensor(by_keys.partition_shape_C((64, 64)), Float32)
    o = cute.make_rmem_tensor(by_values.partition_shape_C((64, 256)), Float32)
    frequency = ptx.ldg_f32_constant(g_frequencies + lane * 4)
    row = warp % 4 * 16 + lane // 4  # and 8 more
    scale = const_expr(a.width**-0.5 * softmax.LOG2_E)

    at, item = Int32(0), Int32(block)
    while item < a.items:
        token, head = item // a.head_tiles, item % a.head_tiles * a.tile
        position = ptx.ldg32(g_positions + token * 4).bitcast(Int32)
        tiles = tiles_of(a, position)
        lay_queries(a, s, g_q, frequency, token, head, cutlass.max(position, Int32(0)), warp, lane)
        o.fill(0.0)
        m0, m8 = Float32(LOWEST), Float32(LOWEST)
        z0, z8 = Float32(0.0), Float32(0.0)
        for _ in cutlass.range(tiles, unroll=1):
            stage = at % a.stages
            full = s + a.o_bars + 8 * stage
            ptx.mbarrier_wait(full, at // a.stages & 1)
            warpgroup.fence()
            by_keys.set(warpgroup.Field.ACCUMULATE, False)
            for c in range_constexpr(a.width // 16):
                cute.gemm(by_keys, score, q[None, None, c, 0], k[None, None, c, stage], score)
                by_keys.set(warpgroup.Field.ACCUMULATE, True)
            warpgroup.commit_group()
            warpgroup.wait_group(0)
            n0, n8 = m0, m8
            for j in range_constexpr(8):
                bias = ptx.lds64(s + a.o_bias + (stage * a.tile + 8 * j + lane % 4 * 2) * 4)
                for i in range_constexpr(2):
                    score[4 * j + i] = score[4 * j + i] * Float32(scale) + bias[i].bitcast(Float32)
                    score[4 * j + 2 + i] = score[4 * j + 2 + i] * Float32(scale) + bias[i].bitcast(Float32)
                    n0 = cute.arch.fmax(n0, score[4 * j + i])
                    n8 = cute.arch.fmax(n8, score[4 * j + 2 + i])
            n0, n8 = ptx.lanes_max(n0, 4), ptx.lanes_max(n8, 4)
            old0, old8 = ptx.ex2(m0 - n0), ptx.ex2(m8 - n8)
            m0, m8 = n0, n8
            z0, z8 = z0 * old0, z8 * old8
            for j in range_constexpr(8):
                for i in range_constexpr(2):
                    score[4 * j + i] = ptx.ex2(score[4 * j + i] - n0)
                    score[4 * j + 2 + i] = ptx.ex2(score[4 * j + 2 + i] - n8)
                    z0, z8 = z0 + score[4 * j + i], z8 + score[4 * j + 2 + i]
                w = const_expr(j // 2 * 4 + j % 2 * 2)
                p_words[w] = ptx.f32x2_to_bf16x2(score[4 * j], score[4 * j + 1])
                p_words[w + 1] = ptx.f32x2_to_bf16x2(score[4 * j + 2], score[4 * j + 3])
            for j in range_constexpr(32):
                for i in range_constexpr(2):
                    o[4 * j + i] = o[4 * j + i] * old0
                    o[4 * j + 2 + i] = o[4 * j + 2 + i] * old8
            warpgroup.fence()
            by_values.set(warpgroup.Field.ACCUMULATE, True)
            for c in range_constexpr(4):
                cute.gemm(by_values, o, p[None, None, c], v[None, None, c, stage], o)
            warpgroup.commit_group()
            warpgroup.wait_group(0)
            if lane == 0:
                ptx.mbarrier_arrive(full + 8 * a.stages)
            at = at + 1
        g_row = g_out + ((Int64(token) * a.heads + head + row) * a.width + group * 256 + lane % 4 * 2) * 2
        for half in range_constexpr(2):
            m, z = (m8, z8) if const_expr(half) else (m0, z0)
            sink = ptx.ldg_f32_constant(g_sink + (head + row + 8 * half) * 4)
            z = ptx.lanes_sum(z, 4) + ptx.ex2(sink * Float32(softmax.LOG2_E) - m)
            inverse = ptx.divide(Float32(1.0), z) if position >= 0 else Float32(0.0)
            for j in range_constexpr(32):
                lo = ptx.round_bf16(o[4 * j + 2 * half] * inverse)
                hi = ptx.round_bf16(o[4 * j + 2 * half + 1] * inverse)
                if const_expr(j >= 32 - ROPE // 8):
                    s_turn = s + a.o_turns + (8 * (j - (32 - ROPE // 8)) + lane % 4 * 2) * 4
                    lo, hi = _turned_back(lo, hi, s_turn, group == 1)
                g = g_row + half * (8 * a.width * 2) + 16 * j
                ptx.stg32(g, ptx.f32x2_to_bf16x2(lo, hi))
        item = item + a.ctas


@cute.jit
def _turned_back(lo: Float32, hi: Float32, s_turn: Int32, turned: Boolean):
    """A pair under the inverse of its query's rotation, if `turned`."""
    if turned:
        turn = ptx.lds64(s_turn)
        c, d = turn[0].bitcast(Float32), turn[1].bitcast(Float32)
        lo, hi = lo * c + hi * d, hi * c - lo * d
    return lo, hi


def _operand(s: Int32, layout: cute.ComposedLayout) -> cute.Tensor:
    """Swizzled stages of an operand from `s` on."""
    pointer = cute.make_ptr(BFloat16, s, cute.AddressSpace.smem, assumed_align=1024)
    return cute.make_tensor(cute.recast_ptr(pointer, layout.inner, dtype=BFloat16), layout.outer)
