"""Attention of many tokens on wgmma (sm_90a): scores and values of 64 heads over 64 gathered keys at a time.

An item is 64 heads of a token, or all that it has, several times; a CTA takes items in turn. One warpgroup
finds the item's keys, its window's newest first, and lays them down as bf16 rows [64][512] in eight columns
of 128-byte swizzled pieces: the right operand of the scores and, read along the keys, of the values. Two
others compute scores in half of the dimensions each, exchange them, make weights of half of the keys each,
exchange these, and compute the values of half of the dimensions each. e4m3 codes become bf16 exactly: their
bits, and a power of two of at most 2^7.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import BFloat16, Boolean, Constexpr, Float32, Int32, Int64, Uint32, const_expr, range_constexpr
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.tensor_utils.layout import LayoutEnum

from dsv4c.codegen.lib import attention, ptx, rope, softmax
from dsv4c.codegen.lib.attention import Operands
from dsv4c.codegen.lib.geometry import ROPE, Chunk

CONSUMERS = 256  # threads that multiply; the first
GATHERERS = 128  # threads that find keys
FAR = 8.0  # a row's weights are 2^(score - m): m follows the largest score only where it is this far ahead
UNSEEN = -1.0e30  # is added to scores of keys that do not exist
LOWEST = -1.0e29  # of all scores that do

_asm = cute.arch.inline_ptx


class Place(NamedTuple):
    """Which of a CTA's threads this is: the first warps multiply, the others gather keys."""

    tid: Int32
    block: Int32
    warp: Int32
    lane: Int32


