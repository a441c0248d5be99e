"""Hyper-connections for many tokens, in two launches: what a cluster of a token's CTAs would tell each other
goes through memory, once for all tokens, and nobody waits for it in between.

The first mixes and projects. A CTA keeps its columns of fn; a thread mixes eight neighboring columns of all
streams of two tokens, which are then its part of the left operand of a wgmma: its k is a column, in an order
of its own. fn is f32, and lies there as three bf16 pieces, 8 bits each, whose sum it is, as rows of their
own: products are exact as those of f32 are, and are added up in f32. Their order is that of the tensor cores,
so a token's projections are not bit for bit those of `hyper`, which adds up the same products lane by lane;
streams are mixed with the same bits. A thread copies what it mixes to shared memory steps ahead, and waits
for nobody else's copies: registers hold no more than a step.

The second reads the mixed streams again, of the last tokens first, which L2 still has. Formulas: DeepSeek-V4
inference/model.py, hc_pre, hc_post and hc_head.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import BFloat16, Constexpr, Float32, Int32, Int64, Uint32, const_expr, range_constexpr
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.tensor_utils.layout import LayoutEnum

from dsv4c.codegen.lib import chunk_rows, cluster, gemm, hyper, ptx
from dsv4c.codegen.lib.slices import PIECES, STREAMS, TOGETHER, Batch


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
    slice_, group = block % t.slices, warp // 4
    column = slice_ * t.width + group * 32 + lane % 4 * 8
    keep_fn(t, s, m.fn.toint(), slice_, warp, lane)
    cute.arch.sync_threads()
    row = warp % 4 * 16 + lane // 4
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
        tile, stream, block = own % t.tiles, own // t.tiles % STREAMS, own // t.tiles // STREAMS
        lines = (block * 2 + stream // 2) * t.projected + tile * 8 + lane // 4
        s_row = s + lines * 128 + lane % 4 * 4
        for half in range_constexpr(2):
            for side in range_constexpr(2):
                s_own = s_row + ((stream % 2 * 4 + half * 2 + side) ^ lane // 4) * 16
                words = _pieces(w[half][2 * side], w[half][2 * side + 1])
                for piece in range_constexpr(PIECES):
                    ptx.sts32(s_own + piece * (t.tiles * 1024), words[piece])


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
    """Streams of the CTA's tokens mixed and projected, `TOGETHER` at a time. What a step takes is copied
    while those before it compute, by the threads that take it.
    """
    addresses = (m.x.toint(), m.f.toint()) if const_expr(m.f is not None) else (m.x.toint(),)
    turns = (t.lots - at.block + (t.blocks - 1)) // t.blocks
    types = BFloat16, BFloat16, OperandMajorMode.K, OperandMajorMode.K, Float32, (1, 1, 1)
    shape = const_expr((TOGETHER, t.projected, 32 * STREAMS))
    mma = sm90.make_trivial_tiled_mma(*types, shape[:2], a_source=warpgroup.OperandSource.RMEM)
    mma.set(warpgroup.Field.ACCUMULATE, True)
    layout = sm90.make_smem_layout_b(LayoutEnum.ROW_MAJOR, shape, BFloat16, t.width // 32)
    fn = mma.make_fragment_B(mma.get_slice(at.thread % 128).partition_B(gemm.operand(BFloat16, s, layout)))
    mixed = mma.make_fragment_A(mma.partition_shape_A((TOGETHER, 32 * STREAMS)))
    words = cute.make_tensor(cute.recast_ptr(mixed.iterator, dtype=Uint32), cute.make_layout(32))
    sums = cute.make_rmem_tensor(mma.partition_shape_C(shape[:2]), Float32)
    for ahead in range_constexpr(t.STAGES - 1):
        copy(t, s, addresses, at, Int32(0), ahead)
    for turn in cutlass.range(turns, unroll=1):
        first = (turn * t.blocks + at.block) * TOGETHER
        number = turn % (t.combs // TOGETHER) * TOGETHER + at.row
        if const_expr(m.f is not None):
            made = m.logits.toint(), m.post.toint()
            if number == at.row:
                mix_weights(t, s, *made, first, at.thread)
        sums.fill(0.0)
        for step in range_constexpr(t.steps):
            copy(t, s, addresses, at, turn, step + t.STAGES - 1)
            ptx.cp_async_wait(t.STAGES - 1)
            rX = mix(t, s, s_own(t, s, at, turn, step), len(addresses) > 1, number)
            for n in range_constexpr(2):
                for k in range_constexpr(STREAMS):
                    for i in range_constexpr(4):
                        words[8 * k + 2 * i + n] = rX[n, k, i]
            warpgroup.fence()
            block = step * t.GROUPS + at.group
            for c in range_constexpr(2 * STREAMS):
                cute.gemm(mma, sums, mixed[None, None, c], fn[None, None, c, block], sums)
            warpgroup.commit_group()
            if const_expr(m.x_out is not None):
                store_streams(t, m.x_out.toint(), rX, first + at.row, at.column + 32 * t.GROUPS * step)
            warpgroup.wait_group(0)
        share(t, s, m.parts.toint(), sums, first, at)


@cute.jit
def s_own(t: Constexpr[Batch], s: Int32, at: Place, turn: Int32, step: Constexpr[int]) -> Int32:
    """Where a thread's part of a step lies, in pieces of 16 bytes `t.threads` of them apart."""
    return s + t.o_ring + (turn * t.steps + step) % t.STAGES * t.stage + at.thread * 16


