"""The router's device functions: gate products per CTA; scores, top-k and renormalized weights of one token.

Formulas: DeepSeek-V4 inference/model.py, Gate: s = sqrt(softplus(x . gate)); experts by s + bias, or by a
table of the token; weights s[experts] / sum * factor.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, Uint32, const_expr, range_constexpr

from dsv4c.codegen.lib import hyper, ptx
from dsv4c.codegen.lib.slices import Gate, RowGate

LOWEST = -(2**31)


# Gate products ----------------------------------------------------------------------------------------------


class GateOperands(NamedTuple):
    """x bf16[count, hidden], gate bf16[experts, hidden] -> logits f32[count, experts]."""

    x: cute.Pointer
    gate: cute.Pointer
    logits: cute.Pointer


class GatePlace(NamedTuple):
    """Where a thread works: a block of experts, its tokens' rows and logits."""

    block: Int32
    thread: Int32
    lane: Int32
    g_x: Int64
    g_logits: Int64


@cute.jit
def enter(t: Constexpr[Gate], m: GateOperands, s: Int32) -> GatePlace:
    """Ask for the CTA's weights; a grid of (experts, tokens)."""
    thread, _, _ = cute.arch.thread_idx()
    block, tokens, _ = cute.arch.block_idx()
    lane = cute.arch.lane_idx()
    g_x, g_logits = m.x.toint(), m.logits.toint()
    if const_expr(t.blocks > 1):
        # The last block's tokens start early. What two CTAs compute they compute alike, and store the same.
        first = Int64(cutlass.min(tokens * t.tokens, Int32(t.count - t.tokens)))
        g_x, g_logits = g_x + first * (t.hidden * 2), g_logits + first * (t.experts * 4)
    prefetch(t, s, m.gate.toint(), block, thread)
    return GatePlace(block, thread, lane, g_x, g_logits)


@cute.jit
def multiply(t: Constexpr[Gate], s: Int32, at: GatePlace) -> None:
    """The logits of its experts, of its tokens."""
    part = products(t, s, at.g_x, at.thread, at.lane)
    store_logits(t, s, at.g_logits, part, at.block, at.thread, at.lane)


@cute.jit
def prefetch(t: Constexpr[Gate], sm: Int32, g_weight: Int64, block: Int32, thread: Int32):
    """Put the CTA's rows in flight. A thread copies exactly the pieces that it will read."""
    for r in range_constexpr(t.rows):
        for n in range_constexpr(t.pieces):
            at = r * (t.hidden * 2) + (thread + n * t.threads) * 16
            ptx.cp_async16(sm + at, g_weight + Int64(block) * (t.rows * t.hidden * 2) + at)
    ptx.cp_async_commit()


@cute.jit
def products(t: Constexpr[Gate], sm: Int32, g_x: Int64, thread: Int32, lane: Int32):
    """The warp's parts of expert r times token b, as sums r * tokens + b that `hyper.lanes_sums` leaves."""
    values = cute.make_rmem_tensor((t.stride,), Float32)
    values.fill(0.0)
    for n in range_constexpr(t.pieces):
        piece = thread + n * t.threads
        x = [ptx.ldg128(g_x + (b * t.hidden + piece * 8) * 2) for b in range(t.tokens)]
        if const_expr(n == 0):
            ptx.cp_async_wait(0)
        for r in range_constexpr(t.rows):
            w = ptx.lds128(sm + r * (t.hidden * 2) + piece * 16)
            for b in range_constexpr(t.tokens):
                values[r * t.tokens + b] = values[r * t.tokens + b] + dot8(w, x[b])
    return hyper.lanes_sums(values, t.stride, lane)


@cute.jit
def dot8(w, x):
    """Eight bf16 times eight bf16, f32."""
    total = Float32(0.0)
    for i in range_constexpr(4):
        wl, wh = ptx.bf16x2_to_f32x2(w[i])
        xl, xh = ptx.bf16x2_to_f32x2(x[i])
        total = total + wl * xl
        total = total + wh * xh
    return total


