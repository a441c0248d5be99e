"""Hyper-connections for many tokens: a cluster takes `TOGETHER` at a time, and projects them on tensor cores.

CTA `rank` owns `width` columns of every residual stream. A thread mixes eight neighboring columns of all
streams of two tokens, which are then its part of the left operand of m16n8k16 MMAs: their k is a column, in
an order of its own. fn is f32, and goes in as three bf16 pieces, 8 bits each, whose sum it is: products are
exact as those of f32 are, and are added up in f32. Their order is that of the tensor cores, so a token's
projections are not bit for bit those of `hyper`, which adds up the same products lane by lane; streams are
mixed with the same bits.

Each token has an owner in the cluster, who adds up what all CTAs made of it and tells them how to collapse
its streams. Formulas: DeepSeek-V4 inference/model.py, hc_pre, hc_post and hc_head.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, Uint32, const_expr, range_constexpr

from dsv4c.codegen.lib import cluster, hyper, ptx, quantize
from dsv4c.codegen.lib.slices import STREAMS, TOGETHER, Batch

PIECES = 3  # bf16 that an f32 is the sum of


class Place(NamedTuple):
    """What a thread works on: of a cluster's tokens, from `begin` on, eight columns from `column` on."""

    thread: Int32
    warp: Int32
    lane: Int32
    begin: Int32
    rank: Int32
    column: Int32


# A cluster's boundaries -------------------------------------------------------------------------------------


@cute.jit
def enter(t: Constexpr[Batch], m: hyper.Operands, sm: Int32) -> Place:
    """Before the wait: inboxes open, all of fn under way."""
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    warp, lane = cute.arch.make_warp_uniform(cute.arch.warp_idx()), cute.arch.lane_idx()
    begin, rank = block // t.ctas * t.tokens, cute.arch.block_idx_in_cluster()
    column = rank * t.width + warp * 32 + lane % 4 * 8
    open_inboxes(t, sm, rank, thread)
    keep_fn(t, sm, m.fn.toint(), rank, thread)
    hyper.stage_vectors(t, sm, m.base.toint(), m.scale.toint(), m.gain.toint(), rank, thread)
    return Place(thread, warp, lane, begin, rank, column)


@cute.jit
def cross(t: Constexpr[Batch], m: hyper.Operands, sm: Int32, at: Place) -> None:
    """Streams of the cluster's tokens mixed, projected, collapsed and normalized, `TOGETHER` at a time."""
    thread, lane, rank, column = at.thread, at.lane, at.rank, at.column
    addresses = (m.x.toint(), m.f.toint()) if const_expr(m.f is not None) else (m.x.toint(),)
    mixing = (m.post_out.toint(), m.logits_out.toint()) if const_expr(m.post_out is not None) else ()
    if const_expr(m.f is not None):
        made = m.logits.toint(), m.post.toint()
        mix_weights(t, sm, *made, at.begin, t.iterations, t.hc_eps, thread)
    cute.arch.cluster_wait()
    for turn in cutlass.range(t.turns, unroll=1):
        first = at.begin + turn * TOGETHER
        x = mix_turn(t, sm, addresses, at.begin, turn, column, lane)
        read_ahead(t, addresses, first, turn, rank, thread)
        if const_expr(m.x_out is not None):
            store_streams(t, m.x_out.toint(), x, first, column, lane)
        project(t, sm, x, rank, thread)
        weigh(t, sm, t.norm_eps, t.hc_eps, mixing, first, turn, rank, at.warp, lane)
        rows = collapse(t, sm, x, turn, thread)
        if const_expr(m.plain is not None):
            store_rows(t, m.plain.toint(), as_words(rows), first, column, lane)
        words = normalize(t, sm, rows, t.norm_eps, turn, rank, thread)
        if const_expr(m.normed is not None):
            store_rows(t, m.normed.toint(), words, first, column, lane)
        if const_expr(m.q is not None):
            store_fp8(t, sm, m.q.toint(), m.q_scale.toint(), words, first, column, thread)


