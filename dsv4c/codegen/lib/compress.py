"""The KV compressor's step for one token: remember its row; at a window's end make its entry. For chunks of
many tokens the two are launches of their own, the entries first, which read what the rows then overwrite.

Pooling is a softmax over tokens, per channel, in one pass with a running maximum. The launch's own tokens are
taken from the projections themselves, so nothing waits for the ring, which other CTAs are writing. What they
write, nobody reads: with `pooled + tokens - 1` rows in a ring, the new rows of a sequence fall on none that
the oldest of them pools. Tokens before position 0 are never read.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, const_expr, range_constexpr

from dsv4c.codegen.lib import cache, ptx, softmax
from dsv4c.codegen.lib.geometry import Pool


class Operands(NamedTuple):
    """u and s f32[N, channels], ape f32[ratio, channels], gain bf16[width], frequencies f32[32], positions
    and slots i32[N]; kv and score f32[S, ring, channels] -> entries [S, capacity, width], the components of
    their format. Who writes the rings alone has neither gain nor frequencies nor entries.
    """

    u: cute.Pointer
    s: cute.Pointer
    ape: cute.Pointer
    positions: cute.Pointer
    slots: cute.Pointer
    kv: cute.Pointer
    score: cute.Pointer
    gain: cute.Pointer | None = None
    frequencies: cute.Pointer | None = None
    entries: tuple[cute.Pointer, ...] = ()


@cute.jit
def compress(pool: Constexpr[Pool], m: Operands, s: Int32, token: Int32, tid: Int32) -> None:
    """`pool.threads` threads: row `token` of u and s.

    `pool.shared` bytes of shared memory. Position -1 writes nothing.
    """
    constants = cache.prefetch(pool.row, m.gain.toint(), m.frequencies.toint(), tid)
    ptx.wait()
    position = ptx.ldg32(m.positions.toint() + token * 4).bitcast(Int32)
    slot = ptx.ldg32(m.slots.toint() + token * 4).to(Int64)
    g_ape, g_kv, g_score = m.ape.toint(), m.kv.toint(), m.score.toint()
    if position >= 0:
        at = Int64(token) * (pool.channels * 4)
        g_u_row, g_s_row = m.u.toint() + at, m.s.toint() + at
        g_ape_row = g_ape + position % pool.ratio * (pool.channels * 4)
        ring = slot * pool.ring
        remember(pool, g_u_row, g_s_row, g_ape_row, g_kv, g_score, ring + position % pool.ring, tid)
        if (position + 1) % pool.ratio == 0:
            before = token % pool.tokens  # rows of the sequence ahead of this one
            rows = (g_u_row, g_s_row, g_ape, g_kv, g_score)
            make_entry(pool, s, rows, cache.addresses(m.entries), constants, slot, position, before, tid)


@cute.jit
def make_entry(
    pool: Constexpr[Pool],
    s: Int32,
    rows: tuple[Int64, Int64, Int64, Int64, Int64],
    entries: tuple[Int64, Int64, Int64],
    constants: cute.Tensor,
    slot: Int64,
    position: Int32,
    before: Int32,
    tid: Int32,
):
    """The entry that token `position` completes, to its place. `rows` are the addresses of the token's u and
    s, of ape and of the rings; `entries` those of the cache's components.
    """
    row, entry = pool.row, position // pool.ratio
    total = pool_group(pool, *rows, slot * pool.ring, position, before, tid)
    r = combine(pool, s + 128, total, tid)
    cache.normalize(row, s, r, constants, pool.eps, tid, pool.threads)
    cache.rotate(row, r, constants, entry * pool.ratio, tid)
    cache.store(row, r, *entries, slot * pool.capacity + entry, tid)


@cute.jit
def compress_entries(pool: Constexpr[Pool], m: Operands, s: Int32, block: Int32, tid: Int32) -> None:
    """`compress` for chunks of many tokens, its first half: CTA `block` makes one of the entries that a
    sequence completes. Tokens before the chunk are read from rings that nobody writes meanwhile.
    """
    constants = cache.prefetch(pool.row, m.gain.toint(), m.frequencies.toint(), tid)
    ptx.wait()
    sequence, number = block // pool.most_entries, block % pool.most_entries
    begins = Int64(sequence) * pool.tokens  # the sequence's first row
    g_positions = m.positions.toint() + begins * 4
    count = cache.tokens_of(g_positions, pool.tokens, tid % 32)
    first = ptx.ldg32(g_positions).bitcast(Int32)
    before = (first // pool.ratio + number + 1) * pool.ratio - 1 - first
    if before < count:
        slot = ptx.ldg32(m.slots.toint() + begins * 4).to(Int64)
        at = (begins + before) * (pool.channels * 4)
        rows = (m.u.toint() + at, m.s.toint() + at, m.ape.toint(), m.kv.toint(), m.score.toint())
        entries = cache.addresses(m.entries)
        make_entry(pool, s, rows, entries, constants, slot, first + before, before, tid)


@cute.jit
def compress_rings(pool: Constexpr[Pool], m: Operands, s: Int32, block: Int32, tid: Int32) -> None:
    """The second half: CTA `block` writes one of the last tokens of a sequence to its place in the rings."""
    ptx.wait()
    sequence, back = block // pool.most_kept, block % pool.most_kept
    begins = Int64(sequence) * pool.tokens
    g_positions = m.positions.toint()
    count = cache.tokens_of(g_positions + begins * 4, pool.tokens, tid % 32)
    if back < count:
        row = begins + count - 1 - back
        position = ptx.ldg32(g_positions + row * 4).bitcast(Int32)
        place = ptx.ldg32(m.slots.toint() + row * 4).to(Int64) * pool.ring + position % pool.ring
        at = row * (pool.channels * 4)
        g_bias = m.ape.toint() + position % pool.ratio * (pool.channels * 4)
        g_u, g_s = m.u.toint() + at, m.s.toint() + at
        remember(pool, g_u, g_s, g_bias, m.kv.toint(), m.score.toint(), place, tid)


@cute.jit
def remember(
    pool: Constexpr[Pool],
    g_u: Int64,
    g_s: Int64,
    g_ape: Int64,
    g_kv: Int64,
    g_score: Int64,
    place: Int64,
    tid: Int32,
):
    """Write u and s + ape of the current token to row `place` of the rings."""
    for n in range_constexpr(-(-pool.channels // (4 * pool.threads))):
        channel = (tid + n * pool.threads) * 4
        if channel < pool.channels:
            u = ptx.ldg128(g_u + channel * 4)
            r = add_bias(ptx.ldg128(g_s + channel * 4), g_ape + channel * 4)
            at = (place * pool.channels + channel) * 4
            ptx.stg128(g_kv + at, u[0], u[1], u[2], u[3])
            ptx.stg128(g_score + at, *[r[i].bitcast(cutlass.Uint32) for i in range(4)])


@cute.jit
def add_bias(s: tuple, g_ape: Int64):
    """Four score words plus the position bias (a constant), as floats."""
    bias = ptx.ldg128_constant(g_ape)
    r = cute.make_rmem_tensor((4,), Float32)
    for i in range_constexpr(4):
        r[i] = s[i].bitcast(Float32) + bias[i].bitcast(Float32)
    return r


@cute.jit
def pool_group(
    pool: Constexpr[Pool],
    g_u: Int64,
    g_s: Int64,
    g_ape: Int64,
    g_kv: Int64,
    g_score: Int64,
    ring: Int64,
    position: Int32,
    before: Int32,
    tid: Int32,
):
    """The group's run of tokens, for the thread's four channels: [maximum, weight, weighted sum][4].

    Rows of u and s are the current token's and, up to `before` rows earlier, those of the tokens before it.
    """
    group = tid // pool.row.lanes
    channel = tid % pool.row.lanes * 4
    first = position + 1 - pool.pooled
    total = cute.make_rmem_tensor((3, 4), Float32)
    total.fill(0.0)
    for i in range_constexpr(4):
        total[0, i] = -Float32.inf
    score = cute.make_rmem_tensor((pool.chunk, 4), Float32)
    value = cute.make_rmem_tensor((pool.chunk, 4), Float32)
    for step in cutlass.range(-(-pool.run // pool.chunk), unroll=1):
        score.fill(-Float32.inf)
        value.fill(0.0)
        for n in range_constexpr(pool.chunk):
            i = step * pool.chunk + n
            j = group * pool.run + i
            token = first + j
            if token >= 0 and i < pool.run and j < pool.pooled:
                at = Int32(channel)
                if j >= pool.ratio:  # with overlap: the current window, the second half of the channels
                    at = at + pool.row.width
                place = ((ring + token % pool.ring) * pool.channels + at) * 4
                fresh, back = token == position, Int32(0)
                if const_expr(pool.tokens > 1):
                    fresh, back = token + before >= position, position - token
                if fresh:
                    g_bias = g_ape + (position - back) % pool.ratio * (pool.channels * 4)
                    row = back * (pool.channels * 4)
                    now = add_bias(ptx.ldg128(g_s - row + at * 4), g_bias + at * 4)
                    u = ptx.ldg128(g_u - row + at * 4)
                    for c in range_constexpr(4):
                        score[n, c] = now[c]
                        value[n, c] = u[c].bitcast(Float32)
                else:
                    then = ptx.ldg128(g_score + place)
                    u = ptx.ldg128(g_kv + place)
                    for c in range_constexpr(4):
                        score[n, c] = then[c].bitcast(Float32)
                        value[n, c] = u[c].bitcast(Float32)
        _accumulate(pool, total, score, value)
    return total


@cute.jit
def _accumulate(pool: Constexpr[Pool], total: cute.Tensor, score: cute.Tensor, value: cute.Tensor):
    for c in range_constexpr(4):
        maximum = total[0, c]
        for n in range_constexpr(pool.chunk):
            score[n, c] = score[n, c] * Float32(softmax.LOG2_E)
            maximum = cute.arch.fmax(maximum, score[n, c])
        old = softmax.weight(total[0, c], maximum)
        total[0, c] = maximum
        total[1, c] = total[1, c] * old
        total[2, c] = total[2, c] * old
        for n in range_constexpr(pool.chunk):
            p = softmax.weight(score[n, c], maximum)
            total[1, c] = total[1, c] + p
            total[2, c] = total[2, c] + p * value[n, c]


@cute.jit
def combine(pool: Constexpr[Pool], s: Int32, total: cute.Tensor, tid: Int32):
    """The groups' results merged and divided, rounded to bf16; zeros beyond the first group. One barrier."""
    lanes = pool.row.lanes
    group = tid // lanes
    lane = tid % lanes
    if group < pool.groups:
        for i in range_constexpr(3):
            words = [total[i, c].bitcast(cutlass.Uint32) for c in range(4)]
            ptx.sts128(s + ((group * 3 + i) * lanes + lane) * 16, *words)
    ptx.sync_threads(pool.threads)
    r = cute.make_rmem_tensor((4,), Float32)
    r.fill(0.0)
    if group == 0:
        merged = cute.make_rmem_tensor((3, 4), Float32)
        merged.fill(0.0)
        for c in range_constexpr(4):
            merged[0, c] = -Float32.inf
        for n in range_constexpr(pool.groups):
            part = [ptx.lds128(s + ((n * 3 + i) * lanes + lane) * 16) for i in range(3)]
            for c in range_constexpr(4):
                m = part[0][c].bitcast(Float32)
                maximum = cute.arch.fmax(merged[0, c], m)
                old, new = softmax.weight(merged[0, c], maximum), softmax.weight(m, maximum)
                merged[0, c] = maximum
                for i in range_constexpr(1, 3):
                    merged[i, c] = merged[i, c] * old + part[i][c].bitcast(Float32) * new
        for c in range_constexpr(4):
            r[c] = ptx.round_bf16(ptx.divide(merged[2, c], merged[1, c]))
    return r
