"""The experts' second half of few tokens: hidden rows quantized, multiplied with w2, and summed.

A CTA works on `tile_warps` tiles of columns, or on two times as many, of every expert that a token chose. Its
last warp reads the weights: the shared expert's before the wait, and those of the chosen ones, too, where by
what they are chosen is older. The tokens of a step take turns, and the stream goes on from one to the next.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, Int64, const_expr, range_constexpr

from dsv4c.codegen.lib import activations, nvfp4, ptx, router, stream
from dsv4c.codegen.lib.shapes import Down


class Operands(NamedTuple):
    """h [N, top_k, intermediate] and shared_h [N, intermediate], bf16 or NVFP4; expert_ids i32[N, top_k];
    positions i32[N], where rows may not be there; logits f32[N, experts] and bias f32[experts], or a table
    and tokens, where they say the experts before the wait; w2 [experts, hidden, intermediate] and shared_w2
    [hidden, intermediate], with FP8 block scales or NVFP4 global scales -> y [N, hidden].
    """

    h: cute.Pointer
    h_scale: cute.Pointer | None
    h_global_scale: cute.Pointer | None
    shared_h: cute.Pointer
    shared_h_scale: cute.Pointer | None
    shared_h_global_scale: cute.Pointer | None
    expert_ids: cute.Pointer
    positions: cute.Pointer | None
    logits: cute.Pointer | None
    bias: cute.Pointer | None
    table: cute.Pointer | None
    tokens: cute.Pointer | None
    w2: cute.Pointer
    w2_scale: cute.Pointer | None
    w2_global_scale: cute.Pointer | None
    shared_w2: cute.Pointer
    shared_w2_scale: cute.Pointer | None
    shared_w2_global_scale: cute.Pointer | None
    y: cute.Pointer


class Arrays(NamedTuple):
    """Shared arrays of a CTA, as `Down.at` lays them out."""

    ring: Int32
    shared_ring: Int32
    x: Int32
    fx: Int32
    shared_x: Int32
    shared_fx: Int32
    scale: Int32
    shared_scale: Int32
    part: Int32
    shared_part: Int32
    bars: Int32
    shared_bars: Int32
    bar: Int32
    own: Int32


class Place(NamedTuple):
    """What a thread works on: the CTA's `group` of tiles, of `token`."""

    s: Arrays
    group: Int32
    token: Int32
    tid: Int32
    warp: Int32
    lane: Int32


class Weights(NamedTuple):
    """The warp that reads the weights: its rings, and where the shared expert's tiles are."""

    s: Arrays
    group: Int32
    token: Int32
    lane: Int32
    shared: Int64


def _arrays(d: Down, s: Int32) -> Arrays:
    """Where they are; of streams that take the same slots the shared expert's is where the others' is."""
    own = {"shared_ring": "ring", "shared_bars": "bars"} if d.joined else {}
    return Arrays(*(s + getattr(d.at, own.get(name, name)) for name in Arrays._fields))


# The warp that reads the weights ----------------------------------------------------------------------------


@cute.jit
def open_weights(d: Constexpr[Down], m: Operands, s: Int32, group: Int32, token: Int32) -> Weights:
    """Before the wait: the shared expert's weights into flight."""
    lane = cute.arch.lane_idx()
    a, r = _arrays(d, s), d.shared
    if const_expr(not d.joined):
        stream.open_ring(r, a.shared_bars, lane)
    stream.open_ring(d.routed, a.bars, lane)
    ptx.arrive(ptx.OPEN, d.threads)
    g_shared = m.shared_w2.toint() + Int64(group) * (r.matrices * r.group_bytes)
    none, apart, depth = Int32(0), Int64(r.group_bytes), Int32(min(r.depth, r.steps))
    stream.produce(r, a.shared_ring, a.shared_bars, g_shared, apart, none, depth, lane)
    return Weights(a, group, token, lane, g_shared)


