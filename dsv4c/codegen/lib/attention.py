"""Decode attention with K = V shared by all heads: query, keys, scores, softmax, values, exchange.

Warps 2n and 2n + 1 own dimensions 64n..64n+63 of every key and of 16 heads: each scores every other group of
16 keys, and sums up values of 32 of the dimensions. Scores are summed over the blocks in shared memory;
values need no sum. FP8 codes meet q and p in f16, where they are exact; BF16 rows stay bf16. Both products
accumulate in f32.

An MMA fragment's k index may be any permutation that both operands share, and keys of a tile may come in any
order: lane (g, q) = (lane / 4, lane % 4) takes dimensions 32h + 8q..+7 of a score's k, and keys 16j + 2g + e
as columns.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, Uint32, const_expr, range_constexpr

from dsv4c.codegen.lib import cluster, ptx, rope, softmax, stream
from dsv4c.codegen.lib.geometry import HEADS, ROPE, Attention, Chunk

_asm = cute.arch.inline_ptx


class Operands(NamedTuple):
    """q, out bf16[N, heads, width]; window [S, ring, width], entries [S, capacity, width], of FP8 with scales
    and a tail; selected i32[N, extra]; sink f32[heads]; frequencies f32[32]; positions, last, ring_slots,
    slots i32[N]. Without `last` windows end at positions, without `ring_slots` they are of `slots`.
    """

    q: cute.Pointer
    window: cute.Pointer
    window_scale: cute.Pointer | None
    window_tail: cute.Pointer | None
    entries: cute.Pointer | None
    entries_scale: cute.Pointer | None
    entries_tail: cute.Pointer | None
    selected: cute.Pointer | None
    sink: cute.Pointer
    frequencies: cute.Pointer
    positions: cute.Pointer
    last: cute.Pointer | None
    ring_slots: cute.Pointer | None
    slots: cute.Pointer
    out: cute.Pointer


class Place(NamedTuple):
    """Where a thread works: which of the cluster's CTAs, on 16 heads from `head` on of a token. Where the
    token is, and its keys are.
    """

    rank: Int32
    head: Int32
    token: Int32
    tid: Int32
    warp: Int32
    lane: Int32
    position: Int32
    last: Int32
    ring_slot: Int32
    slot: Int32


# The kernel -------------------------------------------------------------------------------------------------


@cute.jit
def enter(a: Constexpr[Attention], m: Operands, s: Int32) -> Place:
    """Open the exchange, and read constants and where the token is, which is older than the predecessor."""
    tid, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    warp, lane = cute.arch.make_warp_uniform(cute.arch.warp_idx()), cute.arch.lane_idx()
    rank = block % a.splits
    head = block // a.splits % a.head_tiles * HEADS
    token = block // (a.splits * a.head_tiles)
    position = _number(m.positions, token)
    last = position if const_expr(m.last is None) else _number(m.last, token)
    slot = _number(m.slots, token)
    ring_slot = slot if const_expr(m.ring_slots is None) else _number(m.ring_slots, token)
    open_exchange(a, s, m.sink.toint(), head, tid)
    if warp == 0:
        frequency = ptx.ldg_f32_constant(m.frequencies.toint() + lane * 4)
        c, sine = rope.cos_sin(position.to(Float32) * frequency)
        ptx.sts64(s + a.o_turns + lane * 8, c.bitcast(Uint32), sine.bitcast(Uint32))
    if const_expr(a.entries != "selected"):
        key = rank * a.tile + warp * a.tile_rows + lane
        place = find_key(a, key, key - a.window, last, visible_entries(a, position))
        prefetch_tile(a, m, ring_slot, slot, place, lane)
    return Place(rank, head, token, tid, warp, lane, position, last, ring_slot, slot)


@cute.jit
def _number(m_numbers: cute.Pointer | None, token: Int32) -> Int32:
    return ptx.ldg_early32(_address(m_numbers) + token * 4).bitcast(Int32)


@cute.jit
def prefetch_tile(
    a: Constexpr[Attention], m: Operands, ring_slot: Int32, slot: Int32, place: Int32, lane: Int32
):
    """The lane's row of the CTA's first tile to L2. A prefetch reads nothing: the step's own row may be
    written meanwhile.
    """
    window = addresses(m.window, m.window_scale, m.window_tail)
    entries = addresses(m.entries, m.entries_scale, m.entries_tail)
    if place >= 0 and lane < a.tile_rows:
        g = _row(a, window[0], entries[0], ring_slot, slot, place, a.data_bytes)
        for n in range_constexpr(-(-a.data_bytes // 128)):
            ptx.prefetch_l2(g + n * 128)
        if const_expr(a.format == "fp8"):  # whose rows end in other lines than they begin
            ptx.prefetch_l2(g + (a.data_bytes - 1))
            ptx.prefetch_l2(_row(a, window[1], entries[1], ring_slot, slot, place, a.scales))
            ptx.prefetch_l2(_row(a, window[2], entries[2], ring_slot, slot, place, ROPE * 2))


@cute.jit
def prepare_early(a: Constexpr[Attention], m: Operands, s: Int32, at: Place) -> cute.Tensor:
    """The query's fragments before the wait, where entries are selected: the query is older than the
    selection, and whoever lets this kernel begin has waited for it.
    """
    words = read_query(a, m.q.toint(), at.token, at.head, at.warp, at.lane)
    return prepare_query(a, s, words, at.warp, at.lane)


@cute.jit
def attend(a: Constexpr[Attention], m: Operands, s: Int32, at: Place, early: cute.Tensor | None = None):
    """The heads' results. A query that was not prepared `early` is while keys are on their way.

    This CTA's tiles are rank, rank + splits, ...; lane i of a warp looks after one key of each.
    """
    warp, lane = at.warp, at.lane
    window = addresses(m.window, m.window_scale, m.window_tail)
    entries = addresses(m.entries, m.entries_scale, m.entries_tail)
    g_selected = _address(m.selected)
    key = at.rank * a.tile + warp * a.tile_rows + lane
    query: cute.Tensor = (
        read_query(a, m.q.toint(), at.token, at.head, warp, lane) if const_expr(early is None) else early  # type: ignore[assignment]
    )
    entry = read_selection(a, g_selected, at.token, key)
    visible = visible_entries(a, at.position)
    tiles = Int32(0)
    if at.position >= 0:
        tiles = (a.window + a.tile - 1 + visible) // a.tile
    steps = (tiles - at.rank + a.splits - 1) // a.splits
    place = find_key(a, key, entry, at.last, visible)
    scales = cute.make_rmem_tensor(((a.tile_rows + 3) // 4,), Uint32)
    fetch_tile(a, s + a.o_keys, window, entries, scales, at.ring_slot, at.slot, place, warp, lane)
    if const_expr(early is None):
        query = prepare_query(a, s, query, warp, lane)

    o = cute.make_rmem_tensor((4, 4), Float32)
    o.fill(0.0)
    stats = cute.make_rmem_tensor((HEADS // a.warps, 2), Float32)
    for i in range_constexpr(HEADS // a.warps):
        stats[i, 0] = -Float32.inf
        stats[i, 1] = Float32(0.0)
    for step in cutlass.range(steps, unroll=1):
        publish_tile(a, s, scales, place, warp, lane)
        ptx.cp_async_wait(0)
        cute.arch.sync_threads()
        s_keys = s + a.o_keys
        if const_expr(a.stages > 1):
            s_keys = s + a.o_keys + step % 2 * (a.tile * a.row_bytes)
            if step + 1 < steps:
                key = key + a.splits * a.tile
                entry = read_selection(a, g_selected, at.token, key)
                place = find_key(a, key, entry, at.last, visible)
                s_next = s + a.o_keys + (step + 1) % 2 * (a.tile * a.row_bytes)
                fetch_tile(a, s_next, window, entries, scales, at.ring_slot, at.slot, place, warp, lane)
        scale = scores(a, s, s_keys, query, warp, lane)
        cute.arch.sync_threads()
        soften(a, s, stats, warp, lane)
        cute.arch.sync_threads()
        values(a, s, s_keys, o, scale, warp, lane)

    exchange(a, s, o, stats, at.rank, warp, lane)
    finish(a, s, m.out.toint(), at.token, at.head, at.rank, at.tid)


@cute.jit
def addresses(*components: cute.Pointer | None) -> tuple:
    return tuple(_address(c) for c in components)


@cute.jit
def _address(pointer: cute.Pointer | None) -> Int64:
    """Where an operand is, 0 for one that there is not."""
    return Int64(0) if const_expr(pointer is None) else pointer.toint()


# Instructions -----------------------------------------------------------------------------------------------


@cute.jit
def _copy16(s: Int32, g: Int64, present: Int32):
    """Asynchronous copy of 16 bytes, zeros unless `present`."""
    _asm(
        "{ .reg .pred p; .reg .b32 n; setp.ne.s32 p, {$r2}, 0; selp.b32 n, 16, 0, p; "
        "cp.async.cg.shared.global [{$r0}], [{$r1}], 16, n; }",
        read_only_args=[s, g, present],
    )


# The query --------------------------------------------------------------------------------------------------


@cute.jit
def read_query(
    a: Constexpr[Attention],
    g_q: Int64,
    token: Int32,
    head: Int32,
    warp: Int32,
    lane: Int32,
):
    """The lane's pieces [row half][h][pair] of 16 heads of q bf16[N, heads, width]; zeros past the last.
    Where entries are selected, before the wait.
    """
    w = cute.make_rmem_tensor((2, 2, 4), Uint32)
    w.fill(0)
    for i in range_constexpr(2):
        row = head + lane // 4 + 8 * i
        if row < a.heads:
            g = g_q + ((Int64(token) * a.heads + row) * a.width + warp // 2 * 64 + lane % 4 * 8) * 2
            for h in range_constexpr(2):
                if const_expr(a.entries == "selected"):
                    words = ptx.ldg_early128(g + h * 64)
                else:
                    words = ptx.ldg128(g + h * 64)
                for n in range_constexpr(4):
                    w[i, h, n] = words[n]
    return w


@cute.jit
def prepare_query(
    a: Constexpr[Attention],
    sm: Int32,
    w: cute.Tensor,
    warp: Int32,
    lane: Int32,
):
    """A fragments [2h + sub][4] of what `read_query` read, normed per head and rotated. One barrier.

    f16 for FP8 blocks, bf16 for BF16 ones.
    """
    block = warp // 2
    for i in range_constexpr(2):
        total = Float32(0.0)
        for h in range_constexpr(2):
            for n in range_constexpr(4):
                total = total + squares(a, w[i, h, n])
        total = ptx.lanes_sum(total, 4)
        if lane % 4 == 0 and warp % 2 == 0:  # the block's other warp has the same
            ptx.sts_f32(sm + a.o_squares + ((lane // 4 + 8 * i) * a.blocks + block) * 4, total)
    cute.arch.sync_threads()
    for i in range_constexpr(2):
        total = Float32(0.0)
        for n in range_constexpr(a.blocks // 2):
            pair = ptx.lds64(sm + a.o_squares + ((lane // 4 + 8 * i) * a.blocks + 2 * n) * 4)
            total = total + (pair[0].bitcast(Float32) + pair[1].bitcast(Float32))
        f = inverse_norm(a, total)
        for h in range_constexpr(2):
            for n in range_constexpr(4):
                w[i, h, n] = scaled(a, w[i, h, n], f)
    if block == a.blocks - 1:
        _rotate_query(a, sm, w, lane)
    elif const_expr(a.format == "fp8"):
        for i in range_constexpr(2):
            for h in range_constexpr(2):
                for n in range_constexpr(4):
                    w[i, h, n] = ptx.f32x2_to_f16x2(*ptx.bf16x2_to_f32x2(w[i, h, n]))
    fragments = cute.make_rmem_tensor((4, 4), Uint32)
    for h in range_constexpr(2):
        for sub in range_constexpr(2):
            for i in range_constexpr(4):
                fragments[2 * h + sub, i] = w[i % 2, h, 2 * sub + i // 2]
    return fragments


@cute.jit
def squares(a: Constexpr[Attention | Chunk], word: Uint32):
    """Sum of two squares; in the bf16 recipe each is rounded."""
    lo, hi = ptx.bf16x2_to_f32x2(ptx.mul_bf16x2(word, word))
    if const_expr(not a.exact_norm):
        lo, hi = ptx.bf16x2_to_f32x2(word)
        lo, hi = lo * lo, hi * hi
    return lo + hi


@cute.jit
def inverse_norm(a: Constexpr[Attention | Chunk], total: Float32):
    """rsqrt(total / width + eps); in the bf16 recipe mean, sum and root are each rounded."""
    mean = total * Float32(1.0 / a.width)
    if const_expr(a.exact_norm):
        mean = ptx.round_bf16(ptx.round_bf16(mean) + Float32(a.eps))
        return ptx.round_bf16(cute.math.rsqrt(mean, fastmath=True))
    return cute.math.rsqrt(mean + Float32(a.eps), fastmath=True)


@cute.jit
def scaled(a: Constexpr[Attention | Chunk], word: Uint32, f: Float32):
    """Two elements times f, rounded to bf16."""
    if const_expr(a.exact_norm):
        return ptx.mul_bf16x2(word, ptx.f32x2_to_bf16x2(f, f))
    lo, hi = ptx.bf16x2_to_f32x2(word)
    return ptx.f32x2_to_bf16x2(lo * f, hi * f)


@cute.jit
def _rotate_query(a: Constexpr[Attention], sm: Int32, w: cute.Tensor, lane: Int32):
    for h in range_constexpr(2):
        for n in range_constexpr(4):
            turn = ptx.lds64(sm + a.o_turns + (16 * h + lane % 4 * 4 + n) * 8)
            c, s = turn[0].bitcast(Float32), turn[1].bitcast(Float32)
            for i in range_constexpr(2):
                even, odd = ptx.bf16x2_to_f32x2(w[i, h, n])
                w[i, h, n] = ptx.f32x2_to_bf16x2(even * c - odd * s, even * s + odd * c)


# Keys -------------------------------------------------------------------------------------------------------


@cute.jit
def visible_entries(a: Constexpr[Attention | Chunk], position: Int32):
    """How many entries (or selections) the token may see; they come first."""
    count = Int32(0)
    if const_expr(a.entries != "none"):
        count = cutlass.min((position + 1) // a.ratio, Int32(a.extra))
    return count


@cute.jit
def read_selection(a: Constexpr[Attention | Chunk], g_selected: Int64, token: Int32, key: Int32):
    """The entry that key `key` of the list (window, then entries) stands for; negative in the window."""
    entry = key - a.window
    if const_expr(a.entries != "selected"):
        return entry
    if entry >= 0 and entry < a.extra:
        entry = ptx.ldg32(g_selected + (Int64(token) * a.extra + entry) * 4).bitcast(Int32)
    return entry


@cute.jit
def find_key(a: Constexpr[Attention | Chunk], key: Int32, entry: Int32, last: Int32, visible: Int32):
    """Where key `key` lies: ring row (`last` first), ring + entry, or -1. Selected means visible."""
    place = Int32(-1)
    if key < a.window:
        if key <= last:
            place = (last - key) % a.ring
    elif const_expr(a.entries == "selected"):
        if entry >= 0 and key < a.window + a.extra:
            place = a.ring + entry
    elif entry < visible:
        place = a.ring + entry
    return place


@cute.jit
def _row(
    a: Constexpr[Attention],
    g_window: Int64,
    g_entries: Int64,
    ring_slot: Int32,
    slot: Int32,
    place: Int32,
    nbytes: Constexpr[int],
):
    """Address of a component's row of `nbytes` at `place` of a slot (any valid address for -1)."""
    g = g_window + (Int64(ring_slot) * a.ring + cutlass.max(place, Int32(0))) * nbytes
    if const_expr(a.entries == "none"):
        return g
    if place >= a.ring:
        g = g_entries + (Int64(slot) * a.capacity + place - a.ring) * nbytes
    return g


