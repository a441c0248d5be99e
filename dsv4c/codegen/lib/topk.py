"""Exact top-k over a cluster: digits of order-preserving keys find the k-th largest, a scan places.

Every thread holds a run of neighboring scores in registers. For each digit the CTAs count into histograms of
their own, and every CTA adds the cluster's up. Equal scores at the threshold are taken from the lowest index
on; the result ascends.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, Uint32, const_expr, range_constexpr

from dsv4c.codegen.lib import ptx
from dsv4c.codegen.lib.geometry import Selection

_asm = cute.arch.inline_ptx


@cute.jit
def _count(s: Int32):
    """Add one to a word of shared memory."""
    _asm("red.shared.add.u32 [{$r0}], 1;", read_only_args=[s])


@cute.jit
def _ordered(bits: Uint32):
    """A float's bits as an unsigned number of the same order (-0 below +0)."""
    flip = (bits.bitcast(Int32) >> Int32(31)).bitcast(Uint32) | Uint32(0x80000000)
    return bits ^ flip


@cute.jit
def _warp_scan(r: Int32):
    """Inclusive sum over the lanes up to this one."""
    for i in range_constexpr(5):
        r = _asm(
            "{ .reg .pred p; .reg .b32 t; shfl.sync.up.b32 t|p, {$r0}, {$r1}, 0, -1; mov.b32 {$w0}, {$r0}; "
            "@p add.s32 {$w0}, t, {$r0}; }",
            write_only_types=[Int32],
            read_only_args=[r, Int32(1 << i)],
        )
    return r