@cute.jit
def enter(a: Constexpr[Chunk], s: Int32) -> Place:
    """Open the barriers of every stage: filled, and free. All threads, before the wait."""
    tid, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    lane = cute.arch.lane_idx()
    if tid == 0:
        for i in range_constexpr(a.stages):
            ptx.mbarrier_init(s + a.o_bars + 8 * i, GATHERERS // 32)
            ptx.mbarrier_init(s + a.o_bars + 8 * (a.stages + i), CONSUMERS // 32)
        cute.arch.mbarrier_init_fence()
    cute.arch.sync_threads()
    return Place(tid, block, warp, lane)


@cute.jit
def tiles_of(a: Constexpr[Chunk], position: Int32):
    """Tiles of keys that a token sees; none without a position."""
    tiles = Int32(0)
    if position >= 0:
        tiles = (attention.visible_entries(a, position) + (a.window + a.tile - 1)) // a.tile
    return tiles


@cute.jit
def position_of(a: Constexpr[Chunk], m: Operands, item: Int32):
    """The position of an item's token, -1 for none; any, where there is no such item."""
    token = cutlass.min(item, Int32(a.items - 1)) // a.head_tiles
    return ptx.ldg32(m.positions.toint() + token * 4).bitcast(Int32)


@cute.jit
def head_of(a: Constexpr[Chunk], row: Int32):
    """The head in a row of an item, of the item's."""
    own = row
    if const_expr(a.own_heads < a.tile):
        own = row % a.own_heads
    return own


# Keys -------------------------------------------------------------------------------------------------------


@cute.jit
def gather(a: Constexpr[Chunk], m: Operands, s: Int32, place: Place) -> None:
    """Four warps, behind those that multiply: the keys of this CTA's items into the ring, tile by tile."""
    window = attention.addresses(m.window, m.window_scale, m.window_tail)
    entries = attention.addresses(m.entries, m.entries_scale, m.entries_tail)
    (g_selected,) = attention.addresses(m.selected)
    g_positions, g_slots, g_q = m.positions.toint(), m.slots.toint(), m.q.toint()
    g_ring_slots = g_slots if const_expr(m.ring_slots is None) else m.ring_slots.toint()
    warp, lane = place.warp - CONSUMERS // 32, place.lane
    cute.arch.setmaxregister_decrease(104)  # the multiplying threads have the others
    at, item = Int32(0), Int32(place.block)
    first = warp * 16 + lane // 4
    row = cute.make_rmem_tensor((a.row_words,), Uint32)
    while item < a.items:
        token = item // a.head_tiles
        position = ptx.ldg32(g_positions + token * 4).bitcast(Int32)
        ring_slot = ptx.ldg32(g_ring_slots + token * 4).bitcast(Int32)
        slot = ptx.ldg32(g_slots + token * 4).bitcast(Int32)
        visible, tiles = attention.visible_entries(a, position), tiles_of(a, position)
        next0 = attention.read_selection(a, g_selected, token, first)
        next8 = attention.read_selection(a, g_selected, token, first + 8)
        read_ahead(a, g_q, item, warp * 32 + lane)
        place0 = attention.find_key(a, first, next0, position, visible)
        read_row(a, row, find_row(a, window, entries, ring_slot, slot, place0, lane), lane)
        for tile in cutlass.range(tiles, unroll=1):
            key = tile * a.tile + first
            place8 = attention.find_key(a, key + 8, next8, position, visible)
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
            then = find_row(a, window, entries, ring_slot, slot, place8, lane)
            lay_row(a, s_tile, first, lane, place0 >= 0, row, then)
            place0 = attention.find_key(a, key + a.tile, next0, position, visible)
            then = find_row(a, window, entries, ring_slot, slot, place0, lane)
            lay_row(a, s_tile, first + 8, lane, place8 >= 0, row, then)
            cute.arch.sync_warp()
            if lane == 0:
                ptx.mbarrier_arrive(full)
            at = at + 1
        item = item + a.ctas


@cute.jit
def read_ahead(a: Constexpr[Chunk], g_q: Int64, item: Int32, thread: Int32):
    """Bring the queries of this CTA's next item to L2."""
    if item + a.ctas < a.items:
        size = const_expr(a.own_heads * a.width * 2)
        for n in range_constexpr(-(-size // 128 // GATHERERS)):
            if const_expr(size >= 128 * GATHERERS) or thread < size // 128:
                ptx.prefetch_l2(g_q + Int64(item + a.ctas) * size + (thread + n * GATHERERS) * 128)


@cute.jit
def find_row(
    a: Constexpr[Chunk],
    window: tuple,
    entries: tuple,
    ring_slot: Int32,
    slot: Int32,
    place: Int32,
    lane: Int32,
):
    """Where a row at `place` (-1: any row) has a quarter of each block of codes, scales, and what is bf16."""
    row = Int64(ring_slot) * a.ring + cutlass.max(place, Int32(0))
    g_data, g_scale, g_tail = window
    if place >= a.ring:
        row = Int64(slot) * a.capacity + place - a.ring
        g_data, g_scale, g_tail = entries
    quarter = lane % 4
    g_plain = g_tail if const_expr(a.coded) else g_data
    g_plain = g_plain + row * (2 * a.width - 128 * a.coded) + quarter * 32
    return g_data + row * 448 + quarter * 16, g_scale + row * 7, g_plain


@cute.jit
def read_row(a: Constexpr[Chunk], row: cute.Tensor, g_row: tuple, lane: Int32) -> None:
    """A quarter of each block of a row, in flight to registers: codes, what is bf16, and two scales."""
    if const_expr(a.coded):
        read_scales(a, row, g_row, lane)
    for i in range_constexpr(8):
        read_block(a, row, g_row, i)


@cute.jit
def read_block(a: Constexpr[Chunk], row: cute.Tensor, g_row: tuple, i: Constexpr[int]) -> None:
    """Block i of it."""
    if const_expr(i < a.coded):
        pieces = [ptx.ldg128(g_row[0] + i * 64)]
    else:
        pieces = [ptx.ldg128(g_row[2] + (i - a.coded) * 128 + half * 16) for half in range(2)]
    at = const_expr(4 * min(i, a.coded) + 8 * max(i - a.coded, 0))
    for n in range_constexpr(4 * len(pieces)):
        row[at + n] = pieces[n // 4][n % 4]


@cute.jit
def lay_row(
    a: Constexpr[Chunk],
    s_tile: Int32,
    key: Int32,
    lane: Int32,
    present: Boolean,
    row: cute.Tensor,
    then: tuple,
):
    """What `read_row` read, as bf16, to row `key` of a tile: pieces of 16 bytes, eight swizzled to a line. As
    soon as a block lies there, that of row `then` is in flight to its registers. A key that does not exist is
    zeros, since its weight of 0 times whatever lies there may not be.
    """
    quarter, turn = lane % 4, key % 8
    s_line = s_tile + key * 128
    scales = [row[a.row_words - 2], row[a.row_words - 1]]
    if const_expr(a.coded):
        read_scales(a, row, then, lane)
    for i in range_constexpr(8):
        at = const_expr(4 * min(i, a.coded) + 8 * max(i - a.coded, 0))
        words = []
        if const_expr(i < a.coded):
            byte = cute.arch.shuffle_sync(scales[i // 4], (lane & ~3) + i % 4)
            power = (byte + Uint32(120)) << Uint32(7)  # bf16 of 2^(byte - 7): codes in place lack 2^120
            power = (power | (power << Uint32(16))) if present else Uint32(0)
            words = [word for n in range(4) for word in widened(row[at + n], power)]
        else:
            words = [row[at + n] if present else Uint32(0) for n in range(8)]
        for half in range_constexpr(2):
            s_piece = s_line + i * 8192 + ((2 * quarter + half) ^ turn) * 16
            ptx.sts128(s_piece, *words[4 * half : 4 * half + 4])
        read_block(a, row, then, i)


@cute.jit
def read_scales(a: Constexpr[Chunk], row: cute.Tensor, g_row: tuple, lane: Int32) -> None:
    """Two scales of a row, in flight to registers."""
    for n in range_constexpr(2):
        row[a.row_words - 2 + n] = ptx.ldg_u8(g_row[1] + cutlass.min(lane % 4 + 4 * n, Int32(6)))


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
    together = const_expr(8)  # heads in registers
    words = cute.make_rmem_tensor((together, 2, 4), Uint32)
    for part in range_constexpr(8 // together):
        first = warp * 8 + part * together
        g = g_q + ((Int64(token) * a.heads + head + head_of(a, first)) * a.width + lane * 8) * 2
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
def attend(a: Constexpr[Chunk], m: Operands, s: Int32, place: Place) -> None:
    """Eight warps: queries, scores, softmax, values and results of this CTA's items."""
    g_q, g_sink, g_frequencies = m.q.toint(), m.sink.toint(), m.frequencies.toint()
    g_out = m.out.toint()
    tid, warp, lane = place.tid, place.warp, place.lane
    cute.arch.setmaxregister_increase(200)
    group, thread = warp // 4, tid % 128
    k_major = OperandMajorMode.K
    types = BFloat16, BFloat16, k_major
    first, more = (
        sm90.make_trivial_tiled_mma(*types, k_major, Float32, (1, 1, 1), (64, a.tile)) for _ in range(2)
    )
    first.set(warpgroup.Field.ACCUMULATE, False)
    more.set(warpgroup.Field.ACCUMULATE, True)
    by_values = sm90.make_trivial_tiled_mma(*types, OperandMajorMode.MN, Float32, (1, 1, 1), (64, 256))
    by_values.set(warpgroup.Field.ACCUMULATE, True)
    queries = sm90.make_smem_layout_a(LayoutEnum.ROW_MAJOR, (64, 64, a.width // 2), BFloat16, 1)
    keys = sm90.make_smem_layout_b(LayoutEnum.ROW_MAJOR, (64, 64, a.width), BFloat16, a.stages)
    weights = sm90.make_smem_layout_a(LayoutEnum.ROW_MAJOR, (64, 64, a.tile), BFloat16, 1)
    own_columns = group * (a.width // 2 * 128)  # a group multiplies in half of the dimensions
    s_q, s_k = _operand(s + a.o_q + own_columns, queries), _operand(s + a.o_keys + own_columns, keys)
    s_p = _operand(s + a.o_weights, weights)
    stage_size = const_expr(a.tile_bytes // 2)
    own_keys = cute.make_layout(((8, 8), (64, 4), a.stages), stride=((64, 512), (1, 4096), stage_size))
    along_keys = cute.make_layout(((64, 4), (8, 8), a.stages), stride=((1, 4096), (64, 512), stage_size))
    s_own, s_v = cute.make_tensor(s_k.iterator, own_keys), cute.make_tensor(s_k.iterator, along_keys)
    own, own_values = first.get_slice(thread), by_values.get_slice(thread)
    q = first.make_fragment_A(own.partition_A(s_q))
    k = first.make_fragment_B(own.partition_B(s_own))
    v = by_values.make_fragment_B(own_values.partition_B(s_v))
    p = by_values.make_fragment_A(own_values.partition_A(s_p))
    score = cute.make_rmem_tensor(first.partition_shape_C((64, a.tile)), Float32)
    o = cute.make_rmem_tensor(by_values.partition_shape_C((64, 256)), Float32)
    frequency = ptx.ldg_f32_constant(g_frequencies + lane * 4)
    row = warp % 4 * 16 + lane // 4  # and 8 more

    at, item = Int32(0), Int32(place.block)
    next_position = position_of(a, m, item)
    while item < a.items:
        token, head = item // a.head_tiles, item % a.head_tiles * a.own_heads
        position, next_position = next_position, position_of(a, m, item + a.ctas)
        tiles = tiles_of(a, position)
        sink0 = ptx.ldg_f32_constant(g_sink + (head + head_of(a, row)) * 4) * Float32(softmax.LOG2_E)
        sink8 = ptx.ldg_f32_constant(g_sink + (head + head_of(a, row + 8)) * 4) * Float32(softmax.LOG2_E)
        m0, m8 = Float32(LOWEST), Float32(LOWEST)
        z0, z8 = Float32(0.0), Float32(0.0)
        if tiles > 0:
            lay_queries(a, s, g_q, frequency, token, head, position, warp, lane)
        o.fill(0.0)
        if tiles > 0:
            for _ in cutlass.range(tiles, unroll=1):
                _start_scores(a, s, (first, more), score, q, k, at)
                warpgroup.wait_group(0)
                m0, m8, z0, z8, old0, old8 = weigh(a, s, score, m0, m8, z0, z8, at, group, row, warp, lane)
                if cute.arch.vote_any_sync((old0 != Float32(1.0)) | (old8 != Float32(1.0))):
                    for j in range_constexpr(32):
                        for i in range_constexpr(2):
                            o[4 * j + i] = o[4 * j + i] * old0
                            o[4 * j + 2 + i] = o[4 * j + 2 + i] * old8
                ptx.sync_threads(CONSUMERS)
                _start_values(a, by_values, o, p, v, at)
                _finish_values(a, s, at, lane)
                at = at + 1
            z0, z8 = add_up(a, s, z0, z8, group, row, lane)
        f0 = ptx.divide(Float32(1.0), z0 + ptx.ex2(sink0 - m0)) if tiles > 0 else Float32(0.0)
        f8 = ptx.divide(Float32(1.0), z8 + ptx.ex2(sink8 - m8)) if tiles > 0 else Float32(0.0)
        g_row = g_out + ((Int64(token) * a.heads + head + warp % 4 * 16) * a.width + group * 256) * 2
        if const_expr(a.own_heads == a.tile) or warp % 4 * 16 < a.own_heads:
            store(a, s, g_row, o, f0, f8, (group == 1) & (tiles > 0), warp, lane)
        item = item + a.ctas


@cute.jit
def _start_scores(
    a: Constexpr[Chunk],
    s: Int32,
    multiply: tuple,
    score: cute.Tensor,
    q: cute.Tensor,
    k: cute.Tensor,
    at: Int32,
):
    """Of the group's keys of a tile, once it is there; by the first MMA, and those that add to it."""
    stage = at % a.stages
    ptx.mbarrier_wait(s + a.o_bars + 8 * stage, at // a.stages & 1)
    ptx.fence_async()
    warpgroup.fence()
    for c in range_constexpr(a.width // 32):
        cute.gemm(multiply[min(c, 1)], score, q[None, None, c, 0], k[None, None, c, stage], score)
    warpgroup.commit_group()


@cute.jit
def _start_values(
    a: Constexpr[Chunk], multiply: cute.TiledMma, o: cute.Tensor, p: cute.Tensor, v: cute.Tensor, at: Int32
):
    """Of a tile whose weights are there."""
    warpgroup.fence()
    for c in range_constexpr(4):
        cute.gemm(multiply, o, p[None, None, c, 0], v[None, None, c, at % a.stages], o)
    warpgroup.commit_group()


@cute.jit
def _finish_values(a: Constexpr[Chunk], s: Int32, at: Int32, lane: Int32):
    """The tile's keys may be replaced."""
    warpgroup.wait_group(0)
    if lane == 0:
        ptx.mbarrier_arrive(s + a.o_bars + 8 * (a.stages + at % a.stages))


@cute.jit
def weigh(
    a: Constexpr[Chunk],
    s: Int32,
    score: cute.Tensor,
    m0: Float32,
    m8: Float32,
    z0: Float32,
    z8: Float32,
    at: Int32,
    group: Int32,
    row: Int32,
    warp: Int32,
    lane: Int32,
):
    """Weights of the group's half of a tile to shared memory, from scores of rows `row` and 8 more. Returns
    the rows' m and sums of weights, now of these keys too, and by what those of earlier ones and their values
    are multiplied.
    """
    scale = const_expr(a.width**-0.5 * softmax.LOG2_E)
    score = add_dimensions(a, s, score, group, warp, lane)
    n0, n8 = Float32(LOWEST), Float32(LOWEST)
    for j in range_constexpr(4):
        key = at % a.stages * a.tile + group * (a.tile // 2) + 8 * j + lane % 4 * 2
        bias = ptx.lds64(s + a.o_bias + key * 4)
        for i in range_constexpr(2):
            score[4 * j + i] = score[4 * j + i] * Float32(scale) + bias[i].bitcast(Float32)
            score[4 * j + 2 + i] = score[4 * j + 2 + i] * Float32(scale) + bias[i].bitcast(Float32)
            n0 = cute.arch.fmax(n0, score[4 * j + i])
            n8 = cute.arch.fmax(n8, score[4 * j + 2 + i])
    n0, n8 = ptx.lanes_max(n0, 4), ptx.lanes_max(n8, 4)
    other0, other8 = _exchange(a, s, n0, n8, group, row, lane)
    n0, n8 = cute.arch.fmax(n0, other0), cute.arch.fmax(n8, other8)
    n0 = n0 if n0 > m0 + Float32(FAR) else m0
    n8 = n8 if n8 > m8 + Float32(FAR) else m8
    old0, old8 = ptx.ex2(m0 - n0), ptx.ex2(m8 - n8)
    z0, z8 = z0 * old0, z8 * old8
    words = []
    for j in range_constexpr(4):
        for half in range_constexpr(2):
            top = n8 if const_expr(half) else n0
            lo, hi = ptx.ex2(score[4 * j + 2 * half] - top), ptx.ex2(score[4 * j + 2 * half + 1] - top)
            words.append(ptx.f32x2_to_bf16x2(lo, hi))
            if const_expr(half):
                z8 = z8 + lo + hi
            else:
                z0 = z0 + lo + hi
    line = row // 16 * 16 + lane % 16
    s_line = s + a.o_weights + line * 128
    for i in range_constexpr(2):
        piece = 4 * group + 2 * i + lane // 16
        ptx.stmatrix(s_line + (piece ^ line % 8) * 16, *words[4 * i : 4 * i + 4])
    ptx.fence_async()
    return n0, n8, z0, z8, old0, old8


@cute.jit
def add_dimensions(a: Constexpr[Chunk], s: Int32, score: cute.Tensor, group: Int32, warp: Int32, lane: Int32):
    """Scores of the group's half of the keys, over both groups' dimensions. Each has sums of all keys; the
    other's go by way of where the warp's results will be.
    """
    own = cute.make_rmem_tensor((16,), Float32)
    s_out = s + a.o_out + lane * 16
    s_sent, s_there = s_out + warp * (16 * 128), s_out + (warp ^ 4) * (16 * 128)
    cute.arch.sync_warp()  # results that were here have been read
    for n in range_constexpr(4):
        other = []
        for i in range_constexpr(4):
            lo, hi = score[4 * n + i], score[16 + 4 * n + i]
            own[4 * n + i] = hi if group == 1 else lo
            other.append((lo if group == 1 else hi).bitcast(Uint32))
        ptx.sts128(s_sent + n * 512, *other)
    ptx.sync_threads(CONSUMERS)
    for n in range_constexpr(4):
        there = ptx.lds128(s_there + n * 512)
        for i in range_constexpr(4):
            own[4 * n + i] = own[4 * n + i] + there[i].bitcast(Float32)
    return own


@cute.jit
def _exchange(a: Constexpr[Chunk], s: Int32, r0: Float32, r8: Float32, group: Int32, row: Int32, lane: Int32):
    """What the other group has of the same two rows. Lanes in fours have the same."""
    s_rows = s + a.o_rows + row * 4
    if lane % 4 == 0:
        ptx.sts_f32(s_rows + group * (a.tile * 4), r0)
        ptx.sts_f32(s_rows + group * (a.tile * 4) + 32, r8)
    ptx.sync_threads(CONSUMERS)
    s_other = s_rows + (1 - group) * (a.tile * 4)
    return ptx.lds_f32(s_other), ptx.lds_f32(s_other + 32)


@cute.jit
def add_up(a: Constexpr[Chunk], s: Int32, z0: Float32, z8: Float32, group: Int32, row: Int32, lane: Int32):
    """The rows' sums over both groups' keys, the first group's first."""
    z0, z8 = ptx.lanes_sum(z0, 4), ptx.lanes_sum(z8, 4)
    other0, other8 = _exchange(a, s, z0, z8, group, row, lane)
    return z0 + other0, z8 + other8


@cute.jit
def store(
    a: Constexpr[Chunk],
    s: Int32,
    g_rows: Int64,
    o: cute.Tensor,
    f0: Float32,
    f8: Float32,
    turned: Boolean,
    warp: Int32,
    lane: Int32,
):
    """A warp's 16 rows of 256 dimensions, or the first 8, multiplied by f0 and f8, to memory; by way of
    shared memory, 64 dimensions at a time, so that whole sectors are written. The last of them under the
    inverse rotation.
    """
    s_out = s + a.o_out + warp * (16 * 128)
    for part in range_constexpr(4):
        words = []
        for j in range_constexpr(8 * part, 8 * part + 8):
            for half in range_constexpr(2):
                f = f8 if const_expr(half) else f0
                lo, hi = ptx.round_bf16(o[4 * j + 2 * half] * f), ptx.round_bf16(o[4 * j + 2 * half + 1] * f)
                if const_expr(j >= 32 - ROPE // 8):
                    s_turn = s + a.o_turns + (8 * (j - (32 - ROPE // 8)) + lane % 4 * 2) * 4
                    lo, hi = _turned_back(lo, hi, s_turn, turned)
                words.append(ptx.f32x2_to_bf16x2(lo, hi))
        cute.arch.sync_warp()  # what was here has been read
        line = lane % 16
        for i in range_constexpr(4):
            piece = 2 * i + lane // 16
            ptx.stmatrix(s_out + line * 128 + (piece ^ line % 8) * 16, *words[4 * i : 4 * i + 4])
        cute.arch.sync_warp()
        for i in range_constexpr(min(a.own_heads, 16) // 4):
            line, piece = 4 * i + lane // 8, lane % 8
            w = ptx.lds128(s_out + line * 128 + (piece ^ line % 8) * 16)
            ptx.stg128(g_rows + line * (a.width * 2) + part * 128 + piece * 16, *w)


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