@cute.jit
def store_logits(
    t: Constexpr[Gate], sm: Int32, g_logits: Int64, r: Float32, block: Int32, thread: Int32, lane: Int32
):
    """Add the warps' parts `r` in order and store f32 [tokens][experts]. All threads."""
    own = lane // (32 // t.stride)
    if own < t.sums:
        ptx.sts_f32(sm + t.o_part + (thread // 32 * t.stride + own) * 4, r)
    ptx.sync_threads(t.threads)
    if thread < t.sums:
        total = Float32(0.0)
        for i in range_constexpr(t.threads // 32):
            total = total + ptx.lds_f32(sm + t.o_part + (i * t.stride + thread) * 4)
        expert = block * t.rows + thread // t.tokens
        ptx.stg_f32(g_logits + (thread % t.tokens * t.experts + expert) * 4, total)


# One token's scores and choice: in every CTA that needs them ------------------------------------------------


@cute.jit
def score(logit: Float32):
    """sqrt(softplus(x)); softplus is x above 20, as in PyTorch."""
    soft = logit
    if logit <= Float32(20.0):
        soft = cute.math.log1p(cute.math.exp(logit))
    return cute.math.sqrt(soft)


@cute.jit
def ordered(r: Float32):
    """An integer that orders like the float (-0 below +0)."""
    b = r.bitcast(Int32)
    return b ^ ((b >> Int32(31)) & Int32(0x7FFFFFFF))


@cute.jit
def stage_bias(
    s: Int32,
    g_bias: Int64,
    experts: Constexpr[int],
    padded: Constexpr[int],
    thread: Int32,
    threads: Constexpr[int],
):
    """Biases to the places of the keys that `stage_scores` makes of them. They never change: before the
    wait.
    """
    for n in range_constexpr(-(-experts // threads)):
        i = thread + n * threads
        if i < experts:
            ptx.sts_f32(s + (padded + i) * 4, ptx.ldg_f32_constant(g_bias + i * 4))


@cute.jit
def load_logits(g_logits: Int64, experts: Constexpr[int], thread: Int32, threads: Constexpr[int]):
    """The thread's share of the token's logits, in flight to registers, for `stage_scores`."""
    pieces = const_expr(-(-experts // threads))
    r = cute.make_rmem_tensor((pieces,), Float32)
    for n in range_constexpr(pieces):
        r[n] = ptx.ldg_f32(g_logits + cutlass.min(thread + n * threads, Int32(experts - 1)) * 4)
    return r


@cute.jit
def stage_scores(
    s: Int32,
    rL: cute.Tensor,
    experts: Constexpr[int],
    padded: Constexpr[int],
    thread: Int32,
    threads: Constexpr[int],
):
    """Scores f32 [padded] at `s`, then keys that order like score + bias i32 [padded]. A thread reads
    the biases that it stored itself.
    """
    for n in range_constexpr(-(-padded // threads)):
        i = thread + n * threads
        if i < padded:
            value = Float32(0.0)
            key = Int32(LOWEST)
            if i < experts:
                value = score(rL[n])
                key = ordered(value + ptx.lds_f32(s + (padded + i) * 4))
            ptx.sts_f32(s + i * 4, value)
            ptx.sts32(s + (padded + i) * 4, key.bitcast(Uint32))


@cute.jit
def largest(rK: cute.Tensor, start: Constexpr[int], count: Constexpr[int]):
    """The largest of `count` keys from `start` on, in as few dependent steps as there are."""
    if const_expr(count == 1):
        return rK[start]
    half = const_expr(count // 2)
    return cutlass.max(largest(rK, start, half), largest(rK, start + half, count - half))


@cute.jit
def top_experts(s: Int32, padded: Constexpr[int], k: Constexpr[int], lane: Int32):
    """(expert, score) i of the k largest score + bias in lane i, the lower on ties. One warp."""
    each = const_expr(padded // 32)  # neighbors
    rK = cute.make_rmem_tensor((each,), Int32)
    s_keys = s + (padded + lane * each) * 4
    if const_expr(each % 4 == 0):
        for i in range_constexpr(each // 4):
            w = ptx.lds128(s_keys + i * 16)
            for j in range_constexpr(4):
                rK[4 * i + j] = Int32(w[j])
    else:
        for i in range_constexpr(each):
            rK[i] = Int32(ptx.lds32(s_keys + i * 4))
    expert = Int32(0)
    for n in range_constexpr(k):
        winner = take_largest(rK, each, lane)
        if lane == n:
            expert = winner
    chosen = Float32(0.0)
    if lane < k:
        chosen = ptx.lds_f32(s + expert * 4)
    return expert, chosen


@cute.jit
def choose_experts(
    g_logits: Int64,
    g_bias: Int64,
    experts: Constexpr[int],
    padded: Constexpr[int],
    k: Constexpr[int],
    lane: Int32,
):
    """`top_experts` of a token whose logits nobody staged, perhaps before the wait. One warp."""
    each = const_expr(padded // 32)  # neighbors
    rV = cute.make_rmem_tensor((each,), Float32)
    rK = cute.make_rmem_tensor((each,), Int32)
    for i in range_constexpr(each):
        at = cutlass.min(lane * each + i, Int32(experts - 1)) * 4
        rV[i] = ptx.ldg_early32(g_logits + at).bitcast(Float32)
        rK[i] = ptx.ldg_f32_constant(g_bias + at).bitcast(Int32)
    for i in range_constexpr(each):
        rV[i] = score(rV[i])
        rK[i] = ordered(rV[i] + rK[i].bitcast(Float32))
        if lane * each + i >= experts:
            rK[i] = Int32(LOWEST)
    expert = Int32(0)
    chosen = Float32(0.0)
    for n in range_constexpr(k):
        winner = take_largest(rK, each, lane)
        mine = rV[0]  # of the winner's lane its score; which lane that is, all know
        for i in range_constexpr(1, each):
            if winner % each == i:
                mine = rV[i]
        mine = cute.arch.shuffle_sync(mine, winner // each)
        if lane == n:
            expert = winner
            chosen = mine
    return expert, chosen


@cute.jit
def take_largest(rK: cute.Tensor, each: Constexpr[int], lane: Int32):
    """The place of the largest key of all lanes, `each` neighbors a lane, the lowest of equals; it is none
    any more. One warp.
    """
    best = largest(rK, 0, each)
    top = cute.arch.warp_redux_sync(best, kind="max")
    first = Int32(0)  # of the lane's keys like its best; found while the warp compares
    for i in range_constexpr(each):
        if rK[each - 1 - i] == best:
            first = Int32(each - 1 - i)
    winner = Int32(32 * each)
    if best == top:
        winner = lane * each + first
    winner = cute.arch.warp_redux_sync(winner, kind="min")
    for i in range_constexpr(each):
        if winner == lane * each + i:
            rK[i] = Int32(LOWEST)
    return winner


@cute.jit
def table_experts(g_row: Int64, k: Constexpr[int], lane: Int32):
    """Expert i of a token's row of the table in lane i, the last again in lanes beyond."""
    return Int32(ptx.ldg32_constant(g_row + cutlass.min(lane, Int32(k - 1)) * 4))


@cute.jit
def logit_scores(g_logits: Int64, expert: Int32, k: Constexpr[int], lane: Int32):
    """The score of the lane's expert, 0 in lanes beyond k."""
    chosen = Float32(0.0)
    if lane < k:
        chosen = score(ptx.ldg_f32(g_logits + expert * 4))
    return chosen


@cute.jit
def keep_experts(s: Int32, expert: Int32, k: Constexpr[int], lane: Int32):
    """The lanes' experts to i32 [k] at `s`."""
    if lane < k:
        ptx.sts32(s + lane * 4, expert.bitcast(Uint32))


@cute.jit
def keep_weights(s: Int32, chosen: Float32, k: Constexpr[int], factor: Constexpr[float], lane: Int32):
    """Weights = score / sum * factor to f32 [k] behind the experts at `s`; lanes beyond k hold scores of 0.
    One warp; returns the lane's weight.
    """
    weight = ptx.divide(chosen, ptx.lanes_sum(chosen, 32)) * Float32(factor)
    if lane < k:
        ptx.sts_f32(s + (k + lane) * 4, weight)
    return weight


@cute.jit
def drop_weights(s: Int32, weight: Float32, k: Constexpr[int], position: Int32, lane: Int32):
    """What `keep_weights` kept becomes 0 if the row's position is -1. One warp; returns the lane's weight."""
    if position < 0:
        weight = Float32(0.0)
        if lane < k:
            ptx.sts_f32(s + (k + lane) * 4, weight)
    return weight


@cute.jit
def rows_present(g_positions: Int64, rows: Constexpr[int]):
    """(order, count): the rows of a call of at most 8 that have a position, and the first one, whose turn
    begins before anybody knows. Row n of them is `nth_row(order, n)`.
    """
    order = Int32(0)
    count = Int32(1)
    for row in range_constexpr(1, rows):
        if ptx.ldg32(g_positions + row * 4).to(Int32) >= 0:
            order = order | (Int32(row) << (count * 4))
            count = count + 1
    return order, count


@cute.jit
def nth_row(order: Int32, n: Int32):
    """Its number, of those that `rows_present` found."""
    return (order >> (n * 4)) & 15


# Scores of a table's experts, from their own rows of the gate -----------------------------------------------


@cute.jit
def early_rows(
    g_gate: Int64,
    expert: Int32,
    hidden: Constexpr[int],
    k: Constexpr[int],
    pieces: Constexpr[int],
    thread: Int32,
    threads: Constexpr[int],
):
    """The thread's first `pieces` pieces of 8 columns of the gate's row of each lane's expert, in flight to
    registers: they are weights, so before the wait.
    """
    w = cute.make_rmem_tensor((4 * k * pieces,), Uint32)
    for i in range_constexpr(k):
        g_row = g_gate + Int64(cute.arch.shuffle_sync(expert, i)) * (2 * hidden)
        for n in range_constexpr(pieces):
            v = ptx.ldg_early128(g_row + piece_at(hidden, n, thread, threads))
            for j in range_constexpr(4):
                w[4 * (n * k + i) + j] = v[j]
    return w


@cute.jit
def piece_at(hidden: Constexpr[int], n: Constexpr[int], thread: Int32, threads: Constexpr[int]):
    """Where the thread's piece `n` of a bf16 row lies, in bytes; past the end, the last piece."""
    return cutlass.min(thread + n * threads, Int32(hidden // 8 - 1)) * 16


@cute.jit
def row_sums(
    g_x: Int64,
    g_gate: Int64,
    w: cute.Tensor,
    expert: Int32,
    hidden: Constexpr[int],
    k: Constexpr[int],
    pieces: Constexpr[int],
    thread: Int32,
    threads: Constexpr[int],
    lane: Int32,
):
    """The warp's parts of x . gate[expert of lane i] as sums i that `hyper.lanes_sums` leaves; `w` holds the
    first pieces, `early_rows`.
    """
    stride = const_expr(1 << (k - 1).bit_length())
    values = cute.make_rmem_tensor((stride,), Float32)
    values.fill(0.0)
    count = const_expr(-(-hidden // (8 * threads)))
    x = [ptx.ldg128(g_x + piece_at(hidden, n, thread, threads)) for n in range(count)]
    for n in range_constexpr(count):
        for i in range_constexpr(k):
            if const_expr(n < pieces):
                v = [w[4 * (n * k + i) + j] for j in range(4)]
            else:
                g_row = g_gate + Int64(cute.arch.shuffle_sync(expert, i)) * (2 * hidden)
                v = ptx.ldg128_constant(g_row + piece_at(hidden, n, thread, threads))
            part = dot8(v, x[n])
            if thread + n * threads > hidden // 8 - 1:
                part = Float32(0.0)
            values[i] = values[i] + part
    return hyper.lanes_sums(values, stride, lane)


@cute.jit
def share_sums(s: Int32, r: Float32, k: Constexpr[int], warp: Int32, lane: Int32):
    """The warp's `row_sums` to f32 [warps][k] at `s`; a CTA barrier makes them visible."""
    own = lane // (32 // const_expr(1 << (k - 1).bit_length()))
    if own < k:
        ptx.sts_f32(s + (warp * k + own) * 4, r)


@cute.jit
def sum_scores(s: Int32, k: Constexpr[int], warps: Constexpr[int], lane: Int32):
    """The score of all warps' sums together in lane i < k, 0 in lanes beyond."""
    chosen = Float32(0.0)
    if lane < k:
        chosen = score(_sum(s, k, warps, lane))
    return chosen


@cute.jit
def _sum(s: Int32, k: Constexpr[int], warps: Constexpr[int], lane: Int32):
    """All warps' sums of lane's expert, one after the other."""
    logit = Float32(0.0)
    for i in range_constexpr(warps):
        logit = logit + ptx.lds_f32(s + (i * k + lane) * 4)
    return logit


# The same products by themselves ----------------------------------------------------------------------------


class RowsOperands(NamedTuple):
    """row bf16[N, hidden], gate bf16[experts, hidden]; table i32[*, k] and tokens i32[N] -> of logits
    f32[N, experts] those of the token's experts.
    """

    row: cute.Pointer
    gate: cute.Pointer
    table: cute.Pointer
    tokens: cute.Pointer
    logits: cute.Pointer


class RowsPlace(NamedTuple):
    """A thread of a token's CTA; its experts, one a lane, and the first pieces of their rows of the gate."""

    token: Int32
    thread: Int32
    warp: Int32
    lane: Int32
    expert: Int32
    rows: cute.Tensor


@cute.jit
def look_up(t: Constexpr[RowGate], m: RowsOperands) -> RowsPlace:
    """The token's experts: before the wait where the token is known."""
    thread, _, _ = cute.arch.thread_idx()
    token, _, _ = cute.arch.block_idx()
    lane = cute.arch.lane_idx()
    id = ptx.ldg32(m.tokens.toint() + token * 4).to(Int64)
    expert = table_experts(m.table.toint() + id * (4 * t.k), t.k, lane)
    rows = early_rows(m.gate.toint(), expert, t.hidden, t.k, t.held, thread, t.threads)
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    return RowsPlace(token, thread, warp, lane, expert, rows)


@cute.jit
def multiply_rows(t: Constexpr[RowGate], m: RowsOperands, s: Int32, at: RowsPlace) -> None:
    """Their logits, summed as the experts' first half sums those of a lone token."""
    g_row = m.row.toint() + Int64(at.token) * (2 * t.hidden)
    sizes = t.hidden, t.k, t.held
    sums = row_sums(g_row, m.gate.toint(), at.rows, at.expert, *sizes, at.thread, t.threads, at.lane)
    share_sums(s, sums, t.k, at.warp, at.lane)
    cute.arch.sync_threads()
    if at.warp == 0 and at.lane < t.k:
        g_logits = m.logits.toint() + (at.token * t.experts + at.expert) * 4
        ptx.stg_f32(g_logits, _sum(s, t.k, t.threads // 32, at.lane))