@cute.jit
def fetch_tile(
    a: Constexpr[Attention],
    s_keys: Int32,
    window: tuple,
    entries: tuple,
    scales: cute.Tensor,
    ring_slot: Int32,
    slot: Int32,
    place: Int32,
    warp: Int32,
    lane: Int32,
):
    """Start copying the warp's rows of a tile; lane i < tile_rows knows the `place` of the i-th.

    Scale bytes go to registers: scales[n] is that of row 4n + lane / 8, block lane % 8. `window` and
    `entries` are the addresses of data, scale and tail.
    """
    chunks = a.data_bytes // 16
    present = cute.arch.vote_ballot_sync(place >= 0)
    s_rows = s_keys + warp * (a.tile_rows * a.row_bytes)
    g_row = _row(a, window[0], entries[0], ring_slot, slot, place, a.data_bytes)
    for n in range_constexpr(a.tile_rows):
        g = stream.shuffle64(g_row, Int32(n))
        for i in range_constexpr(-(-chunks // 32)):
            if lane + 32 * i < chunks:
                at = (lane + 32 * i) * 16
                _copy16(s_rows + n * a.row_bytes + at, g + at, present & (1 << n))
    if const_expr(a.format == "fp8"):
        g_tail = _row(a, window[2], entries[2], ring_slot, slot, place, ROPE * 2)
        g_scale = _row(a, window[1], entries[1], ring_slot, slot, place, a.scales)
        scales.fill(0)
        for n in range_constexpr(-(-a.tile_rows // 4)):
            i = 4 * n + lane // 8
            from_lane = cutlass.min(i, a.tile_rows - 1)
            there = (present >> from_lane) & 1
            g, g_byte = stream.shuffle64(g_tail, from_lane), stream.shuffle64(g_scale, from_lane)
            if i < a.tile_rows:
                at = lane % 8 * 16
                _copy16(s_rows + i * a.row_bytes + a.data_bytes + at, g + at, there)
                if lane % 8 < a.scales and there != 0:
                    scales[n] = ptx.ldg_u8(g_byte + lane % 8)
    ptx.cp_async_commit()


@cute.jit
def publish_tile(
    a: Constexpr[Attention], sm: Int32, scales: cute.Tensor, place: Int32, warp: Int32, lane: Int32
):
    """Scale bytes and visibility of the warp's rows to shared memory."""
    first = warp * a.tile_rows
    if const_expr(a.format == "fp8"):
        for n in range_constexpr(-(-a.tile_rows // 4)):
            i = 4 * n + lane // 8
            if i < a.tile_rows and lane % 8 < a.scales:
                ptx.sts_u8(sm + a.o_scale + lane % 8 * a.tile + first + i, scales[n])
    if lane < a.tile_rows:
        bias = Float32(0.0)
        if place < 0:
            bias = -Float32.inf
        ptx.sts_f32(sm + a.o_bias + (first + lane) * 4, bias)


# Scores -----------------------------------------------------------------------------------------------------


@cute.jit
def scores(a: Constexpr[Attention], sm: Int32, s_keys: Int32, q: cute.Tensor, warp: Int32, lane: Int32):
    """q . k over the block's dimensions for the warp's keys; returns what `values` scales by."""
    scale = Float32(1.0)
    block = warp // 2
    for n in range_constexpr(-(-a.tile // 32)):
        group = 2 * n + warp % 2
        if group < a.tile // 16:
            s_part = (
                sm + a.o_part + ((block * HEADS + lane // 4) * a.part_stride + group * 16 + lane % 4 * 4) * 4
            )
            s_row = s_keys + (lane // 4 * 2 + group * 16) * a.row_bytes
            if const_expr(a.format == "fp8"):
                if block < a.blocks - 1:
                    r = _scores16_fp8(a, s_row + block * 64 + lane % 4 * 8, q)
                    word = ptx.lds32(sm + a.o_scale + block * a.tile + group * 16 + lane % 4 * 4)
                    for i in range_constexpr(4):
                        f = (((word >> Uint32(8 * i)) & Uint32(0xFF)) << Uint32(23)).bitcast(Float32)
                        for half in range_constexpr(2):
                            r[i % 2, i // 2 + 2 * half] = r[i % 2, i // 2 + 2 * half] * f
                    _store_part(a, s_part, r)
                else:
                    _store_part(a, s_part, _scores16_bf16(a, s_row + a.data_bytes + lane % 4 * 16, q))
            else:
                _store_part(a, s_part, _scores16_bf16(a, s_row + block * 128 + lane % 4 * 16, q))
    if const_expr(a.format != "fp8"):
        return scale
    if block < a.blocks - 1:
        scale = relative_scales(a, sm, warp, lane)
    return scale


@cute.jit
def _scores16_fp8(a: Constexpr[Attention], s: Int32, q: cute.Tensor):
    """16 keys of codes: accumulators [e][4], keys 2g + e."""
    r = cute.make_rmem_tensor((2, 4), Float32)
    r.fill(0.0)
    for e in range_constexpr(2):
        for h in range_constexpr(2):
            words = ptx.lds64(s + e * a.row_bytes + h * 32)
            for sub in range_constexpr(2):
                b = ptx.e4m3x4_to_f16x2x2(words[sub])
                f = 2 * h + sub
                ptx.mma_f16(r[e, None], q[f, 0], q[f, 1], q[f, 2], q[f, 3], b[0], b[1])
    return r


@cute.jit
def _scores16_bf16(a: Constexpr[Attention], s: Int32, q: cute.Tensor):
    """16 keys of bf16: accumulators [e][4], keys 2g + e."""
    r = cute.make_rmem_tensor((2, 4), Float32)
    r.fill(0.0)
    for e in range_constexpr(2):
        for h in range_constexpr(2):
            b = ptx.lds128(s + e * a.row_bytes + h * 64)
            for sub in range_constexpr(2):
                f = 2 * h + sub
                ptx.mma_bf16(r[e, None], q[f, 0], q[f, 1], q[f, 2], q[f, 3], b[2 * sub], b[2 * sub + 1])
    return r


@cute.jit
def relative_scales(a: Constexpr[Attention], sm: Int32, warp: Int32, lane: Int32):
    """The block's key scales over the tile's largest, f16 to shared memory; returns that largest times 2^-15.

    Probabilities carry 2^15, so products keep f16's full precision down to 2^-29 of the largest.
    """
    steps = -(-a.tile // 32)
    first = warp // 2 * a.tile
    byte = cute.make_rmem_tensor((steps,), Int32)
    byte.fill(1)
    for i in range_constexpr(steps):
        if lane + 32 * i < a.tile:
            byte[i] = cutlass.max(ptx.lds_u8(sm + a.o_scale + first + lane + 32 * i).to(Int32), Int32(1))
    largest = byte[0]
    for i in range_constexpr(1, steps):
        largest = cutlass.max(largest, byte[i])
    largest = cute.arch.warp_redux_sync(largest, kind="max")
    if warp % 2 == 0:  # for both warps of the block
        for i in range_constexpr(steps):
            if lane + 32 * i < a.tile:
                exponent = Int32(15) + byte[i] - largest
                bits = exponent << Int32(10)
                if exponent < 1:  # subnormal
                    bits = Int32(1024) >> cutlass.min(Int32(1) - exponent, Int32(31))
                ptx.sts16(sm + a.o_factor + (first + lane + 32 * i) * 2, bits.to(Uint32))
    return ((cutlass.max(largest - 15, Int32(1))) << Int32(23)).bitcast(Float32)


@cute.jit
def _store_part(a: Constexpr[Attention], s: Int32, r: cute.Tensor):
    """Keys 4q..4q+3 of heads g and g + 8."""
    for i in range_constexpr(2):
        words = [r[n % 2, n // 2 + 2 * i].bitcast(Uint32) for n in range(4)]
        ptx.sts128(s + i * 8 * a.part_stride * 4, *words)


# Softmax ----------------------------------------------------------------------------------------------------


@cute.jit
def soften(a: Constexpr[Attention], sm: Int32, stats: cute.Tensor, warp: Int32, lane: Int32):
    """Add the blocks' scores up, update the warp's heads, and write the tile's probabilities.

    `stats` [heads of the warp][2]: maximum, and this lane's share of the weight. Scores are in powers of two;
    a lane has four keys.
    """
    steps = -(-a.tile // 128)
    to_log2 = Float32(a.width**-0.5 * softmax.LOG2_E)
    for n in range_constexpr(HEADS // a.warps):
        head = warp * (HEADS // a.warps) + n
        value = cute.make_rmem_tensor((steps, 4), Float32)
        value.fill(-Float32.inf)
        maximum = stats[n, 0]
        for i in range_constexpr(steps):
            column = lane * 4 + i * 128
            if column < a.tile:
                bias = ptx.lds128(sm + a.o_bias + column * 4)
                s_part = sm + a.o_part + (head * a.part_stride + column) * 4
                parts = [ptx.lds128(s_part + b * (HEADS * a.part_stride * 4)) for b in range(a.blocks)]
                for c in range_constexpr(4):
                    total = parts[0][c].bitcast(Float32)
                    for b in range_constexpr(1, a.blocks):
                        total = total + parts[b][c].bitcast(Float32)
                    value[i, c] = total * to_log2 + bias[c].bitcast(Float32)
            for c in range_constexpr(4):
                maximum = cute.arch.fmax(maximum, value[i, c])
        maximum = ptx.lanes_max(maximum, 32)
        correction = softmax.weight(stats[n, 0], maximum)
        stats[n, 1] = stats[n, 1] * correction
        stats[n, 0] = maximum
        for i in range_constexpr(steps):
            column = lane * 4 + i * 128
            for c in range_constexpr(4):
                value[i, c] = softmax.weight(value[i, c], maximum)
                stats[n, 1] = stats[n, 1] + value[i, c]
            if column < a.tile:
                _store_p(a, sm + (head * a.p_stride + column) * 2, value, i)
        if lane == 0:
            ptx.sts_f32(sm + a.o_correction + head * 4, correction)


@cute.jit
def _store_p(a: Constexpr[Attention], s: Int32, value: cute.Tensor, i: Constexpr[int]):
    """Four probabilities: bf16, and their bf16 values times 2^15 in f16."""
    p01, p23 = ptx.f32x2_to_bf16x2(value[i, 0], value[i, 1]), ptx.f32x2_to_bf16x2(value[i, 2], value[i, 3])
    ptx.sts64(s + a.o_p_bf16, p01, p23)
    if const_expr(a.format == "fp8"):
        words = []
        for p in (p01, p23):
            lo, hi = ptx.bf16x2_to_f32x2(p)
            words.append(ptx.f32x2_to_f16x2(lo * Float32(2.0**15), hi * Float32(2.0**15)))
        ptx.sts64(s + a.o_p_f16, *words)


# Values -----------------------------------------------------------------------------------------------------


@cute.jit
def values(
    a: Constexpr[Attention],
    sm: Int32,
    s_keys: Int32,
    o: cute.Tensor,
    scale: Float32,
    warp: Int32,
    lane: Int32,
):
    """o = o * correction + p . v * scale of the tile, over the warp's 32 dimensions.

    o [4][4]: dimension 4g' + n for column g', heads g and g + 8.
    """
    block, half = warp // 2, warp % 2
    r = cute.make_rmem_tensor((4, 4), Float32)
    r.fill(0.0)
    s_p = (lane // 4 * a.p_stride + lane % 4 * 2) * 2 + sm
    s_row = s_keys + lane % 4 * (2 * a.row_bytes)
    if const_expr(a.format == "fp8"):
        if block < a.blocks - 1:
            s_factor = sm + a.o_factor + (block * a.tile + lane % 4 * 2) * 2
            for j in range_constexpr(a.tile // 16):
                p = _load_p(a, s_p + a.o_p_f16 + j * 32)
                for i in range_constexpr(2):
                    f = ptx.lds32(s_factor + j * 32 + i * 16)
                    p[2 * i] = ptx.mul_f16x2(p[2 * i], f)
                    p[2 * i + 1] = ptx.mul_f16x2(p[2 * i + 1], f)
                _values16_fp8(a, s_row + j * 16 * a.row_bytes + block * 64 + half * 32 + lane // 4 * 4, p, r)
        else:
            _values_bf16(a, s_p, s_row + a.data_bytes + half * 64 + lane // 4 * 8, r)
    else:
        _values_bf16(a, s_p, s_row + block * 128 + half * 64 + lane // 4 * 8, r)
    for i in range_constexpr(2):
        correction = ptx.lds_f32(sm + a.o_correction + (lane // 4 + 8 * i) * 4)
        for n in range_constexpr(4):
            for c in range_constexpr(2):
                o[n, 2 * i + c] = o[n, 2 * i + c] * correction + r[n, 2 * i + c] * scale


@cute.jit
def _load_p(a: Constexpr[Attention], s: Int32):
    """A fragment of 16 heads and 16 keys."""
    p = cute.make_rmem_tensor((4,), Uint32)
    for i in range_constexpr(4):
        p[i] = ptx.lds32(s + i % 2 * (16 * a.p_stride) + i // 2 * 16)
    return p


@cute.jit
def _values16_fp8(a: Constexpr[Attention], s: Int32, p: cute.Tensor, r: cute.Tensor):
    """16 keys of codes: the lane's keys 2q, 2q+1, 2q+8, 2q+9, dimensions 4g..4g+3, paired along keys."""
    k = [ptx.lds32(s + n * a.row_bytes) for n in (0, 1, 8, 9)]
    for i in range_constexpr(2):
        selector = 0x7362 if i else 0x5140
        lo = ptx.e4m3x4_to_f16x2x2(ptx.permute(k[0], k[1], selector))
        hi = ptx.e4m3x4_to_f16x2x2(ptx.permute(k[2], k[3], selector))
        for n in range_constexpr(2):
            ptx.mma_f16(r[2 * i + n, None], p[0], p[1], p[2], p[3], lo[n], hi[n])


@cute.jit
def _values_bf16(a: Constexpr[Attention], s_p: Int32, s_row: Int32, r: cute.Tensor):
    """All keys of a tile of bf16 rows, lanes as above."""
    for j in range_constexpr(a.tile // 16):
        p = _load_p(a, s_p + a.o_p_bf16 + j * 32)
        k = [ptx.lds64(s_row + (16 * j + n) * a.row_bytes) for n in (0, 1, 8, 9)]
        for i in range_constexpr(2):
            for n in range_constexpr(2):
                selector = 0x7632 if n else 0x5410
                lo, hi = ptx.permute(k[0][i], k[1][i], selector), ptx.permute(k[2][i], k[3][i], selector)
                ptx.mma_bf16(r[2 * i + n, None], p[0], p[1], p[2], p[3], lo, hi)


# The exchange -----------------------------------------------------------------------------------------------

_DOWN = 2.0**-6  # on the way, so that sums of many large values fit f16


@cute.jit
def open_exchange(a: Constexpr[Attention], sm: Int32, g_sink: Int64, head: Int32, tid: Int32):
    """Make the inbox's barrier ready and tell the cluster; fetch the sinks, which are constants."""
    if tid < HEADS and head + tid < a.heads:
        ptx.sts_f32(sm + a.o_sink + tid * 4, ptx.ldg_f32_constant(g_sink + (head + tid) * 4))
    cluster.open_inbox(sm + a.o_barrier, a.splits * HEADS * (a.slice * 2 + 8), tid)
    cute.arch.cluster_arrive()


@cute.jit
def exchange(
    a: Constexpr[Attention],
    sm: Int32,
    o: cute.Tensor,
    stats: cute.Tensor,
    rank: Int32,
    warp: Int32,
    lane: Int32,
):
    """Send each CTA its dimensions of this split's output, and (maximum, weight) of every head."""
    cute.arch.cluster_wait()
    bar = sm + a.o_barrier
    dimension = warp * 32 + lane % 4 * 8
    for i in range_constexpr(2):
        words = [
            ptx.f32x2_to_f16x2(o[n, 2 * i + c] * Float32(_DOWN), o[n + 1, 2 * i + c] * Float32(_DOWN))
            for c, n in ((0, 0), (0, 2), (1, 0), (1, 2))  # dimensions 8q + 4c + n
        ]
        at = ((rank * HEADS + lane // 4 + 8 * i) * a.slice + dimension % a.slice) * 2
        cluster.send_128(sm + a.o_inbox + at, bar, dimension // a.slice, *words)
    for n in range_constexpr(HEADS // a.warps):
        weight = ptx.lanes_sum(stats[n, 1], 32)
        s_stats = sm + a.o_stats + (rank * HEADS + warp * (HEADS // a.warps) + n) * 8
        cluster.send_64(s_stats, bar, Int32(lane), stats[n, 0], weight, lane < a.splits)


@cute.jit
def finish(
    a: Constexpr[Attention],
    sm: Int32,
    g_out: Int64,
    token: Int32,
    head: Int32,
    rank: Int32,
    tid: Int32,
):
    """Merge the splits, divide by the denominator, turn the last 64 dimensions back, store bf16."""
    ptx.mbarrier_wait(sm + a.o_barrier, Int32(0))
    pairs = a.slice // 2
    for n in range_constexpr(-(-HEADS * pairs // (a.warps * 32))):
        unit = tid + n * (a.warps * 32)
        row = unit // pairs
        dimension = rank * a.slice + unit % pairs * 2
        if unit < HEADS * pairs and head + row < a.heads:
            lo, hi = _merge(a, sm, row, unit)
            if dimension >= a.width - ROPE:
                turn = ptx.lds64(sm + a.o_turns + (dimension - (a.width - ROPE)) * 4)
                c, s = turn[0].bitcast(Float32), turn[1].bitcast(Float32)
                lo, hi = lo * c + hi * s, hi * c - lo * s
            at = (Int64(token) * a.heads + head + row) * a.width + dimension
            ptx.stg32(g_out + at * 2, ptx.f32x2_to_bf16x2(lo, hi))


@cute.jit
def _merge(a: Constexpr[Attention], sm: Int32, row: Int32, unit: Int32):
    """Two dimensions of one head over all splits, divided, rounded to bf16; 0 if the token sees nothing."""
    stats = [ptx.lds64(sm + a.o_stats + (i * HEADS + row) * 8) for i in range(a.splits)]
    maximum = stats[0][0].bitcast(Float32)
    for i in range_constexpr(1, a.splits):
        maximum = cute.arch.fmax(maximum, stats[i][0].bitcast(Float32))
    sink = ptx.lds_f32(sm + a.o_sink + row * 4)
    denominator = ptx.ex2(sink * Float32(softmax.LOG2_E) - softmax.reference(maximum))
    lo, hi = Float32(0.0), Float32(0.0)
    for i in range_constexpr(a.splits):
        f = softmax.weight(stats[i][0].bitcast(Float32), maximum)
        denominator = denominator + stats[i][1].bitcast(Float32) * f
        word = ptx.lds32(sm + a.o_inbox + (i * HEADS * a.slice + unit * 2) * 2)
        part = ptx.f16x2_to_f32x2(word)
        lo, hi = lo + part[0] * f, hi + part[1] * f
    inverse = ptx.divide(Float32(1.0 / _DOWN), cute.arch.fmax(denominator, Float32(1e-30)))
    return ptx.round_bf16(lo * inverse), ptx.round_bf16(hi * inverse)