# Before the wait --------------------------------------------------------------------------------------------


@cute.jit
def open_inboxes(t: Constexpr[Batch], sm: Int32, rank: Int32, thread: Int32):
    """Open the three inboxes for the first tokens and tell the cluster. All threads."""
    for i in range_constexpr(3):
        ptx.open_barrier(sm + t.o_bars + 8 * i, thread)
    _expect_sums(t, sm, rank, thread)
    _expect_weights(t, sm, thread)
    _expect_totals(t, sm, thread)
    cute.arch.sync_warp()
    cluster.arrive()


@cute.jit
def _expect_sums(t: Constexpr[Batch], sm: Int32, rank: Int32, thread: Int32):
    """An owner's barrier counts what comes for its tokens of the next turn."""
    if thread == 0:
        owned = (Int32(TOGETHER + t.ctas - 1) - rank) // t.ctas
        ptx.mbarrier_expect(sm + t.o_bars, owned * (t.ctas * t.sums * 4))


@cute.jit
def _expect_weights(t: Constexpr[Batch], sm: Int32, thread: Int32):
    if thread == 0:
        ptx.mbarrier_expect(sm + t.o_bars + 8, Int32(TOGETHER * STREAMS * 4))


@cute.jit
def _expect_totals(t: Constexpr[Batch], sm: Int32, thread: Int32):
    if thread == 0:
        ptx.mbarrier_expect(sm + t.o_bars + 16, Int32(TOGETHER * t.ctas * 4))


@cute.jit
def keep_fn(t: Constexpr[Batch], sm: Int32, g_fn: Int64, rank: Int32, thread: Int32):
    """The CTA's columns of fn to shared memory; `hyper.stage_vectors` closes the group of copies."""
    stream, quad = thread // (t.width // 4), thread % (t.width // 4)
    g = g_fn + (stream * t.hidden + rank * t.width + quad * 4) * 4
    for i in range_constexpr(t.rows):
        s = sm + i * t.pitch + stream * (t.width * 4) + quad * 16
        ptx.cp_async16(s, g + i * (STREAMS * t.hidden * 4))


