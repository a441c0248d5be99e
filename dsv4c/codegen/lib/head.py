"""The largest logit's column, by a thread, a warp, a CTA, a cluster.

A candidate of the argmax is one 64-bit key in two words: (order of the logit, complement of its column), so
that the largest key is the largest logit, and the lowest column among equals.
"""

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, Uint32, const_expr, range_constexpr

from dsv4c.codegen.lib import cluster, ptx
from dsv4c.codegen.lib.slices import Largest


@cute.jit
def logit_order(r: Float32):
    """An unsigned integer that orders like the float, with -0 equal to +0."""
    b = (r + Float32(0.0)).bitcast(Uint32)
    flip = Uint32(0x80000000)
    if b >= Uint32(0x80000000):
        flip = Uint32(0xFFFFFFFF)
    return b ^ flip


@cute.jit
def larger(high: Uint32, low: Uint32, other_high: Uint32, other_low: Uint32):
    """The larger of two keys."""
    if other_high > high or (other_high == high and other_low > low):
        high = other_high
        low = other_low
    return high, low


@cute.jit
def column_max(
    g_row: Int64,
    first: Int32,
    count: Int32,
    vector: Constexpr[int],
    steps: Constexpr[int],
    thread: Int32,
    threads: Constexpr[int],
):
    """The thread's best key among columns first .. first + count of a row, `vector` (4 or 1) at a time."""
    high = Uint32(0)
    low = Uint32(0)
    for n in range_constexpr(steps):
        i = (thread + n * threads) * vector
        if i < count:
            column = first + i
            if const_expr(vector == 4):
                w = ptx.ldg128(g_row + column * 4)
                for j in range_constexpr(4):
                    high, low = larger(high, low, logit_order(w[j].bitcast(Float32)), ~Uint32(column + j))
            else:
                high, low = larger(high, low, logit_order(ptx.ldg_f32(g_row + column * 4)), ~Uint32(column))
    return high, low


@cute.jit
def biased_max(
    g_base: Int64,
    g_bias: Int64,
    g_sums: Int64,
    stored: Constexpr[bool],
    first: Int32,
    count: Int32,
    vector: Constexpr[int],
    steps: Constexpr[int],
    thread: Int32,
    threads: Constexpr[int],
):
    """`column_max` of the sums of two rows, which go to a third one if they are `stored`."""
    r = cute.make_rmem_tensor((steps, 2, vector), Float32)
    for n in range_constexpr(steps):  # all on their way before one is used
        at = (thread + n * threads) * vector
        if at < count:
            for i, g in enumerate((g_base, g_bias)):
                if const_expr(vector == 4):
                    w = ptx.ldg128(g + (first + at) * 4)
                    for j in range_constexpr(4):
                        r[n, i, j] = w[j].bitcast(Float32)
                else:
                    r[n, i, 0] = ptx.ldg_f32(g + (first + at) * 4)
    high = Uint32(0)
    low = Uint32(0)
    for n in range_constexpr(steps):
        at = (thread + n * threads) * vector
        if at < count:
            sums = [r[n, 0, j] + r[n, 1, j] for j in range(vector)]
            for j in range_constexpr(vector):
                high, low = larger(high, low, logit_order(sums[j]), ~Uint32(first + at + j))
                if const_expr(stored):
                    ptx.stg_f32(g_sums + (first + at + j) * 4, sums[j])
    return high, low


@cute.jit
def warp_max(high: Uint32, low: Uint32):
    """The warp's best key, in every lane."""
    for i in range_constexpr(5):
        other_high = cute.arch.shuffle_sync_bfly(high, offset=1 << i)
        other_low = cute.arch.shuffle_sync_bfly(low, offset=1 << i)
        high, low = larger(high, low, other_high, other_low)
    return high, low


@cute.jit
def block_max(sm: Int32, high: Uint32, low: Uint32, warps: Constexpr[int], warp: Int32, lane: Int32):
    """The CTA's best key in every lane of warp 0; scratch of 8 bytes per warp. All threads."""
    high, low = warp_max(high, low)
    if lane == 0:
        ptx.sts64(sm + warp * 8, high, low)
    cute.arch.sync_threads()
    high = Uint32(0)
    low = Uint32(0)
    if lane < warps:
        high, low = ptx.lds64(sm + lane * 8)
    return warp_max(high, low)


@cute.jit
def cluster_max(
    s_inbox: Int32, s_bar: Int32, high: Uint32, low: Uint32, ranks: Constexpr[int], rank: Int32, lane: Int32
):
    """The cluster's best key, in every lane of CTA 0's calling warp; other CTAs get their own back."""
    for i, word in enumerate((high, low)):
        cluster.send_f32(s_inbox + rank * 8 + 4 * i, s_bar, Int32(0), word.bitcast(Float32), lane == 0)
    if rank == 0:
        ptx.mbarrier_wait(s_bar, Int32(0))
        high = Uint32(0)
        low = Uint32(0)
        if lane < ranks:
            high, low = ptx.lds64(s_inbox + lane * 8)
        high, low = warp_max(high, low)
    return high, low


class Place(NamedTuple):
    """Where a thread looks: among columns `first` and on, of a row."""

    row: Int32
    rank: Int32
    first: Int32
    thread: Int32
    warp: Int32
    lane: Int32


@cute.jit
def enter(c: Constexpr[Largest], s: Int32) -> Place:
    """Open the inbox of the cluster's keys, and say so. All threads."""
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    warp, lane = cute.arch.make_warp_uniform(cute.arch.warp_idx()), cute.arch.lane_idx()
    row, rank = block // c.ctas, cute.arch.block_idx_in_cluster()
    cluster.open_inbox(s + c.o_bar, c.ctas * 8, thread)
    cluster.arrive()
    return Place(row, rank, rank * c.width, thread, warp, lane)
