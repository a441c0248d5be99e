"""Hyper-connections for one token on one cluster: CTA `rank` owns `width` columns of every residual stream.

A thread holds four neighboring columns of one stream while the streams are mixed and projected; a warp holds
128 columns, all streams of them, while they are collapsed and normalized. Formulas: DeepSeek-V4
inference/model.py, hc_pre, hc_post and hc_head.
"""

from collections.abc import Sequence
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, Uint32, const_expr, range_constexpr

from dsv4c.codegen.lib import cluster, exchange, ptx, quantize
from dsv4c.codegen.lib.slices import STREAMS, Slice

LOG2E = 1.4426950408889634


class Operands(NamedTuple):
    """x bf16[N, 4, hidden]; to mix f bf16[N, hidden] (or f32, this rank's addends), post f32[N, 4] and logits
    f32[N, 4, 4]; fn f32[rows, 4 hidden], base f32[rows], scale f32[3] or [1], gain bf16[hidden] -> x_out like
    x; post_out and logits_out of the next mixing; normed and, before its norm, plain bf16[N, hidden]; q, the
    normed row in FP8. Without f nothing is mixed; of the results there are some.
    """

    x: cute.Pointer
    f: cute.Pointer | None
    exchange: cute.Pointer | None
    site: cute.Pointer | None
    post: cute.Pointer | None
    logits: cute.Pointer | None
    fn: cute.Pointer
    base: cute.Pointer
    scale: cute.Pointer
    gain: cute.Pointer
    x_out: cute.Pointer | None
    post_out: cute.Pointer | None
    logits_out: cute.Pointer | None
    normed: cute.Pointer | None
    plain: cute.Pointer | None
    q: cute.Pointer | None
    q_scale: cute.Pointer | None


class Place(NamedTuple):
    """What a thread works on: of `token`, on CTA `rank` of its cluster, four columns from `column` on of one
    stream; with the weights of its columns and, where they are mixed, all streams of them. `site`: of an
    exchange, as `exchange.open_site` gives it.
    """

    thread: Int32
    warp: Int32
    lane: Int32
    token: Int32
    rank: Int32
    quad: Int32
    stream: Int32
    column: Int32
    weights: cute.Tensor
    x: tuple
    post: Float32
    site: tuple


# One token's boundary ---------------------------------------------------------------------------------------