@cute.jit
def _block_scan(t: Constexpr[Selection], s: Int32, r: Int32, tid: Int32):
    """Exclusive sum over the threads before this one, and the CTA's total. Two barriers; `s` is 128 bytes."""
    lane = tid % 32
    inclusive = _warp_scan(r)
    cute.arch.sync_threads()
    if lane == 31:
        ptx.sts32(s + tid // 32 * 4, inclusive.bitcast(Uint32))
    cute.arch.sync_threads()
    of_warp = Int32(0)
    if lane < t.threads // 32:
        of_warp = ptx.lds32(s + lane * 4).bitcast(Int32)
    warps = _warp_scan(of_warp)
    total = cute.arch.shuffle_sync(warps, 31)
    before = cute.arch.shuffle_sync(warps - of_warp, tid // 32)
    return before + inclusive - r, total


@cute.jit
def _meet(t: Constexpr[Selection]):
    """Everybody in the cluster has come here, and what they wrote to shared memory is visible."""
    if const_expr(t.splits == 1):
        cute.arch.sync_threads()
    else:
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()


@cute.jit
def _of_rank(t: Constexpr[Selection], s: Int32, rank: Int32):
    """The word at shared address `s` of CTA `rank`."""
    if const_expr(t.splits == 1):
        return ptx.lds32(s)
    return ptx.load_remote_f32(s, rank).bitcast(Uint32)


@cute.jit
def clear(t: Constexpr[Selection], sm: Int32, tid: Int32):
    """Zero the histograms."""
    words = (t.o_sums - 256) // 4
    for n in range_constexpr(-(-words // t.threads)):
        i = tid + n * t.threads
        if i < words:
            ptx.sts32(sm + 256 + i * 4, Uint32(0))


@cute.jit
def identity(t: Constexpr[Selection], g_out: Int64, visible: Int32, tid: Int32):
    """All visible numbers, then -1."""
    for n in range_constexpr(-(-t.out // t.threads)):
        i = tid + n * t.threads
        if i < t.out:
            value = i if i < visible else Int32(-1)
            ptx.stg32(g_out + i * 4, value.bitcast(Uint32))


@cute.jit
def load(t: Constexpr[Selection], g_scores: Int64, visible: Int32, thread: Int32):
    """The thread's run: keys [4 * quads] (0 where there is no score), the run's first index."""
    key = cute.make_rmem_tensor((t.quads * 4,), Uint32)
    key.fill(0)
    run = ((visible + 3) // 4 + t.threads * t.splits - 1) // (t.threads * t.splits)
    first = thread * run * 4
    for n in range_constexpr(t.quads):
        if n < run and first + 4 * n < visible:
            words = _load_four(t, g_scores + (first + 4 * n) * (t.bits // 8), visible - (first + 4 * n))
            for i in range_constexpr(4):
                if first + 4 * n + i < visible:
                    key[4 * n + i] = _ordered(words[i])
    return key, first


@cute.jit
def _load_four(t: Constexpr[Selection], g: Int64, count: Int32):
    """Up to four scores, the first `count` of a row's rest, as bits of f32."""
    words = cute.make_rmem_tensor((4,), Uint32)
    words.fill(0)
    if const_expr(t.bits == 16 and t.capacity % 4 == 0):
        pairs = ptx.ldg64(g)
        for i in range_constexpr(4):
            words[i] = (
                pairs[i // 2] & Uint32(0xFFFF0000) if const_expr(i % 2) else pairs[i // 2] << Uint32(16)
            )
    elif const_expr(t.capacity % 4 == 0):
        four = ptx.ldg128(g)
        for i in range_constexpr(4):
            words[i] = four[i]
    else:  # rows are not aligned
        for i in range_constexpr(4):
            if i < count:
                if const_expr(t.bits == 16):
                    words[i] = ptx.ldg_u16(g + i * 2) << Uint32(16)
                else:
                    words[i] = ptx.ldg32(g + i * 4)
    return words


@cute.jit
def load_shared(t: Constexpr[Selection], s_scores: Int32, visible: Int32, thread: Int32):
    """The same of scores in shared memory, which has room for whole groups of four."""
    key = cute.make_rmem_tensor((t.quads * 4,), Uint32)
    key.fill(0)
    run = ((visible + 3) // 4 + t.threads - 1) // t.threads
    first = thread * run * 4
    for n in range_constexpr(t.quads):
        if n < run and first + 4 * n < visible:
            words = ptx.lds128(s_scores + (first + 4 * n) * 4)
            for i in range_constexpr(4):
                if first + 4 * n + i < visible:
                    key[4 * n + i] = _ordered(words[i])
    return key, first


@cute.jit
def threshold(t: Constexpr[Selection], sm: Int32, key: cute.Tensor, tid: Int32):
    """(the k-th largest key's leading digits, how many of that key's equals belong to the k largest)."""
    prefix, need = Uint32(0), Int32(t.k)
    for step in range_constexpr(len(t.passes)):
        shift, width = t.passes[step]
        s_counts = sm + t.o_histogram(step)
        for n in range_constexpr(t.quads * 4):
            if key[n] != Uint32(0):
                if const_expr(step == 0):
                    _count(s_counts + ((key[n] >> Uint32(shift)) * Uint32(4)).bitcast(Int32))
                elif (key[n] >> Uint32(shift + width)) == prefix:
                    digit = (key[n] >> Uint32(shift)) & Uint32((1 << width) - 1)
                    _count(s_counts + (digit * Uint32(4)).bitcast(Int32))
        _meet(t)
        digit, need = _choose(t, sm, _add_up(t, sm, s_counts, width, tid), width, need, tid)
        prefix = (prefix << Uint32(width)) | digit.bitcast(Uint32)
    return prefix, need


@cute.jit
def _add_up(t: Constexpr[Selection], sm: Int32, s_counts: Int32, width: Constexpr[int], tid: Int32):
    """Address of the cluster's counts: every CTA adds up its share of digits and sends it to all."""
    if const_expr(t.splits == 1):
        return s_counts
    share = (1 << width) // t.splits
    rank = cute.arch.block_idx_in_cluster()
    for n in range_constexpr(-(-share // t.threads)):
        i = tid + n * t.threads
        if i < share:
            at = (rank * share + i) * 4
            counts = [_of_rank(t, s_counts + at, Int32(other)).bitcast(Int32) for other in range(t.splits)]
            total = counts[0]
            for other in range_constexpr(1, t.splits):
                total = total + counts[other]
            for other in range_constexpr(t.splits):
                ptx.store_remote_f32(sm + t.o_sums + at, Int32(other), total.bitcast(Float32))
    _meet(t)
    return sm + t.o_sums


@cute.jit
def _choose(
    t: Constexpr[Selection], sm: Int32, s_counts: Int32, width: Constexpr[int], need: Int32, tid: Int32
):
    """The digit where the counts from the top reach `need`, and what is left to take inside it."""
    per_thread = -(-(1 << width) // t.threads)
    top = Int32((1 << width) - 1) - tid * per_thread
    counts = cute.make_rmem_tensor((per_thread,), Int32)
    counts.fill(0)
    total = Int32(0)
    for i in range_constexpr(per_thread):
        if top - i >= 0:
            counts[i] = ptx.lds32(s_counts + (top - i) * 4).bitcast(Int32)
        total = total + counts[i]
    before, _all = _block_scan(t, sm, total, tid)
    for i in range_constexpr(per_thread):
        if before < need and need <= before + counts[i]:
            ptx.sts64(sm + 128, (top - i).bitcast(Uint32), (need - before).bitcast(Uint32))
        before = before + counts[i]
    cute.arch.sync_threads()
    chosen = ptx.lds64(sm + 128)
    return chosen[0].bitcast(Int32), chosen[1].bitcast(Int32)


@cute.jit
def place(
    t: Constexpr[Selection],
    sm: Int32,
    key: cute.Tensor,
    first: Int32,
    prefix: Uint32,
    need: Int32,
    g_out: Int64,
    rank: Int32,
    tid: Int32,
):
    """Write the chosen indices, ascending."""
    drop = Uint32(32 - t.bits)
    above, equal = Int32(0), Int32(0)
    for n in range_constexpr(t.quads * 4):
        digits = key[n] >> drop
        if digits > prefix:
            above = above + 1
        if digits == prefix:
            equal = equal + 1
    before, total = _block_scan(t, sm, above + (equal << Int32(16)), tid)
    above, equal = before & Int32(0xFFFF), before >> Int32(16)
    if const_expr(t.splits > 1):
        if tid == 0:
            ptx.sts32(sm + 136, total.bitcast(Uint32))
        _meet(t)
        for i in range_constexpr(t.splits - 1):
            of_rank = _of_rank(t, sm + 136, Int32(i)).bitcast(Int32)
            if i < rank:
                above = above + (of_rank & Int32(0xFFFF))
                equal = equal + (of_rank >> Int32(16))
        _meet(t)  # nobody leaves while others read its total
    for n in range_constexpr(t.quads * 4):
        digits = key[n] >> drop
        if digits > prefix or (digits == prefix and equal < need):
            ptx.stg32(g_out + (above + cutlass.min(equal, need)) * 4, (first + n).bitcast(Uint32))
        if digits > prefix:
            above = above + 1
        if digits == prefix:
            equal = equal + 1


@cute.jit
def select(
    t: Constexpr[Selection], sm: Int32, g_scores: Int64, g_out: Int64, visible: Int32, rank: Int32, tid: Int32
):
    """The `k` best of `visible` > k scores, by all threads of `t.splits` CTAs."""
    key, first = load(t, g_scores, visible, rank * t.threads + tid)
    prefix, need = threshold(t, sm, key, tid)
    place(t, sm, key, first, prefix, need, g_out, rank, tid)


class Operands(NamedTuple):
    """scores [N, capacity] of as many bits as decide, positions i32[N] -> out i32[N, min(k, capacity)]."""

    scores: cute.Pointer
    positions: cute.Pointer
    out: cute.Pointer


@cute.jit
def open_counts(t: Constexpr[Selection], s: Int32) -> None:
    """Zero what is counted in. All threads."""
    tid, _, _ = cute.arch.thread_idx()
    clear(t, s, tid)
    cute.arch.sync_threads()


@cute.jit
def choose(t: Constexpr[Selection], m: Operands, s: Int32) -> None:
    """A row's best by a cluster, by one of its CTAs where there are few; all while at most k are visible."""
    tid, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    rank, row = block % t.splits, block // t.splits
    position = ptx.ldg32(m.positions.toint() + row * 4).bitcast(Int32)
    visible = cutlass.min((position + 1) // t.ratio, Int32(t.capacity))
    g_out = m.out.toint() + Int64(row) * (t.out * 4)
    g_scores = m.scores.toint() + Int64(row) * (t.capacity * (t.bits // 8))
    if const_expr(t.splits > 1):
        if visible > t.alone.capacity:
            select(t, s, g_scores, g_out, visible, rank, tid)
        elif visible > t.k:
            if rank == 0:
                select(t.alone, s, g_scores, g_out, visible, rank, tid)
        elif rank == 0:
            identity(t, g_out, visible, tid)
    else:
        if visible > t.k:
            select(t, s, g_scores, g_out, visible, rank, tid)
        elif rank == 0:
            identity(t, g_out, visible, tid)