@cute.jit
def read_first(d: Constexpr[Down], m: Operands, at: Weights) -> Int64:
    """The first weights of the token's experts into flight, as far as the ring is deep: before the wait where
    what they are chosen by is older. Lane i has the address of expert i's tiles.
    """
    r, lane = d.routed, at.lane
    if const_expr(d.by == "scores"):
        g_logits = m.logits.toint() + Int64(at.token) * (d.experts * 4)
        chosen, _ = router.choose_experts(g_logits, m.bias.toint(), d.experts, d.padded, d.top_k, lane)
    elif const_expr(d.by == "table"):
        id = ptx.ldg32(m.tokens.toint() + at.token * 4).to(Int64)
        chosen = router.table_experts(m.table.toint() + id * (4 * d.top_k), d.top_k, lane)
    else:
        g_ids = m.expert_ids.toint() + Int64(at.token) * (d.top_k * 4)
        chosen = ptx.ldg32(g_ids + cutlass.min(lane, Int32(d.top_k - 1)) * 4)
    g_routed = _tiles(d, m, at.group, chosen.to(Int64))
    apart, early = Int64(r.group_bytes), Int32(d.early)
    stream.produce(r, at.s.ring, at.s.bars, g_routed, apart, Int32(0), early, lane)
    return g_routed


@cute.jit
def _tiles(d: Constexpr[Down], m: Operands, group: Int32, expert: Int64) -> Int64:
    r = d.routed
    return m.w2.toint() + expert * (d.groups * r.group_bytes) + Int64(group) * (r.matrices * r.group_bytes)


@cute.jit
def read_rest(d: Constexpr[Down], m: Operands, at: Weights, g_routed: Int64) -> None:
    """What is left of the shared expert's weights waits for slots that only the staged rows free; then come
    those of the token's experts, and of the tokens behind it.
    """
    r, shared, lane = d.routed, d.shared, at.lane
    apart, own = Int64(r.group_bytes), const_expr(d.top_k * r.steps)
    if const_expr(shared.depth < shared.steps):
        beside, depth, steps = Int64(shared.group_bytes), Int32(shared.depth), Int32(shared.steps)
        s_ring, s_bars = at.s.shared_ring, at.s.shared_bars
        stream.produce(shared, s_ring, s_bars, at.shared, beside, depth, steps, lane)
    stream.produce(r, at.s.ring, at.s.bars, g_routed, apart, Int32(d.early), Int32(own), lane)
    order, count = Int32(0), Int32(r.turns)
    if const_expr(d.skips):
        order, count = router.rows_present(m.positions.toint(), r.turns)
    if const_expr(r.turns > 1):
        for turn in cutlass.range(1, count if const_expr(d.skips) else r.turns, unroll=1):
            # Lane (turn * top_k + i) % 32 holds the address of expert i's tiles.
            i = cutlass.min((lane - turn * d.top_k) & 31, Int32(d.top_k - 1))
            row = router.nth_row(order, turn) if const_expr(d.skips) else turn
            g_ids = m.expert_ids.toint() + Int64(row) * (d.top_k * 4)
            g_next = _tiles(d, m, at.group, ptx.ldg32(g_ids + i * 4).to(Int64))
            begin = turn * own
            stream.produce(r, at.s.ring, at.s.bars, g_next, apart, begin, begin + own, lane)


# The others -------------------------------------------------------------------------------------------------


@cute.jit
def enter(d: Constexpr[Down], m: Operands, s: Int32, group: Int32, token: Int32) -> Place:
    """Before the wait: the shared expert's block scales."""
    tid, _, _ = cute.arch.thread_idx()
    lane = cute.arch.lane_idx()
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    a = _arrays(d, s)
    if const_expr(d.shared.product.weight == "fp8"):
        g_scale, first = m.shared_w2_scale.toint(), group
        if const_expr(d.shared.matrices > 1):
            first = group * d.shared.matrices
        none, tiles = Int32(0), Int32(d.tiles)
        stream.load_block_scales(d.shared, a.shared_scale, g_scale, first, none, tiles, tid, d.consumers)
    ptx.meet(ptx.OPEN, d.threads)
    if const_expr(not d.quantized):
        ptx.open_barrier(a.bar, tid)
        ptx.open_barrier(a.bar + 8, tid)
    return Place(a, group, token, tid, warp, lane)