@cute.jit
def enter(t: Constexpr[Slice], m: Operands, sm: Int32) -> Place:
    """Before the wait: inboxes open, weights under way; what is older than the predecessor, who lets this
    kernel begin behind its own wait, is read.
    """
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    warp, lane = cute.arch.make_warp_uniform(cute.arch.warp_idx()), cute.arch.lane_idx()
    token, rank = block // t.ctas, cute.arch.block_idx_in_cluster()
    quad, stream = thread % (t.width // 4), thread // (t.width // 4)
    column = rank * t.width + quad * 4
    site: tuple = ()
    if const_expr(t.ranks > 1):
        site = exchange.open_site(m.exchange, m.site, t.ranks)  # type: ignore[arg-type]
    open_inboxes(t, sm, thread)
    if const_expr(m.f is not None):
        early_comb(t, sm, m.logits.toint(), token, t.iterations, t.hc_eps, warp, lane)
    weights = prefetch(t, sm, m.fn.toint(), stream, quad, column)
    stage_vectors(t, sm, m.base.toint(), m.scale.toint(), m.gain.toint(), rank, thread)
    x, post = [], Float32(0.0)
    if const_expr(m.f is not None):
        x, post = load_early(t, m.x.toint(), m.post.toint(), token, stream, column)
    return Place(thread, warp, lane, token, rank, quad, stream, column, weights, tuple(x), post, site)


@cute.jit
def addend(t: Constexpr[Slice], m: Operands, at: Place) -> tuple[Int64, Float32, Uint32]:
    """Of a sum over ranks that is mixed, the thread's number, and this rank's part of it, also as a word."""
    number = Int64(at.token) * t.hidden + at.rank * t.width + at.thread
    own = ptx.ldg_f32(m.f.toint() + number * 4)
    return number, own, own.bitcast(Uint32)


@cute.jit
def keep_sum(t: Constexpr[Slice], sm: Int32, at: Place, total: Float32) -> None:
    """The sum, rounded, for `cross`; and what `enter` has put under way is there. Behind it a CTA barrier."""
    ptx.sts16(sm + t.o_f + at.thread * 2, ptx.f32x2_to_bf16x2(total, total))
    ptx.cp_async_wait(0)


@cute.jit
def arrived() -> None:
    """Behind the wait: what `enter` has stored and put under way is there. All threads."""
    ptx.cp_async_wait(0)
    cute.arch.sync_threads()


@cute.jit
def cross(t: Constexpr[Slice], m: Operands, sm: Int32, at: Place) -> None:
    """Streams mixed, projected, collapsed and normalized."""
    warp, lane, token = at.warp, at.lane, at.token
    if const_expr(m.f is not None):
        if const_expr(t.ranks > 1):
            f = ptx.lds64(sm + t.o_f + at.quad * 8)
        else:
            f = load_row(t, m.f.toint(), token, at.column)
        x0, x1 = mix(f, at.x, at.post, load_comb(t, sm, at.stream))
    else:
        x0, x1 = load_stream(t, m.x.toint(), token, at.stream, at.column)
    ptx.sts64(sm + t.o_x + (at.stream * t.width + at.quad * 4) * 2, x0, x1)
    part = project(t, sm, at.weights, x0, x1, at.stream, at.quad, lane)
    share_sums(t, sm, part, at.rank, warp, lane)
    if const_expr(m.x_out is not None):
        store_stream(t, m.x_out.toint(), token, at.stream, at.column, x0, x1)
    if warp < t.groups:
        z = affine(t, sm, t.norm_eps, lane)
        a = collapse(t, sm, z, t.hc_eps, warp, lane)
        w0, w1 = normalize(t, sm, a, t.norm_eps, at.rank, warp, lane)
        own = at.rank * t.width + warp * 128 + lane * 4
        if const_expr(m.normed is not None):
            store_row(t, m.normed.toint(), token, own, w0, w1)
        if const_expr(m.plain is not None):
            store_row(t, m.plain.toint(), token, own, *as_words(a))
        if const_expr(m.q is not None):
            store_fp8(t, m.q.toint(), m.q_scale.toint(), token, own, w0, w1, lane)
    if const_expr(m.post_out is not None):
        g_post, g_logits = m.post_out.toint(), m.logits_out.toint()
        if warp == t.groups and at.rank == 0:  # needed by the next mixing alone: nobody here waits for it
            z = affine(t, sm, t.norm_eps, lane)
            store_mixing(g_post, g_logits, token, z, lane)


# Before the wait --------------------------------------------------------------------------------------------


@cute.jit
def open_inboxes(t: Constexpr[Slice], sm: Int32, thread: Int32):
    """Open the inboxes of both reductions and tell the cluster. All threads."""
    cluster.open_inbox(sm + t.o_bars, t.ctas * t.sums * 4, thread)
    cluster.open_inbox(sm + t.o_bars + 8, t.hidden // 128 * 4, thread)
    cluster.arrive()


@cute.jit
def early_comb(
    t: Constexpr[Slice],
    sm: Int32,
    g_logits: Int64,
    token: Int32,
    iterations: Constexpr[int],
    eps: Constexpr[float],
    warp: Int32,
    lane: Int32,
):
    """comb of `mix` to shared memory, by the last warp: of logits older than the predecessor. Before
    `prefetch`, which takes the registers that this does. See `arrived`.
    """
    if warp == t.warps - 1:
        z = ptx.ldg_early32(g_logits + (token * STREAMS * STREAMS + lane % (STREAMS * STREAMS)) * 4)
        rK = cute.make_rmem_tensor((STREAMS * STREAMS,), Float32)
        for i in range_constexpr(STREAMS * STREAMS):
            rK[i] = cute.arch.shuffle_sync(z.bitcast(Float32), i)
        sinkhorn(rK, iterations, eps)
        if lane == 0:
            store_comb(t, sm, rK, Int32(0))


@cute.jit
def prefetch(t: Constexpr[Slice], sm: Int32, g_fn: Int64, stream: Int32, quad: Int32, column: Int32):
    """The thread's four columns of fn: `held` rows come back, the others go to its shared places."""
    rF = cute.make_rmem_tensor((4 * t.held if t.held else 4,), Uint32)
    g = g_fn + (stream * t.hidden + column) * 4
    for i in range_constexpr(t.rows):
        if const_expr(i < t.held):
            w = ptx.ldg_early128(g + i * (STREAMS * t.hidden * 4))
            for n in range_constexpr(4):
                rF[4 * i + n] = w[n]
        else:
            s = sm + ((i - t.held) * STREAMS + stream) * (t.width * 4) + quad * 16
            ptx.cp_async16(s, g + i * (STREAMS * t.hidden * 4))
    return rF


@cute.jit
def stage_vectors(
    t: Constexpr[Slice], sm: Int32, g_base: Int64, g_scale: Int64, g_gain: Int64, rank: Int32, thread: Int32
):
    """The CTA's gains to shared memory; base and scale of projection i to place i. See `arrived`."""
    if thread < t.width // 8:
        ptx.cp_async16(sm + t.o_gain + thread * 16, g_gain + rank * (t.width * 2) + thread * 16)
    ptx.cp_async_commit()
    i = thread - (t.threads - 32)  # the last warp: the others' copies stay ahead
    if i >= 0 and i < t.rows:
        kind = Int32(0)  # scale 0 is for pre, 1 for post, 2 for comb
        if i >= STREAMS:
            kind = Int32(1)
        if i >= 2 * STREAMS:
            kind = Int32(2)
        ptx.sts_f32(sm + t.o_affine + i * 4, ptx.ldg_f32_constant(g_base + i * 4))
        ptx.sts_f32(sm + t.o_affine + 128 + i * 4, ptx.ldg_f32_constant(g_scale + kind * 4))


# Streams ----------------------------------------------------------------------------------------------------


@cute.jit
def load_stream(t: Constexpr[Slice], g_x: Int64, token: Int32, stream: Int32, column: Int32):
    """Four columns of one stream, as two bf16x2 words."""
    return ptx.ldg64(g_x + ((Int64(token) * STREAMS + stream) * t.hidden + column) * 2)


@cute.jit
def load_row(t: Constexpr[Slice], g_f: Int64, token: Int32, column: Int32):
    """Four columns of what is mixed in, as two bf16x2 words."""
    return ptx.ldg64(g_f + (Int64(token) * t.hidden + column) * 2)


@cute.jit
def load_early(t: Constexpr[Slice], g_x: Int64, g_post: Int64, token: Int32, stream: Int32, column: Int32):
    """x and post of `mix`, older than the predecessor: before the wait."""
    g = g_x + (Int64(token) * STREAMS * t.hidden + column) * 2
    x = [ptx.ldg_early64(g + j * (t.hidden * 2)) for j in range(STREAMS)]
    return x, ptx.ldg_early32(g_post + (token * STREAMS + stream) * 4).bitcast(Float32)


@cute.jit
def load_comb(t: Constexpr[Slice], sm: Int32, stream: Int32):
    """comb of `mix`, from shared memory."""
    return [ptx.lds_f32(sm + t.o_comb + (j * STREAMS + stream) * 4) for j in range(STREAMS)]


@cute.jit
def mix(f: tuple, x: Sequence[tuple], post: Float32, comb: list):
    """post_k f + sum_j comb[j, k] x_j of columns of stream k, rounded once to bf16, two in each word."""
    words = []
    for i in range_constexpr(len(f)):
        fl, fh = ptx.bf16x2_to_f32x2(f[i])
        xl, xh = ptx.bf16x2_to_f32x2(x[0][i])
        # Of two products one is rounded: which, must not depend on the code around, or ranks would differ
        # from one GPU in every stream.
        lo = ptx.fma(post, fl, comb[0] * xl)
        hi = ptx.fma(post, fh, comb[0] * xh)
        for j in range_constexpr(1, STREAMS):
            xl, xh = ptx.bf16x2_to_f32x2(x[j][i])
            lo = lo + comb[j] * xl
            hi = hi + comb[j] * xh
        words.append(ptx.f32x2_to_bf16x2(lo, hi))
    return words


@cute.jit
def store_stream(
    t: Constexpr[Slice], g_x: Int64, token: Int32, stream: Int32, column: Int32, w0: Uint32, w1: Uint32
):
    """Four columns of a stream, bf16 [tokens][4][hidden]. After `share_sums`: x may be updated in place."""
    ptx.stg64(g_x + ((Int64(token) * STREAMS + stream) * t.hidden + column) * 2, w0, w1)


# The first reduction: projections and sum of squares --------------------------------------------------------


@cute.jit
def project(
    t: Constexpr[Slice],
    sm: Int32,
    rF: cute.Tensor,
    x0: Uint32,
    x1: Uint32,
    stream: Int32,
    quad: Int32,
    lane: Int32,
):
    """The warp's parts of x . fn[i] and, as sum `rows`, of sum(x^2), which `lanes_sums` leaves."""
    a, b = ptx.bf16x2_to_f32x2(x0)
    c, d = ptx.bf16x2_to_f32x2(x1)
    values = cute.make_rmem_tensor((t.stride,), Float32)
    values.fill(0.0)
    values[t.rows] = a * a + b * b + c * c + d * d
    s = sm + (stream * t.width + quad * 4) * 4
    for i in range_constexpr(t.rows):
        if const_expr(i < t.held):
            w = rF[4 * i], rF[4 * i + 1], rF[4 * i + 2], rF[4 * i + 3]
        else:
            w = ptx.lds128(s + (i - t.held) * (STREAMS * t.width * 4))
        values[i] = (
            a * w[0].bitcast(Float32)
            + b * w[1].bitcast(Float32)
            + c * w[2].bitcast(Float32)
            + d * w[3].bitcast(Float32)
        )
    return lanes_sums(values, t.stride, lane)


@cute.jit
def lanes_sums(values: cute.Tensor, n: Constexpr[int], lane: Int32):
    """Sum over the warp of values[lane // (32 / n)], for n values per lane (a power of two, at most 32).

    Each step halves what a lane still carries, so n values cost n - 1 shuffles and not 5 n. Lanes 16 apart
    are added first, neighbors last, whatever n is: a sum has the same bits among any number of others.
    """
    for step in range_constexpr(5):
        offset = const_expr(16 >> step)
        half = const_expr(n >> (step + 1))
        upper = (lane & offset) != 0
        for i in range_constexpr(half):
            keep = values[i]
            give = values[i + half]
            if upper:
                keep = values[i + half]
                give = values[i]
            values[i] = keep + cute.arch.shuffle_sync_bfly(give, offset=offset)
        if const_expr(half == 0):
            values[0] = values[0] + cute.arch.shuffle_sync_bfly(values[0], offset=offset)
    return values[0]


@cute.jit
def share_sums(t: Constexpr[Slice], sm: Int32, r: Float32, rank: Int32, warp: Int32, lane: Int32):
    """Add the warps' parts `r` of `project` and send the CTA's sums to every CTA. All threads."""
    own = lane // (32 // t.stride)
    if own < t.sums:
        ptx.sts_f32(sm + t.o_part + (warp * t.stride + own) * 4, r)
    cute.arch.sync_threads()
    cluster.meet()
    own = cutlass.min(lane, Int32(t.sums - 1))
    if warp < t.ctas:
        value = cluster.inbox_sum(sm + t.o_part, t.stride, t.warps, own)
        for n in range_constexpr(-(-t.ctas // t.warps)):
            peer = warp + n * t.warps
            if peer < t.ctas:
                s_sum = sm + t.o_sums + (rank * t.stride + own) * 4
                cluster.send_f32(s_sum, sm + t.o_bars, peer, value, lane < t.sums)


@cute.jit
def affine(t: Constexpr[Slice], sm: Int32, eps: Constexpr[float], lane: Int32):
    """m_i scale + base in lane i; m = x . fn * rsqrt(mean(x^2) + eps). Waits for all CTAs."""
    ptx.mbarrier_wait(sm + t.o_bars, Int32(0))
    return affine_of(t, sm, sm + t.o_sums, eps, lane)


@cute.jit
def affine_of(t: Constexpr[Slice], sm: Int32, s_sums: Int32, eps: Constexpr[float], lane: Int32):
    """The same of the sums of all CTAs at `s_sums`."""
    own = lane % t.stride
    r = cluster.inbox_sum(s_sums, t.stride, t.ctas, own)
    squares = cute.arch.shuffle_sync(r, t.rows)
    inv = cute.math.rsqrt(squares * Float32(1.0 / (STREAMS * t.hidden)) + Float32(eps), fastmath=True)
    scale = ptx.lds_f32(sm + t.o_affine + 128 + lane * 4)
    return r * inv * scale + ptx.lds_f32(sm + t.o_affine + lane * 4)


@cute.jit
def sigmoid(r: Float32):
    """1 / (1 + e^-r), about 3 ulp."""
    return cute.arch.rcp_approx(Float32(1.0) + ptx.ex2(r * Float32(-LOG2E)))


# Collapse and normalize -------------------------------------------------------------------------------------


@cute.jit
def collapse(t: Constexpr[Slice], sm: Int32, z: Float32, hc_eps: Constexpr[float], group: Int32, lane: Int32):
    """bf16(sum_i pre_i x_i) of four columns of `group`, as floats; lane i has z_i, pre = sigmoid + eps."""
    weight = sigmoid(z) + Float32(hc_eps)
    rA = cute.make_rmem_tensor((4,), Float32)
    rA.fill(0.0)
    for i in range_constexpr(STREAMS):
        pre = cute.arch.shuffle_sync(weight, i)
        w = ptx.lds64(sm + t.o_x + (i * t.width + group * 128 + lane * 4) * 2)
        for n in range_constexpr(2):
            lo, hi = ptx.bf16x2_to_f32x2(w[n])
            rA[2 * n] = rA[2 * n] + pre * lo
            rA[2 * n + 1] = rA[2 * n + 1] + pre * hi
    for n in range_constexpr(4):
        rA[n] = ptx.round_bf16(rA[n])
    return rA


@cute.jit
def normalize(
    t: Constexpr[Slice],
    sm: Int32,
    rA: cute.Tensor,
    eps: Constexpr[float],
    rank: Int32,
    group: Int32,
    lane: Int32,
):
    """bf16(a * rsqrt(mean(a^2) + eps) * gain) of four columns, as two words. The second reduction."""
    squares = ptx.lanes_sum(rA[0] * rA[0] + rA[1] * rA[1] + rA[2] * rA[2] + rA[3] * rA[3], 32)
    s_square = sm + t.o_squares + (rank * t.groups + group) * 4
    cluster.send_f32(s_square, sm + t.o_bars + 8, lane, squares, lane < t.ctas)
    gain = ptx.lds64(sm + t.o_gain + (group * 128 + lane * 4) * 2)
    ptx.mbarrier_wait(sm + t.o_bars + 8, Int32(0))
    total = Float32(0.0)
    for n in range_constexpr(-(-t.hidden // 4096)):
        if lane + n * 32 < t.hidden // 128:
            total = total + ptx.lds_f32(sm + t.o_squares + (lane + n * 32) * 4)
    total = ptx.lanes_sum(total, 32)
    inv = cute.math.rsqrt(total * Float32(1.0 / t.hidden) + Float32(eps), fastmath=True)
    words = []
    for n in range_constexpr(2):
        lo, hi = ptx.bf16x2_to_f32x2(gain[n])
        words.append(ptx.f32x2_to_bf16x2(rA[2 * n] * inv * lo, rA[2 * n + 1] * inv * hi))
    return words[0], words[1]


@cute.jit
def as_words(rA: cute.Tensor):
    """Four columns of a row, which are bf16 values, as two words."""
    return ptx.f32x2_to_bf16x2(rA[0], rA[1]), ptx.f32x2_to_bf16x2(rA[2], rA[3])


@cute.jit
def store_fp8(
    t: Constexpr[Slice],
    g_codes: Int64,
    g_scales: Int64,
    token: Int32,
    column: Int32,
    w0: Uint32,
    w1: Uint32,
    lane: Int32,
):
    """Quantize a warp's 128 columns: e4m3 [tokens][hidden], ue8m0 [tokens][hidden / 128]."""
    a, b = ptx.bf16x2_to_f32x2(w0)
    c, d = ptx.bf16x2_to_f32x2(w1)
    top = cute.arch.fmax(cute.arch.fmax(a, -a), cute.arch.fmax(b, -b))
    top = cute.arch.fmax(top, cute.arch.fmax(cute.arch.fmax(c, -c), cute.arch.fmax(d, -d)))
    byte = quantize.fp8_exponent(ptx.lanes_max(top, 32))
    f = quantize.reciprocal(byte)
    ptx.stg32(g_codes + Int64(token) * t.hidden + column, quantize.codes4(a * f, b * f, c * f, d * f))
    if lane == 0:
        ptx.stg_u8(g_scales + token * (t.hidden // 128) + column // 128, Uint32(byte))


@cute.jit
def store_row(t: Constexpr[Slice], g: Int64, token: Int32, column: Int32, w0: Uint32, w1: Uint32):
    """Four columns of a bf16 [tokens][hidden] row."""
    ptx.stg64(g + (Int64(token) * t.hidden + column) * 2, w0, w1)


# Weights of the next mixing ---------------------------------------------------------------------------------


@cute.jit
def store_mixing(g_post: Int64, g_logits: Int64, token: Int32, z: Float32, lane: Int32):
    """post_k = 2 sigmoid(z_k) from lanes 4..7, and the logits of comb, which lanes 8..23 hold."""
    post = Float32(2.0) * sigmoid(z)
    if lane >= STREAMS and lane < 2 * STREAMS:
        ptx.stg_f32(g_post + (token * STREAMS + lane - STREAMS) * 4, post)
    if lane >= 2 * STREAMS and lane < 2 * STREAMS + STREAMS * STREAMS:
        ptx.stg_f32(g_logits + (token * STREAMS * STREAMS + lane - 2 * STREAMS) * 4, z)


@cute.jit
def sinkhorn(rK: cute.Tensor, iterations: Constexpr[int], eps: Constexpr[float]):
    """Sinkhorn normalization of a 4x4 matrix of logits in place, by row = input stream; a matrix a lane.

    C = softmax of each row + eps; columns; then iterations - 1 times rows and columns: x / (sum + eps). C is
    kept as diag(u) K diag(v). A row step alone would be u_j / R_j; scaled by P = R_0 R_1 R_2 R_3 it needs no
    division.
    """
    rU = cute.make_rmem_tensor((STREAMS,), Float32)
    rV = cute.make_rmem_tensor((STREAMS,), Float32)
    for j in range_constexpr(STREAMS):
        softmax_row(rK, j, eps)
        rU[j] = Float32(1.0)
    for k in range_constexpr(STREAMS):
        rV[k] = cute.arch.rcp_approx((rK[k] + rK[4 + k]) + (rK[8 + k] + rK[12 + k]) + Float32(eps))
    for _ in cutlass.range(iterations - 1, unroll=1):
        rows_and_columns(rK, rU, rV, eps)
    for j in range_constexpr(STREAMS):
        for k in range_constexpr(STREAMS):
            rK[STREAMS * j + k] = rK[STREAMS * j + k] * rU[j] * rV[k]


@cute.jit
def store_comb(t: Constexpr[Slice], sm: Int32, rK: cute.Tensor, number: Int32):
    """The matrix of token `number` of the cluster to shared memory."""
    for j in range_constexpr(STREAMS):
        w = [rK[STREAMS * j + k].bitcast(Uint32) for k in range(STREAMS)]
        ptx.sts128(sm + t.o_comb + (number * STREAMS + j) * 16, w[0], w[1], w[2], w[3])


@cute.jit
def softmax_row(rK: cute.Tensor, j: Constexpr[int], eps: Constexpr[float]):
    """softmax(K_j) + eps."""
    top = cute.arch.fmax(
        cute.arch.fmax(rK[4 * j], rK[4 * j + 1]), cute.arch.fmax(rK[4 * j + 2], rK[4 * j + 3])
    )
    for k in range_constexpr(STREAMS):
        rK[4 * j + k] = ptx.ex2((rK[4 * j + k] - top) * Float32(LOG2E))
    inv = cute.arch.rcp_approx((rK[4 * j] + rK[4 * j + 1]) + (rK[4 * j + 2] + rK[4 * j + 3]))
    for k in range_constexpr(STREAMS):
        rK[4 * j + k] = ptx.fma(rK[4 * j + k], inv, Float32(eps))


@cute.jit
def rows_and_columns(rK: cute.Tensor, rU: cute.Tensor, rV: cute.Tensor, eps: Constexpr[float]):
    """One row and one column normalization of diag(u) K diag(v). Which products are rounded must not depend
    on the code around, or boundaries of few rows would differ from those of many.
    """
    rR = cute.make_rmem_tensor((STREAMS,), Float32)
    for j in range_constexpr(STREAMS):
        row = dot([rK[4 * j + k] for k in range(STREAMS)], [rV[k] for k in range(STREAMS)])
        rR[j] = ptx.fma(rU[j], row, Float32(eps))
    low = rR[0] * rR[1]
    high = rR[2] * rR[3]
    rU[0] = rU[0] * (rR[1] * high)
    rU[1] = rU[1] * (rR[0] * high)
    rU[2] = rU[2] * (rR[3] * low)
    rU[3] = rU[3] * (rR[2] * low)
    floor = low * high * Float32(eps)
    for k in range_constexpr(STREAMS):
        column = dot([rK[4 * j + k] for j in range(STREAMS)], [rU[j] for j in range(STREAMS)])
        rV[k] = rV[k] * cute.arch.rcp_approx(ptx.fma(rV[k], column, floor))


def dot(a: list, b: list):
    """The sum of four products."""
    return ptx.fma(a[0], b[0], a[1] * b[1]) + ptx.fma(a[2], b[2], a[3] * b[3])