@cute.jit
def mix_weights(
    t: Constexpr[Batch],
    sm: Int32,
    g_logits: Int64,
    g_post: Int64,
    begin: Int32,
    iterations: Constexpr[int],
    eps: Constexpr[float],
    thread: Int32,
):
    """comb and post of the cluster's tokens, from token `begin` on, to shared memory, a thread each. All
    threads.
    """
    for n in range_constexpr(-(-t.tokens // t.threads)):
        own = thread + n * t.threads
        if own < t.tokens and begin + own < t.count:
            rK = cute.make_rmem_tensor((STREAMS * STREAMS,), Float32)
            for j in range_constexpr(STREAMS):
                w = ptx.ldg128(g_logits + ((begin + own) * STREAMS + j) * (STREAMS * 4))
                for k in range_constexpr(STREAMS):
                    rK[STREAMS * j + k] = w[k].bitcast(Float32)
            hyper.sinkhorn(rK, iterations, eps)
            hyper.store_comb(t, sm, rK, own)
            post = ptx.ldg128(g_post + (begin + own) * (STREAMS * 4))
            ptx.sts128(sm + t.o_post + own * (STREAMS * 4), *post)
    cute.arch.sync_threads()


# Streams ----------------------------------------------------------------------------------------------------


@cute.jit
def read_ahead(t: Constexpr[Batch], addresses: tuple, first: Int32, turn: Int32, rank: Int32, thread: Int32):
    """Bring what the next turn reads to L2, by lines of 128 bytes: the CTA's columns of its tokens' streams
    and of f.
    """
    lines = const_expr(t.width // 64)
    for n in range_constexpr(-(-TOGETHER * lines * (STREAMS + len(addresses) - 1) // t.threads)):
        own = thread + n * t.threads
        token, line = first + TOGETHER + own % TOGETHER, own // TOGETHER
        row, piece = line // lines, line % lines
        g = addresses[0] + (Int64(token) * STREAMS + row) * (t.hidden * 2)
        if const_expr(len(addresses) > 1):
            g_f = addresses[1] + Int64(token) * (t.hidden * 2)
            if row == STREAMS:
                g = g_f
        if turn + 1 < t.turns and token < t.count and row < STREAMS + len(addresses) - 1:
            ptx.prefetch_l2(g + rank * (t.width * 2) + piece * 128)


@cute.jit
def mix_turn(
    t: Constexpr[Batch], sm: Int32, addresses: tuple, begin: Int32, turn: Int32, column: Int32, lane: Int32
):
    """Eight columns of all streams of two tokens, mixed if there is f beside x in `addresses`, as bf16x2
    words [2][4][4].
    """
    rX = cute.make_rmem_tensor((2, STREAMS, 4), Uint32)
    numbers = [_number(t, begin, turn, lane, n) for n in range(2)]
    read = [_read(t, addresses, begin + number, column) for number in numbers]
    for n in range_constexpr(2):
        x = read[n]
        if const_expr(len(addresses) > 1):
            s = sm + t.o_comb + numbers[n] * (STREAMS * STREAMS * 4)
            comb = [ptx.lds128(s + j * (STREAMS * 4)) for j in range(STREAMS)]
            post = ptx.lds128(sm + t.o_post + numbers[n] * (STREAMS * 4))
            for i in range_constexpr(4):
                pairs = [(w[i],) for w in x]
                for k in range_constexpr(STREAMS):
                    column_of = [c[k].bitcast(Float32) for c in comb]
                    mixed = hyper.mix(pairs[STREAMS], pairs, post[k].bitcast(Float32), column_of)
                    rX[n, k, i] = mixed[0]
        else:
            for k in range_constexpr(STREAMS):
                for i in range_constexpr(4):
                    rX[n, k, i] = x[k][i]
    return rX


def _number(t: Batch, begin: Int32, turn: Int32, lane: Int32, n: int) -> Int32:
    """Of the thread's token n among the cluster's; the last token's in place of one that does not exist."""
    return cutlass.min(turn * TOGETHER + 8 * n + lane // 4, Int32(t.count - 1) - begin)


def _read(t: Batch, addresses: tuple, token: Int32, column: Int32) -> list:
    """Eight columns of a token's streams and of f, in flight."""
    g = addresses[0] + (Int64(token) * (STREAMS * t.hidden) + column) * 2
    read = [ptx.ldg128(g + j * (t.hidden * 2)) for j in range(STREAMS)]
    return [*read, *(ptx.ldg128(g_f + (Int64(token) * t.hidden + column) * 2) for g_f in addresses[1:])]


@cute.jit
def store_streams(t: Constexpr[Batch], g_x: Int64, rX: cute.Tensor, first: Int32, column: Int32, lane: Int32):
    """The mixed streams to memory, perhaps in place of those that the same thread has read."""
    for n in range_constexpr(2):
        token = first + 8 * n + lane // 4
        if token < t.count:
            g = g_x + (Int64(token) * (STREAMS * t.hidden) + column) * 2
            for k in range_constexpr(STREAMS):
                ptx.stg128(g + k * (t.hidden * 2), *[rX[n, k, i] for i in range(4)])


# The first reduction: projections and sum of squares --------------------------------------------------------


@cute.jit
def project(t: Constexpr[Batch], sm: Int32, rX: cute.Tensor, rank: Int32, thread: Int32):
    """What the CTA's columns make of its tokens to their owners. All threads."""
    warp, lane = thread // 32, thread % 32
    rC = [cute.make_rmem_tensor((4,), Float32) for _ in range(t.tiles)]
    for i in range_constexpr(t.tiles):
        rC[i].fill(0.0)
    s_fn = sm + lane // 4 * t.pitch + (warp * 32 + lane % 4 * 8) * 4
    for k in range_constexpr(STREAMS):
        for half in range_constexpr(2):
            a = [rX[n, k, 2 * half + i] for i in range(2) for n in range(2)]
            b = []
            for i in range_constexpr(t.tiles):
                w = ptx.lds128(s_fn + 8 * i * t.pitch + (k * t.width + 4 * half) * 4)
                b.append((_pieces(w[0], w[1]), _pieces(w[2], w[3])))
            for piece in range_constexpr(PIECES):
                for i in range_constexpr(t.tiles):
                    ptx.mma_bf16(rC[i], a[0], a[1], a[2], a[3], b[i][0][piece], b[i][1][piece])
    _share_sums(t, sm, rC, [_squares(rX, n) for n in range(2)], rank, thread)


def _pieces(lo: Uint32, hi: Uint32) -> list:
    """Two f32 as `PIECES` bf16x2 that add up to them: bits cut off, and what is left of them."""
    words = []
    for n in range(PIECES):
        words.append(ptx.permute(lo, hi, 0x7632))
        if n + 1 < PIECES:
            lo, hi = _rest(lo), _rest(hi)
    return words


def _rest(r: Uint32) -> Uint32:
    """An f32 less its bf16 piece, exact."""
    return (r.bitcast(Float32) - (r & Uint32(0xFFFF0000)).bitcast(Float32)).bitcast(Uint32)


@cute.jit
def _squares(rX: cute.Tensor, n: Constexpr[int]):
    """Sum over the warp's columns of the squares of a token's streams."""
    total = Float32(0.0)
    for k in range_constexpr(STREAMS):
        for i in range_constexpr(4):
            lo, hi = ptx.bf16x2_to_f32x2(rX[n, k, i])
            total = total + lo * lo + hi * hi
    return ptx.lanes_sum(total, 4)


@cute.jit
def _share_sums(t: Constexpr[Batch], sm: Int32, rC: list, squares: list, rank: Int32, thread: Int32):
    """Add up the warps' parts and send the CTA's sums of a token to its owner. All threads."""
    warp, lane = thread // 32, thread % 32
    columns, half = const_expr(8 * t.tiles), const_expr(t.warps // 2)
    s_part = sm + t.o_part + ((warp % half * TOGETHER + lane // 4) * columns + lane % 4 * 2) * 4
    store_by_token(t, sm + t.o_squares + warp * (TOGETHER * 4), squares, lane)
    if warp >= half:
        for i in range_constexpr(t.tiles):
            for n in range_constexpr(2):
                s = s_part + (8 * n * columns + 8 * i) * 4
                ptx.sts64(s, rC[i][2 * n].bitcast(Uint32), rC[i][2 * n + 1].bitcast(Uint32))
    cute.arch.sync_threads()
    if warp < half:
        for i in range_constexpr(t.tiles):
            for n in range_constexpr(2):
                s = s_part + (8 * n * columns + 8 * i) * 4
                w = ptx.lds64(s)
                lo, hi = rC[i][2 * n] + w[0].bitcast(Float32), rC[i][2 * n + 1] + w[1].bitcast(Float32)
                ptx.sts64(s, lo.bitcast(Uint32), hi.bitcast(Uint32))
    cute.arch.sync_threads()
    for n in range_constexpr(-(-TOGETHER * 32 // t.threads)):
        token, i = (thread + n * t.threads) // 32, thread % 32
        if token < TOGETHER and i < t.sums:
            value = Float32(0.0)
            if i < t.rows:
                value = cluster.inbox_sum(sm + t.o_part + token * (columns * 4), TOGETHER * columns, half, i)
            else:
                value = cluster.inbox_sum(sm + t.o_squares, TOGETHER, t.warps, token)
            place = (token // t.ctas * t.ctas + rank) * t.stride + i
            cluster.send_f32(sm + t.o_sums + place * 4, sm + t.o_bars, token % t.ctas, value)
    cute.arch.sync_threads()  # lanes beyond the sums would wait before the others have sent


@cute.jit
def store_by_token(t: Constexpr[Batch], s: Int32, values: list, lane: Int32):
    """A warp's floats of its two tokens per lane to f32 [token]; lanes in fours have the same."""
    if lane % 4 == 0:
        for n in range_constexpr(2):
            ptx.sts_f32(s + (8 * n + lane // 4) * 4, values[n])


# Owners -----------------------------------------------------------------------------------------------------


@cute.jit
def weigh(
    t: Constexpr[Batch],
    sm: Int32,
    norm_eps: Constexpr[float],
    hc_eps: Constexpr[float],
    mixing: Constexpr[tuple],
    first: Int32,
    turn: Int32,
    rank: Int32,
    warp: Int32,
    lane: Int32,
):
    """Of the tokens that the CTA owns: by what streams are collapsed, to all CTAs; and what the next mixing
    is made of to memory, if there are addresses of post and logits. A warp each.
    """
    for n in range_constexpr(-(-t.owned // t.warps)):
        own = warp + n * t.warps
        place = own * t.ctas + rank
        if own < t.owned and place < TOGETHER:
            ptx.mbarrier_wait(sm + t.o_bars, turn & 1)
            z = hyper.affine_of(t, sm, sm + t.o_sums + own * (t.ctas * t.stride * 4), norm_eps, lane)
            weight = hyper.sigmoid(z) + Float32(hc_eps)
            w = [cute.arch.shuffle_sync(weight, i).bitcast(Uint32) for i in range(STREAMS)]
            s = sm + t.o_weights + place * (STREAMS * 4)
            cluster.send_128(s, sm + t.o_bars + 8, lane, w[0], w[1], w[2], w[3], lane < t.ctas)
            if const_expr(len(mixing) > 0):
                token = first + place
                if token < t.count:
                    hyper.store_mixing(mixing[0], mixing[1], token, z, lane)
    _expect_sums(t, sm, rank, warp * 32 + lane)


# Collapse and normalize -------------------------------------------------------------------------------------


@cute.jit
def collapse(t: Constexpr[Batch], sm: Int32, rX: cute.Tensor, turn: Int32, thread: Int32):
    """bf16(sum_i pre_i x_i) of eight columns of two tokens, as floats [2][8]. Waits for all owners."""
    rA = cute.make_rmem_tensor((2, 8), Float32)
    rA.fill(0.0)
    ptx.mbarrier_wait(sm + t.o_bars + 8, turn & 1)
    _expect_weights(t, sm, thread)
    for n in range_constexpr(2):
        pre = ptx.lds128(sm + t.o_weights + (8 * n + thread % 32 // 4) * (STREAMS * 4))
        for k in range_constexpr(STREAMS):
            weight = pre[k].bitcast(Float32)
            for i in range_constexpr(4):
                lo, hi = ptx.bf16x2_to_f32x2(rX[n, k, i])
                rA[n, 2 * i] = rA[n, 2 * i] + weight * lo
                rA[n, 2 * i + 1] = rA[n, 2 * i + 1] + weight * hi
        for i in range_constexpr(8):
            rA[n, i] = ptx.round_bf16(rA[n, i])
    return rA


@cute.jit
def normalize(
    t: Constexpr[Batch],
    sm: Int32,
    rA: cute.Tensor,
    eps: Constexpr[float],
    turn: Int32,
    rank: Int32,
    thread: Int32,
):
    """bf16(a * rsqrt(mean(a^2) + eps) * gain) of eight columns of two tokens, as words [2][4]. The second
    reduction. All threads.
    """
    warp, lane = thread // 32, thread % 32
    squares = []
    for n in range_constexpr(2):
        total = Float32(0.0)
        for i in range_constexpr(8):
            total = total + rA[n, i] * rA[n, i]
        squares.append(ptx.lanes_sum(total, 4))
    store_by_token(t, sm + t.o_squares + warp * (TOGETHER * 4), squares, lane)
    cute.arch.sync_threads()
    for n in range_constexpr(-(-TOGETHER * t.ctas // t.threads)):
        token, peer = (thread + n * t.threads) % TOGETHER, (thread + n * t.threads) // TOGETHER
        value = cluster.inbox_sum(sm + t.o_squares, TOGETHER, t.warps, token)
        s_total = sm + t.o_totals + (token * t.ctas + rank) * 4
        cluster.send_f32(s_total, sm + t.o_bars + 16, peer, value, peer < t.ctas)
    gain = ptx.lds128(sm + t.o_gain + (warp * 32 + lane % 4 * 8) * 2)
    ptx.mbarrier_wait(sm + t.o_bars + 16, turn & 1)
    _expect_totals(t, sm, thread)
    words = []
    for n in range_constexpr(2):
        s_total = sm + t.o_totals + (8 * n + lane // 4) * (t.ctas * 4)
        total = cluster.inbox_sum(s_total, 1, t.ctas, Int32(0))
        inv = cute.math.rsqrt(total * Float32(1.0 / t.hidden) + Float32(eps), fastmath=True)
        row = []
        for i in range_constexpr(4):
            lo, hi = ptx.bf16x2_to_f32x2(gain[i])
            row.append(ptx.f32x2_to_bf16x2(rA[n, 2 * i] * inv * lo, rA[n, 2 * i + 1] * inv * hi))
        words.append(row)
    return words


def as_words(rA: cute.Tensor) -> list:
    """Eight columns of two rows, which are bf16 values, as words [2][4]."""
    return [[ptx.f32x2_to_bf16x2(rA[n, 2 * i], rA[n, 2 * i + 1]) for i in range(4)] for n in range(2)]


@cute.jit
def store_rows(t: Constexpr[Batch], g: Int64, words: list, first: Int32, column: Int32, lane: Int32):
    """Eight columns of two bf16 [tokens][hidden] rows."""
    for n in range_constexpr(2):
        token = first + 8 * n + lane // 4
        if token < t.count:
            ptx.stg128(g + (Int64(token) * t.hidden + column) * 2, *words[n])


@cute.jit
def store_fp8(
    t: Constexpr[Batch],
    sm: Int32,
    g_codes: Int64,
    g_scales: Int64,
    words: list,
    first: Int32,
    column: Int32,
    thread: Int32,
):
    """Quantize 128 columns, which four warps have: e4m3 [tokens][hidden], ue8m0 [tokens][hidden / 128]. All
    threads.
    """
    warp, lane = thread // 32, thread % 32
    rows = [[v for w in row for v in ptx.bf16x2_to_f32x2(w)] for row in words]
    for n in range_constexpr(2):
        top = Float32(0.0)
        for i in range_constexpr(8):
            top = cute.arch.fmax(top, cute.arch.fmax(rows[n][i], -rows[n][i]))
        top = ptx.lanes_max(top, 4)
        if lane % 4 == 0:
            ptx.sts_f32(sm + t.o_tops + ((8 * n + lane // 4) * t.warps + warp) * 4, top)
    cute.arch.sync_threads()
    for n in range_constexpr(2):
        tops = ptx.lds128(sm + t.o_tops + ((8 * n + lane // 4) * t.warps + warp // 4 * 4) * 4)
        a, b, c, d = (r.bitcast(Float32) for r in tops)
        byte = quantize.fp8_exponent(cute.arch.fmax(cute.arch.fmax(a, b), cute.arch.fmax(c, d)))
        f = quantize.reciprocal(byte)
        low = quantize.codes4(*[rows[n][i] * f for i in range(4)])
        high = quantize.codes4(*[rows[n][4 + i] * f for i in range(4)])
        token = first + 8 * n + lane // 4
        if token < t.count:
            ptx.stg64(g_codes + Int64(token) * t.hidden + column, low, high)
            if warp % 4 == 0 and lane % 4 == 0:
                ptx.stg_u8(g_scales + token * (t.hidden // 128) + column // 128, Uint32(byte))
