"""Hyper-connections for many tokens, in two launches: what a cluster of a token's CTAs would tell each other
goes through memory, once for all tokens, and nobody waits for it in between.

The first mixes and projects. A CTA keeps its columns of fn; a thread mixes eight neighboring columns of all
streams of two tokens, which are then its part of the left operand of m16n8k16 MMAs: their k is a column, in
an order of its own. fn is f32, and lies there as three bf16 pieces, 8 bits each, whose sum it is: products
are exact as those of f32 are, and are added up in f32. Their order is that of the tensor cores, so a token's
projections are not bit for bit those of `hyper`, which adds up the same products lane by lane; streams are
mixed with the same bits.

The second reads the mixed streams again, of the last tokens first, which L2 still has. Formulas: DeepSeek-V4
inference/model.py, hc_pre, hc_post and hc_head.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, Uint32, const_expr, range_constexpr

from dsv4c.codegen.lib import chunk_rows, cluster, hyper, ptx
from dsv4c.codegen.lib.slices import STREAMS, TOGETHER, Batch

PIECES = 3  # bf16 that an f32 is the sum of


class Mixed(NamedTuple):
    """x bf16[N, 4, hidden]; to mix f bf16[N, hidden], post f32[N, 4] and logits f32[N, 4, 4]; fn
    f32[rows, 4 hidden] -> x_out like x, and parts of the projections f32[N, slices, sums]. Without f nothing
    is mixed, and x_out is x.
    """

    x: cute.Pointer
    f: cute.Pointer | None
    post: cute.Pointer | None
    logits: cute.Pointer | None
    fn: cute.Pointer
    x_out: cute.Pointer | None
    parts: cute.Pointer


class Collapsed(NamedTuple):
    """Mixed x bf16[N, 4, hidden], parts of its projections f32[N, slices, sums], base f32[rows], scale f32[3]
    or [1], gain bf16[hidden] -> of these some: post_out f32[N, 4] and logits_out f32[N, 4, 4] of the next
    mixing; normed and, before its norm, plain bf16[N, hidden]; q, the normed row in FP8.
    """

    x: cute.Pointer
    parts: cute.Pointer
    base: cute.Pointer
    scale: cute.Pointer
    gain: cute.Pointer
    post_out: cute.Pointer | None
    logits_out: cute.Pointer | None
    normed: cute.Pointer | None
    plain: cute.Pointer | None
    q: cute.Pointer | None
    q_scale: cute.Pointer | None


class Place(NamedTuple):
    """What a thread works on: of the tokens that a CTA, number `block` of those of `slice`, takes at a time
    numbers `row` and `row` + 8, and eight columns from `column` on in its first step.
    """

    thread: Int32
    lane: Int32
    block: Int32
    slice: Int32
    group: Int32
    row: Int32
    column: Int32


# Mixing and projecting --------------------------------------------------------------------------------------


@cute.jit
def enter(t: Constexpr[Batch], m: Mixed, s: Int32) -> Place:
    """Before the wait: the CTA's columns of fn lie there. All threads."""
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    warp, lane = cute.arch.make_warp_uniform(cute.arch.warp_idx()), cute.arch.lane_idx()
    slice_, group = block % t.slices, warp % t.GROUPS
    column = slice_ * t.width + group * 32 + lane % 4 * 8
    keep_fn(t, s, m.fn.toint(), slice_, warp, lane)
    cute.arch.sync_threads()
    row = warp // t.GROUPS * 16 + lane // 4
    return Place(thread, lane, block // t.slices, slice_, group, row, column)


@cute.jit
def keep_fn(t: Constexpr[Batch], s: Int32, g_fn: Int64, slice_: Int32, warp: Int32, lane: Int32):
    """The CTA's columns of fn in pieces, each lane's words where it will read them."""
    fragments, warps = const_expr(t.width // 32 * STREAMS * t.tiles), const_expr(t.threads // 32)
    read = []
    for n in range_constexpr(-(-fragments // warps)):  # all of it under way
        own = cutlass.min(warp + n * warps, Int32(fragments - 1))
        tile, stream, block = own % t.tiles, own // t.tiles % STREAMS, own // t.tiles // STREAMS
        row = cutlass.min(tile * 8 + lane // 4, Int32(t.rows - 1))
        column = stream * t.hidden + slice_ * t.width + block * 32 + lane % 4 * 8
        g = g_fn + (row * (STREAMS * t.hidden) + column) * 4
        read.append((own, [ptx.ldg128_constant(g + 16 * half) for half in range(2)]))
    for n in range_constexpr(len(read)):
        own, w = read[n]
        tile, pair = own % t.tiles, own // t.tiles * 2
        for half in range_constexpr(2):
            lo, hi = _pieces(w[half][0], w[half][1]), _pieces(w[half][2], w[half][3])
            s_own = s + ((pair + half) * t.tiles + tile) * t.FRAGMENT
            ptx.sts128(s_own + lane * 16, lo[0], hi[0], lo[1], hi[1])
            ptx.sts64(s_own + 512 + lane * 8, lo[2], hi[2])


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
def project(t: Constexpr[Batch], m: Mixed, s: Int32, at: Place) -> None:
    """Streams of the CTA's tokens mixed and projected, `TOGETHER` at a time."""
    addresses = (m.x.toint(), m.f.toint()) if const_expr(m.f is not None) else (m.x.toint(),)
    turns = (t.lots - at.block + (t.blocks - 1)) // t.blocks
    for step in range_constexpr(t.steps):
        read_ahead(t, addresses, at.block * TOGETHER, step, at)
    for turn in cutlass.range(turns, unroll=1):
        first = (turn * t.blocks + at.block) * TOGETHER
        number = turn % (t.combs // TOGETHER) * TOGETHER + at.row
        if const_expr(m.f is not None):
            made = m.logits.toint(), m.post.toint()
            if number == at.row:
                mix_weights(t, s, *made, first, at.thread)
        rC = cute.make_rmem_tensor((t.tiles, 4), Float32)
        rC.fill(0.0)
        for step in range_constexpr(t.steps):
            column = at.column + 32 * t.GROUPS * step
            read_ahead(t, addresses, first + t.blocks * TOGETHER, step, at)
            rX = mix(t, s, addresses, first + at.row, number, column)
            if const_expr(m.x_out is not None):
                store_streams(t, m.x_out.toint(), rX, first + at.row, column)
            multiply(t, s, rC, rX, step * t.GROUPS + at.group, at.lane)
        share(t, s, m.parts.toint(), rC, first, at)


@cute.jit
def read_ahead(t: Constexpr[Batch], addresses: tuple, first: Int32, step: Constexpr[int], at: Place):
    """Bring what a step reads of `TOGETHER` tokens from `first` on to L2, a line of 128 bytes of a stream a
    thread: little at a time, or what is read meanwhile would wait for all of it.
    """
    token, stream = first + at.thread // STREAMS, at.thread % STREAMS
    if token < t.count:
        behind = at.slice * (t.width * 2) + step * (t.GROUPS * 64)
        ptx.prefetch_l2(addresses[0] + (Int64(token) * STREAMS + stream) * (t.hidden * 2) + behind)
        for g_f in addresses[1:]:
            if stream == 0:
                ptx.prefetch_l2(g_f + Int64(token) * (t.hidden * 2) + behind)


@cute.jit
def _read(t: Constexpr[Batch], addresses: tuple, token: Int32, column: Int32) -> list:
    """Eight columns of a token's streams and of f, in flight; of the last one for a token that is not."""
    own = cutlass.min(token, Int32(t.count - 1))
    g = addresses[0] + (Int64(own) * (STREAMS * t.hidden) + column) * 2
    read = [ptx.ldg128(g + j * (t.hidden * 2)) for j in range(STREAMS)]
    return [*read, *(ptx.ldg128(g_f + (Int64(own) * t.hidden + column) * 2) for g_f in addresses[1:])]


@cute.jit
def mix_weights(t: Constexpr[Batch], s: Int32, g_logits: Int64, g_post: Int64, first: Int32, thread: Int32):
    """comb and post of `t.combs` tokens, those of the turn that begins with `first` and of the next ones, to
    shared memory, a thread each. All threads.
    """
    cute.arch.sync_threads()  # all have mixed those of before
    token = first + thread // TOGETHER * (t.blocks * TOGETHER) + thread % TOGETHER
    if thread < t.combs and token < t.count:
        rK = cute.make_rmem_tensor((STREAMS * STREAMS,), Float32)
        for j in range_constexpr(STREAMS):
            w = ptx.ldg128(g_logits + (token * STREAMS + j) * (STREAMS * 4))
            for k in range_constexpr(STREAMS):
                rK[STREAMS * j + k] = w[k].bitcast(Float32)
        post = ptx.ldg128(g_post + token * (STREAMS * 4))
        hyper.sinkhorn(rK, t.iterations, t.hc_eps)
        s_comb = s + t.o_comb + thread * (STREAMS * STREAMS * 4)
        for k in range_constexpr(STREAMS):
            column = [rK[STREAMS * j + k].bitcast(Uint32) for j in range(STREAMS)]
            ptx.sts128(s_comb + k * (STREAMS * 4), *column)
        ptx.sts128(s + t.o_post + thread * (STREAMS * 4), *post)
    cute.arch.sync_threads()


@cute.jit
def mix(t: Constexpr[Batch], s: Int32, addresses: tuple, token: Int32, number: Int32, column: Int32):
    """Eight columns of all streams of `token` and the eighth behind it, mixed if there is f beside x in
    `addresses`, as bf16x2 words [2][4][4]; `number` says which comb is theirs.
    """
    rX = cute.make_rmem_tensor((2, STREAMS, 4), Uint32)
    for n in range_constexpr(2):
        x = _read(t, addresses, token + 8 * n, column)
        if const_expr(len(addresses) > 1):
            s_comb = s + t.o_comb + (number + 8 * n) * (STREAMS * STREAMS * 4)
            s_post = s + t.o_post + (number + 8 * n) * (STREAMS * 4)
            for k in range_constexpr(STREAMS):
                comb = [w.bitcast(Float32) for w in ptx.lds128(s_comb + k * (STREAMS * 4))]
                words = hyper.mix(x[STREAMS], x, ptx.lds_f32(s_post + k * 4), comb)
                for i in range_constexpr(4):
                    rX[n, k, i] = words[i]
        else:
            for k in range_constexpr(STREAMS):
                for i in range_constexpr(4):
                    rX[n, k, i] = x[k][i]
    return rX


@cute.jit
def store_streams(t: Constexpr[Batch], g_x: Int64, rX: cute.Tensor, token: Int32, column: Int32):
    """The mixed streams to memory, perhaps in place of those that the same thread has read."""
    for n in range_constexpr(2):
        if token + 8 * n < t.count:
            g = g_x + (Int64(token + 8 * n) * (STREAMS * t.hidden) + column) * 2
            for k in range_constexpr(STREAMS):
                ptx.stg128(g + k * (t.hidden * 2), *[rX[n, k, i] for i in range(4)])


@cute.jit
def multiply(t: Constexpr[Batch], s: Int32, rC: cute.Tensor, rX: cute.Tensor, block: Int32, lane: Int32):
    """Add the products of a warp's tokens with block `block` of 32 columns of fn to its sums [tiles][4]."""
    s_block = s + block * (STREAMS * 2 * t.tiles * t.FRAGMENT)
    for k in range_constexpr(STREAMS):
        for half in range_constexpr(2):
            a = [rX[n, k, 2 * half + i] for i in range(2) for n in range(2)]
            for i in range_constexpr(t.tiles):
                s_own = s_block + ((k * 2 + half) * t.tiles + i) * t.FRAGMENT
                b = [*ptx.lds128(s_own + lane * 16), *ptx.lds64(s_own + 512 + lane * 8)]
                for piece in range_constexpr(PIECES):
                    ptx.mma_bf16(rC[i, None], a[0], a[1], a[2], a[3], b[2 * piece], b[2 * piece + 1])


@cute.jit
def share(t: Constexpr[Batch], s: Int32, g_parts: Int64, rC: cute.Tensor, first: Int32, at: Place):
    """Add up what groups of warps made of the tokens from `first` on, to memory. All threads."""
    s_own = s + t.o_part + ((at.group * TOGETHER + at.row) * t.sums + at.lane % 4 * 2) * 4
    for i in range_constexpr(t.tiles):
        for n in range_constexpr(2):
            lo, hi = rC[i, 2 * n].bitcast(Uint32), rC[i, 2 * n + 1].bitcast(Uint32)
            ptx.sts64(s_own + (8 * n * t.sums + 8 * i) * 4, lo, hi)
    cute.arch.sync_threads()
    for n in range_constexpr(-(-TOGETHER * t.sums // 4 // t.threads)):
        own = at.thread + n * t.threads
        token, quad = own // (t.sums // 4), own % (t.sums // 4)
        if token < TOGETHER and first + token < t.count:
            total = cute.make_rmem_tensor((4,), Float32)
            total.fill(0.0)
            for group in range_constexpr(t.GROUPS):
                w = ptx.lds128(s + t.o_part + ((group * TOGETHER + token) * t.sums + quad * 4) * 4)
                for i in range_constexpr(4):
                    total[i] = total[i] + w[i].bitcast(Float32)
            g = g_parts + ((Int64(first + token) * t.slices + at.slice) * t.sums + quad * 4) * 4
            ptx.stg128(g, *[total[i].bitcast(Uint32) for i in range(4)])
    cute.arch.sync_threads()


# Collapsing -------------------------------------------------------------------------------------------------


@cute.jit
def collapse(t: Constexpr[Batch], m: Collapsed, s: Int32) -> None:
    """The CTA's token: its streams weighed, collapsed and normalized."""
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    warp, lane = cute.arch.make_warp_uniform(cute.arch.warp_idx()), cute.arch.lane_idx()
    token = t.count - 1 - block  # those that were mixed last, first
    mine = thread < t.hidden // 8
    piece = thread
    if not mine:
        piece = thread - 16  # the last block of 128 columns once more
    column = piece * 8
    g = m.x.toint() + (Int64(token) * (STREAMS * t.hidden) + column) * 2
    x = [ptx.ldg128(g + k * (t.hidden * 2)) for k in range(STREAMS)]
    gather(t, s, m.parts.toint() + Int64(token) * (t.slices * t.sums * 4), thread)
    values = [v for row in x for w in row for v in ptx.bf16x2_to_f32x2(w)]
    _sum_squares(s + t.o_squares + warp * 4, values, mine, lane)
    cute.arch.sync_threads()
    if warp == 0:
        z = _affine(t, s, m.base.toint(), m.scale.toint(), lane)
        if lane < STREAMS:
            ptx.sts_f32(s + t.o_weights + lane * 4, hyper.sigmoid(z) + Float32(t.hc_eps))
        if const_expr(m.post_out is not None):
            hyper.store_mixing(m.post_out.toint(), m.logits_out.toint(), token, z, lane)
    cute.arch.sync_threads()
    pre = [w.bitcast(Float32) for w in ptx.lds128(s + t.o_weights)]
    a = []
    for i in range_constexpr(8):
        total = Float32(0.0)
        for k in range_constexpr(STREAMS):
            total = total + pre[k] * _float(x[k][i // 2], i % 2)
        a.append(ptx.round_bf16(total))
    gain = ptx.ldg128_constant(m.gain.toint() + column * 2)
    _sum_squares(s + t.o_collapsed + warp * 4, a, mine, lane)
    cute.arch.sync_threads()
    square = _total(s + t.o_collapsed, t.collapsers // 32)
    inv = cute.math.rsqrt(square * Float32(1.0 / t.hidden) + Float32(t.norm_eps), fastmath=True)
    gains = [v for w in gain for v in ptx.bf16x2_to_f32x2(w)]
    row = Int64(token) * t.hidden + column
    y = [a[i] * inv * gains[i] for i in range(8)]
    words = [ptx.f32x2_to_bf16x2(y[2 * i], y[2 * i + 1]) for i in range(4)]
    if const_expr(m.plain is not None):
        plain = [ptx.f32x2_to_bf16x2(a[2 * i], a[2 * i + 1]) for i in range(4)]
        ptx.stg128(m.plain.toint() + row * 2, *plain)
    if const_expr(m.normed is not None):
        ptx.stg128(m.normed.toint() + row * 2, *words)
    if const_expr(m.q is not None):
        rounded = cute.make_rmem_tensor((8,), Float32)
        for i in range_constexpr(4):
            rounded[2 * i], rounded[2 * i + 1] = ptx.bf16x2_to_f32x2(words[i])
        number = Int64(token) * (t.hidden // 128) + piece // 16
        chunk_rows.store_block(rounded, m.q.toint(), m.q_scale.toint(), number, lane)


@cute.jit
def gather(t: Constexpr[Batch], s: Int32, g_parts: Int64, thread: Int32):
    """What CTAs made of the token to shared memory. All threads."""
    pieces = const_expr(t.slices * t.sums // 4)
    for n in range_constexpr(-(-pieces // t.collapsers)):
        own = thread + n * t.collapsers
        if own < pieces:
            ptx.sts128(s + own * 16, *ptx.ldg128(g_parts + own * 16))


def _float(r: Uint32, half: int) -> Float32:
    """One of a pair of bf16. Compilers do not see that it was computed before, and hold pairs in between."""
    return ptx.permute(r, Uint32(0), 0x3244 if half else 0x1044).bitcast(Float32)


@cute.jit
def _sum_squares(s: Int32, values: list, mine: cutlass.Boolean, lane: Int32):
    """The warp's sum of squares to `s`; what is not `mine` is another's."""
    square = Float32(0.0)
    for value in values:
        square = square + value * value
    if not mine:
        square = Float32(0.0)
    square = ptx.lanes_sum(square, 32)
    if lane == 0:
        ptx.sts_f32(s, square)


@cute.jit
def _total(s: Int32, count: Constexpr[int]) -> Float32:
    """The sum of so many floats."""
    total = Float32(0.0)
    for i in range_constexpr(count):
        total = total + ptx.lds_f32(s + i * 4)
    return total


@cute.jit
def _affine(t: Constexpr[Batch], s: Int32, g_base: Int64, g_scale: Int64, lane: Int32) -> Float32:
    """m_i scale + base in lane i; m = x . fn * rsqrt(mean(x^2) + eps). A warp."""
    own = cutlass.min(lane, Int32(t.rows - 1))
    kind = cutlass.min(own // STREAMS, Int32(2))  # scale 0 is for pre, 1 for post, 2 for comb
    r = cluster.inbox_sum(s, t.sums, t.slices, own)
    squares = _total(s + t.o_squares, t.collapsers // 32)
    inv = cute.math.rsqrt(squares * Float32(1.0 / (STREAMS * t.hidden)) + Float32(t.norm_eps), fastmath=True)
    return r * inv * ptx.ldg_f32_constant(g_scale + kind * 4) + ptx.ldg_f32_constant(g_base + own * 4)