@cute.jit
def copy(
    t: Constexpr[Batch], s: Int32, addresses: tuple, at: Place, turn: Int32, step: Constexpr[int]
) -> None:
    """Eight columns of all streams and of f of a thread's two tokens to the ring, of a step that may be one
    of a later turn; those of the last token for one that is not, and nothing of a turn that is not.
    """
    later = const_expr(step // t.steps)
    token = ((turn + later) * t.blocks + at.block) * TOGETHER + at.row
    column = at.column + 32 * t.GROUPS * const_expr(step % t.steps)
    s_to = s_own(t, s, at, turn, step)
    if token - at.row < t.count:
        for n in range_constexpr(2):
            own = Int64(cutlass.min(token + 8 * n, Int32(t.count - 1)))
            g = addresses[0] + (own * (STREAMS * t.hidden) + column) * 2
            pieces = [g + j * (t.hidden * 2) for j in range(STREAMS)]
            pieces += [g_f + (own * t.hidden + column) * 2 for g_f in addresses[1:]]
            for j in range_constexpr(len(pieces)):
                ptx.cp_async16(s_to + (n * (STREAMS + 1) + j) * (t.threads * 16), pieces[j])
    ptx.cp_async_commit()


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
def mix(t: Constexpr[Batch], s: Int32, s_x: Int32, mixes: Constexpr[bool], number: Int32):
    """Eight columns of all streams of a token and the eighth behind it, as `copy` left them, mixed if there
    is f beside them, as bf16x2 words [2][4][4]; `number` says which comb is theirs.
    """
    rX = cute.make_rmem_tensor((2, STREAMS, 4), Uint32)
    for n in range_constexpr(2):
        s_piece = s_x + n * (STREAMS + 1) * (t.threads * 16)
        x = [ptx.lds128(s_piece + j * (t.threads * 16)) for j in range(STREAMS + mixes)]
        if const_expr(mixes):
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
def share(t: Constexpr[Batch], s: Int32, g_parts: Int64, rC: cute.Tensor, first: Int32, at: Place):
    """Add up what groups of warps made of the tokens from `first` on, to memory. All threads."""
    s_own = s + t.o_part + ((at.group * TOGETHER + at.row) * t.sums + at.lane % 4 * 2) * 4
    for i in range_constexpr(t.tiles):
        r = [(rC[n + 4 * (i + 2 * t.tiles)] + rC[n + 4 * (i + t.tiles)]) + rC[n + 4 * i] for n in range(4)]
        for n in range_constexpr(2):
            lo, hi = r[2 * n].bitcast(Uint32), r[2 * n + 1].bitcast(Uint32)
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