@cute.jit
def sum_columns(d: Constexpr[Down], m: Operands, at: Place) -> None:
    """The rows' products with the weights, summed over the experts."""
    r, shared, s, tid, warp, lane = d.routed, d.shared, at.s, at.tid, at.warp, at.lane
    order, count = Int32(0), Int32(r.turns)
    if const_expr(d.skips):
        order, count = router.rows_present(m.positions.toint(), r.turns)
    g_ids = _ids(d, m, at.token)
    g_x = m.h.toint() + Int64(at.token) * (d.top_k * d.row_bytes)
    g_shared_x = m.shared_h.toint() + Int64(at.token) * d.row_bytes
    if const_expr(d.packed):
        g_fx = m.h_scale.toint() + Int64(at.token) * (d.top_k * d.rows.k // 16)
        g_shared_fx = m.shared_h_scale.toint() + Int64(at.token) * (d.rows.k // 16)
        p = shared.product
        shared_row = nvfp4.load_packed(p, g_shared_x, g_shared_fx, d.row_bytes, tid, d.consumers)
        rows = nvfp4.load_packed(d.rows, g_x, g_fx, d.row_bytes, tid, d.consumers)
    elif const_expr(d.quantized):
        distance = const_expr(d.row_bytes if r.turns > 1 else 0)
        shared_row = activations.load_own(shared, shared.product, g_shared_x, distance, warp, lane)
        rows = activations.load_own(r, d.rows, g_x, d.row_bytes, warp, lane)
    if const_expr(r.product.weight == "fp8"):
        first, tiles = Int32(0), Int32(d.tiles)
        for i in range_constexpr(d.top_k):
            expert = ptx.ldg32(g_ids + i * 4).to(Int64)
            g_scale = m.w2_scale.toint() + expert * (-(-d.hidden // 128) * r.product.units)
            s_round = s.scale + i * (r.scale_bytes // d.top_k)
            stream.load_block_scales(shared, s_round, g_scale, at.group, first, tiles, tid, d.consumers)

    # Activations.
    if const_expr(d.packed):
        g_gx = m.h_global_scale.toint() + Int64(at.token) * (d.top_k * 4)
        g_shared_gx = m.shared_h_global_scale.toint() + Int64(at.token) * 4
        p, n = shared.product, d.consumers
        nvfp4.expand_rows(p, shared_row, s.shared_x, s.shared_fx, g_shared_gx, d.row_bytes, tid, n)
        nvfp4.expand_rows(d.rows, rows, s.x, s.fx, g_gx, d.row_bytes, tid, n)
        ptx.sync_threads(d.consumers)
    elif const_expr(d.quantized):
        activations.store_own(shared, shared.product, shared_row, s.shared_x, s.shared_fx, warp, lane)
        activations.store_own(r, d.rows, rows, s.x, s.fx, warp, lane)
        stream.meet_part(r, warp)
        if const_expr(r.product.weight == "fp8"):
            ptx.sync_threads(d.consumers)
    else:
        none, single = Int64(0), shared.product
        if warp == 0:
            activations.copy_rows(single, s.shared_x, s.shared_fx, s.bar, g_shared_x, none, 0, lane)
            activations.copy_rows(d.rows, s.x, s.fx, s.bar + 8, g_x, none, d.row_bytes, lane)
        ptx.sync_threads(d.consumers)
        activations.arrived(s.bar)
        activations.arrived(s.bar + 8)

    # The streams.
    s_ring, s_bars, s_scale, s_part = s.shared_ring, s.shared_bars, s.shared_scale, s.shared_part
    stream.consume(shared, s_ring, s_bars, s.shared_x, s.shared_fx, s_scale, s_part, warp, lane, Int32(1))
    if const_expr(r.turns == 1):
        _multiply(d, at)
        _sum_apart(d, m, at, Int32(0), at.token, at.token, g_ids)
    else:
        for turn in cutlass.range(count if const_expr(d.skips) else r.turns, unroll=1):
            token_sum(d, m, at, turn, order, count)
    if const_expr(d.skips):
        g_positions = m.positions.toint()
        if warp < d.summing:  # the shared expert's alone, of tokens that take no turn
            for row in cutlass.range(1, r.turns, unroll=1):
                if ptx.ldg32(g_positions + row * 4).to(Int32) < 0:
                    _sum(d, m, at, row, row, Int32(0), Int64(0), False)


@cute.jit
def _ids(d: Constexpr[Down], m: Operands, token: Int32) -> Int64:
    """The token's experts."""
    return m.expert_ids.toint() + Int64(token) * (d.top_k * 4)


@cute.jit
def token_sum(d: Constexpr[Down], m: Operands, at: Place, nth: Int32, order: Int32, count: Int32) -> None:
    """The products of the nth token that takes a turn, of rows that are staged, and their sum with the shared
    expert's.
    """
    tid, _, _ = cute.arch.thread_idx()
    lane = cute.arch.lane_idx()
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    at = Place(_arrays(d, at.s.ring), at.group, at.token, tid, warp, lane)
    r = d.routed
    token, last, following = nth, Int32(r.turns - 1), Int32(0)
    if const_expr(d.skips):
        token = router.nth_row(order, nth)
        last = count - 1
        following = router.nth_row(order, cutlass.min(nth + 1, last))
    else:
        following = cutlass.min(nth + 1, last)
    g_ids = _ids(d, m, token)
    # The next token's rows are on their way meanwhile. (The last one's again at the end.)
    g_x = m.h.toint() + Int64(following) * (d.top_k * d.row_bytes)
    activations.copy_own(r, d.rows, at.s.own, g_x, d.row_bytes, warp, lane)
    _multiply(d, at, nth * (d.top_k * r.steps), d.window)
    rows = activations.copied_own(r, d.rows, at.s.own, warp, lane)
    stream.meet_part(r, warp)
    if nth < last:
        activations.store_own(r, d.rows, rows, at.s.x, at.s.fx, warp, lane)
    stream.meet_part(r, warp)
    _sum_apart(d, m, at, token, token, nth, g_ids)


@cute.jit
def _multiply(d: Constexpr[Down], at: Place, first: Int32 | int = 0, window: Constexpr[int] = 0) -> None:
    """A token's products with all of its experts."""
    s, stride = at.s, const_expr(d.rows.units * 4 if d.quantized else 0)
    stream.consume(
        d.routed,
        s.ring,
        s.bars,
        s.x,
        s.fx,
        s.scale,
        s.part,
        at.warp,
        at.lane,
        Int32(d.top_k),
        x_round=d.rows.x_stride,
        fx_round=stride,
        first=first,
        window=window,
    )


@cute.jit
def _sum_apart(
    d: Constexpr[Down], m: Operands, at: Place, row: Int32, token: Int32, nth: Int32, g_ids: Int64
) -> None:
    """The first warps sum up what all have left; the others go on, unless a ring deeper than a token is long
    would let one arrive twice.
    """
    if at.warp < d.summing:
        ptx.meet(ptx.SUMMED, d.consumers)
        _sum(d, m, at, row, token, nth, g_ids, True)
    else:
        if const_expr(d.routed.depth < d.top_k * d.routed.steps):
            ptx.arrive(ptx.SUMMED, d.consumers)
        else:
            ptx.meet(ptx.SUMMED, d.consumers)


@cute.jit
def _sum(
    d: Constexpr[Down],
    m: Operands,
    at: Place,
    row: Int32,
    token: Int32,
    nth: Int32,
    g_ids: Int64,
    routed: Constexpr[bool],
) -> None:
    """The warps' sums of `token`, of the shared expert's row `row` and of the `routed` ones, stored."""
    r, shared = d.routed, d.shared
    out = at.group * (16 * d.beside) + at.tid
    if at.tid < 16 * d.beside and out < d.hidden:
        side = Int32(0)
        tile, column = at.tid // 16, at.tid % 16
        if const_expr(r.matrices > 1):
            side, tile = tile // r.tile_warps, tile % r.tile_warps
        value = stream.tile_sum(shared, at.s.shared_part, Int32(0), side, tile, row, column)
        if const_expr(shared.product.weight == "nvfp4"):
            value = value * ptx.ldg_f32_constant(m.shared_w2_global_scale.toint())
        if const_expr(routed):
            for i in range_constexpr(d.top_k):
                turn = Int32(i)
                if const_expr(r.turns > 1):
                    turn = (nth * d.top_k + i) % d.window
                if const_expr(r.product.weight == "nvfp4"):
                    expert = ptx.ldg32(g_ids + i * 4).to(Int64)
                    factor = ptx.ldg_f32_constant(m.w2_global_scale.toint() + expert * 4)
                    own = stream.tile_sum(r, at.s.part, turn, side, tile, Int32(0), column)
                    value = value + own * factor
                else:
                    value = value + stream.tile_sum(r, at.s.part, turn, side, tile, Int32(0), column)
        if const_expr(d.out == "f32"):
            ptx.stg_f32(m.y.toint() + Int64(token * d.hidden + out) * 4, value)
        else:
            ptx.stg16(m.y.toint() + Int64(token * d.hidden + out) * 2, ptx.f32x2_to_bf16x2(value, value))
