"""The router's device functions: gate products per CTA, scores, top-k of one token per CTA, renormalized
weights.

Formulas: DeepSeek-V4 inference/model.py, Gate: s = sqrt(softplus(x . gate)); experts by s + bias, or by a
table of the token; weights s[experts] / (sum + eps) * factor.
"""

import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, Uint32, const_expr, range_constexpr

from dsv4c.codegen.lib import hyper, ptx
from dsv4c.codegen.lib.slices import Gate

LOWEST = -(2**31)


# Gate products ----------------------------------------------------------------------------------------------


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
    """The warp's part of expert r times token b in lane r * tokens + b (modulo `stride`)."""
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
    if lane < t.sums:
        ptx.sts_f32(sm + t.o_part + (thread // 32 * t.stride + lane) * 4, r)
    cute.arch.sync_threads()
    if thread < t.sums:
        total = Float32(0.0)
        for i in range_constexpr(t.threads // 32):
            total = total + ptx.lds_f32(sm + t.o_part + (i * t.stride + thread) * 4)
        expert = block * t.rows + thread // t.tokens
        ptx.stg_f32(g_logits + (thread % t.tokens * t.experts + expert) * 4, total)


# Choice: one CTA per token ----------------------------------------------------------------------------------


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
def stage_bias(sm: Int32, g_bias: Int64, experts: Constexpr[int], thread: Int32):
    """Biases to shared memory, a thread each. They never change: before the wait."""
    if thread < experts:
        ptx.sts_f32(sm + thread * 4, ptx.ldg_f32_constant(g_bias + thread * 4))


@cute.jit
def stage_scores(sm: Int32, g_logits: Int64, experts: Constexpr[int], padded: Constexpr[int], thread: Int32):
    """After the biases f32 [padded]: scores f32 [padded], order of score + bias i32 [padded]."""
    value = Float32(0.0)
    key = Int32(LOWEST)
    if thread < experts:
        value = score(ptx.ldg_f32(g_logits + thread * 4))
        key = ordered(value + ptx.lds_f32(sm + thread * 4))
    ptx.sts_f32(sm + (padded + thread) * 4, value)
    ptx.sts32(sm + (2 * padded + thread) * 4, key.bitcast(Uint32))
    cute.arch.sync_threads()


@cute.jit
def first_largest(rK: cute.Tensor, start: Constexpr[int], count: Constexpr[int]):
    """The largest of `count` keys from `start` on, and its place: the first among equals."""
    best = rK[start]
    at = Int32(start)
    if const_expr(count > 1):
        best, at = first_largest(rK, start, count // 2)
        other, place = first_largest(rK, start + count // 2, count - count // 2)
        if other > best:
            best = other
            at = place
    return best, at


@cute.jit
def top_experts(sm: Int32, padded: Constexpr[int], k: Constexpr[int], lane: Int32):
    """(expert, score) i of the k largest score + bias in lane i, the lower on ties. One warp."""
    each = const_expr(padded // 32)  # neighbors
    rK = cute.make_rmem_tensor((each,), Int32)
    for i in range_constexpr(each):
        rK[i] = Int32(ptx.lds32(sm + (2 * padded + lane * each + i) * 4))
    expert = Int32(0)
    for n in range_constexpr(k):
        best, at = first_largest(rK, 0, each)
        top = cute.arch.warp_redux_sync(best, kind="max")
        winner = Int32(32 * each)
        if best == top:
            winner = lane * each + at
        winner = cute.arch.warp_redux_sync(winner, kind="min")
        if lane == n:
            expert = winner
        for i in range_constexpr(each):
            if winner == lane * each + i:
                rK[i] = Int32(LOWEST)
    chosen = Float32(0.0)
    if lane < k:
        chosen = ptx.lds_f32(sm + (padded + expert) * 4)
    return expert, chosen


@cute.jit
def table_experts(
    g_logits: Int64, g_table: Int64, g_ids: Int64, token: Int32, k: Constexpr[int], lane: Int32
):
    """(expert, score) number i of the token's row of the table in lane i."""
    expert = Int32(0)
    chosen = Float32(0.0)
    if lane < k:
        ids = Int32(ptx.ldg32(g_ids + token * 4))
        expert = Int32(ptx.ldg32_constant(g_table + (Int64(ids) * k + lane) * 4))
        chosen = score(ptx.ldg_f32(g_logits + expert * 4))
    return expert, chosen


@cute.jit
def store_choice(
    g_experts: Int64,
    g_weights: Int64,
    expert: Int32,
    chosen: Float32,
    token: Int32,
    k: Constexpr[int],
    eps: Constexpr[float],
    factor: Constexpr[float],
    lane: Int32,
):
    """experts i32 [tokens][k], weights f32 [tokens][k] = s / (sum + eps) * factor; other lanes hold 0."""
    total = ptx.lanes_sum(chosen, 32)
    if lane < k:
        ptx.stg32(g_experts + (token * k + lane) * 4, expert.bitcast(Uint32))
        weight = ptx.divide(chosen, total + Float32(eps)) * Float32(factor)
        ptx.stg_f32(g_weights + (token * k + lane) * 4, weight)
