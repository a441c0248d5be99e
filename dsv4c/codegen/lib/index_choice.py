"""Index scores and the best of them in one launch: a cluster per token, whose CTAs share its keys.

Every CTA prepares the token's queries for itself. What it scores it sends to the first CTA's shared memory as
well, whose barrier counts the bytes; the first one chooses when all are there.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, Int64, Uint32, const_expr, range_constexpr

from dsv4c.codegen.lib import cluster, index, ptx, topk
from dsv4c.codegen.lib.geometry import Choice


class Operands(NamedTuple):
    """q bf16[N, heads, 128] before RoPE, keys [S, capacity, 128], weights bf16[N, heads], frequencies
    f32[32], positions, slots i32[N] -> scores bf16[N, capacity], out i32[N, min(k, capacity)]. Plain keys
    have no scale.
    """

    q: cute.Pointer
    keys: cute.Pointer
    keys_scale: cute.Pointer | None
    weights: cute.Pointer
    frequencies: cute.Pointer
    positions: cute.Pointer
    slots: cute.Pointer
    scores: cute.Pointer
    out: cute.Pointer


class Place(NamedTuple):
    """A thread's token, its slot and visible keys; the CTA's rank among those that share it."""

    token: Int32
    slot: Int32
    visible: Int32
    rank: Int32


@cute.jit
def enter(x: Constexpr[Choice], m: Operands, s: Int32) -> Place:
    """Find the token, turn its pairs, open what the first CTA counts in, and have keys on their way to L2.
    Positions and slots are older than the predecessor: before the wait. All threads.
    """
    tid, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    lane, warp = cute.arch.lane_idx(), cute.arch.make_warp_uniform(cute.arch.warp_idx())
    token, rank = block // x.ctas, block % x.ctas
    position = ptx.ldg_early32(m.positions.toint() + token * 4).bitcast(Int32)
    slot = ptx.ldg_early32(m.slots.toint() + token * 4).bitcast(Int32)
    frequency = ptx.ldg_f32_constant(m.frequencies.toint() + lane * 4)
    visible = cutlass.min((position + 1) // x.index.ratio, Int32(x.index.capacity))
    if visible > x.best.k:
        prefetch_keys(x, m, slot, rank * x.index.keys + warp * (x.index.tiles * 16), visible, lane)
    index.prepare_turns(s + x.index.o_turns + warp * 256, frequency, position, lane)
    topk.clear(x.best, s + x.o_counts, tid)
    ptx.open_barrier(s + x.o_bar, tid)
    if tid == 0:
        ptx.mbarrier_expect(s + x.o_bar, (visible + 3) // 4 * 16)
    cute.arch.sync_warp()
    cluster.arrive()
    return Place(token, slot, visible, rank)


@cute.jit
def prefetch_keys(x: Constexpr[Choice], m: Operands, slot: Int32, first: Int32, visible: Int32, lane: Int32):
    """The lines of 128 bytes of the warp's first keys to L2. A prefetch reads nothing: the step's own key may
    be written meanwhile.
    """
    plain = const_expr(m.keys_scale is None)
    nbytes = 256 if const_expr(plain) else 64
    at = Int64(slot) * x.index.capacity + first
    for n in range_constexpr(-(-x.index.tiles * 16 * nbytes // (32 * 128))):
        key = (lane + 32 * n) * 128 // nbytes
        line = lane % 2 * 128 if const_expr(plain) else 0
        if key < x.index.tiles * 16 and first + key < visible:
            ptx.prefetch_l2(m.keys.toint() + (at + key) * nbytes + line)
    if const_expr(plain):
        return
    if lane < x.index.tiles and first + lane * 16 < visible:
        ptx.prefetch_l2(m.keys_scale.toint() + (at + lane * 16) * 4)


@cute.jit
def choose(x: Constexpr[Choice], m: Operands, s: Int32, at: Place) -> None:
    """Score the visible keys and choose the best; while there are no more than k, all of them."""
    tid, _, _ = cute.arch.thread_idx()
    g_out = m.out.toint() + Int64(at.token) * (x.best.out * 4)
    if at.visible > x.best.k:
        score_and_send(x, m, s, at)
        if at.rank == 0:
            ptx.mbarrier_wait(s + x.o_bar, Int32(0))
            s_counts = s + x.o_counts
            key, first = topk.load_shared(x.best, s + x.o_scores, at.visible, tid)
            prefix, need = topk.threshold(x.best, s_counts, key, tid)
            topk.place(x.best, s_counts, key, first, prefix, need, g_out, Int32(0), tid)
    else:
        cluster.meet()
        if at.rank == 0:
            topk.identity(x.best, g_out, at.visible, tid)


@cute.jit
def score_and_send(x: Constexpr[Choice], m: Operands, s: Int32, at: Place) -> None:
    """The CTA's keys: its first ones, and those a cluster further on."""
    i = x.index
    lane, warp = cute.arch.lane_idx(), cute.arch.make_warp_uniform(cute.arch.warp_idx())
    g_data = m.keys.toint()
    g_scale = Int64(0) if const_expr(m.keys_scale is None) else m.keys_scale.toint()
    keys = cute.make_rmem_tensor((i.tiles, 2, i.words), Uint32)
    keys.fill(0)
    own = warp * (i.tiles * 16)
    begin = at.rank * i.keys
    index.load_keys(i, keys, g_data, g_scale, at.slot, begin + own, lane)
    weights = index.load_weights(i, m.weights.toint(), i.factor, at.token, lane)
    index.prepare_queries(i, s, s + i.o_turns + warp * 256, m.q.toint(), at.token, warp, lane)
    cute.arch.sync_threads()
    cluster.meet()
    for key in cutlass.range(begin, at.visible, x.ctas * i.keys, unroll=1):
        a = index.fragments(i, keys)
        index.load_keys(i, keys, g_data, g_scale, at.slot, key + x.ctas * i.keys + own, lane)
        total = index.score(i, s, a, weights, lane)
        index.store_scores(i, total, m.scores.toint(), at.token, key + own, at.visible, lane)
        send_scores(x, s, total, key + own, at.visible, warp, lane)


@cute.jit
def send_scores(
    x: Constexpr[Choice], s: Int32, total: cute.Tensor, first: Int32, visible: Int32, warp: Int32, lane: Int32
) -> None:
    """The warp's scores to their places in the first CTA, four at a time while one of them is visible."""
    s_sent = s + x.o_sent + warp * (x.index.tiles * 64)
    for m in range_constexpr(x.index.tiles):
        value = total[m, 0]
        if lane % 4 == 1:
            value = total[m, 1]
        if lane % 4 < 2:
            ptx.sts_f32(s_sent + (16 * m + lane % 4 * 8 + lane // 4) * 4, value)
    cute.arch.sync_warp()
    four = cutlass.min(lane, Int32(x.index.tiles * 4 - 1))
    w = ptx.lds128(s_sent + four * 16)
    there = (lane < x.index.tiles * 4) & (first + lane * 4 < visible)
    s_there = s + x.o_scores + (first + four * 4) * 4
    cluster.send_128(s_there, s + x.o_bar, Int32(0), w[0], w[1], w[2], w[3], there)
    cute.arch.sync_warp()
