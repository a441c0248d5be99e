"""A token by its row of logits, over a cluster: bounds by digits of keys, sums in whole numbers.

Every thread holds a run of neighboring columns in registers. A column weighs exp((x - top) / temperature),
which is at most 1, in whole 2^-38: sums are exact, whoever adds them up and in which order. A bound is the
largest key that enough of the row's keys reach; for each of its digits the CTAs fill histograms of their own,
and every CTA adds up its share of the cluster's digits for all.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Constexpr, Float32, Float64, Int32, Int64, Uint32, range_constexpr

from dsv4c.codegen.lib import ptx, scan
from dsv4c.codegen.lib.geometry import Spread

TEMPERATURE, TOP_K, TOP_P, MIN_P, REPETITION, PRESENCE, FREQUENCY = range(7)  # columns of the knobs
HALF = 19  # bits of a weight's lower part: 2^13 of either part add up in 32 bits
ONE = 2 * HALF  # a weight of 1 is 2^38
LOG2_E = 1.4426950408889634
EXP2 = tuple(0.6931471805599453**i / n for i, n in enumerate((1, 1, 2, 6, 24, 120, 720, 5040)))

_asm = cute.arch.inline_ptx


# What decides -----------------------------------------------------------------------------------------------


@cute.jit
def order(x: Float32):
    """An integer that orders numbers as they are: zeros are equal, NaN is above all."""
    bits = x.bitcast(Int32)
    magnitude = bits & Int32(0x7FFFFFFF)
    key = -magnitude if bits < 0 else magnitude
    return Int32(0x7FFFFFFF) if x != x else key


@cute.jit
def unordered(key: Int32):
    """The number that has a key."""
    bits = (-key) | Int32(-0x80000000) if key < 0 else key
    return bits.bitcast(Float32)


@cute.jit
def off_unless_finite(knob: Float32):
    """A knob, 0 where it is no finite number."""
    return knob if knob - knob == Float32(0.0) else Float32(0.0)


@cute.jit
def lowered(
    x: Float32, said: Int32, times: Int32, repetition: Float32, presence: Float32, frequency: Float32
):
    """A logit after the penalties of a token that was `said` (or 0), so many `times` since the origin."""
    if repetition > Float32(0.0) and said != 0:
        x = ptx.divide(x, repetition) if x > Float32(0.0) else ptx.multiply(x, repetition)
    once = presence if times > 0 else Float32(0.0)
    return ptx.plus(x, -ptx.plus(once, ptx.multiply(frequency, times.to(Float32))))


@cute.jit
def philox(low: Uint32, high: Uint32, index: Int32):
    """The first word of Philox 4x32-10 at (index, 0, 0, 0) under the key (low, high)."""
    a, b, c, d = index.bitcast(Uint32), Uint32(0), Uint32(0), Uint32(0)
    for _ in range_constexpr(10):
        one, two = a * Uint32(0xD2511F53), c * Uint32(0xCD9E8D57)
        upper_one, upper_two = _upper(a, Uint32(0xD2511F53)), _upper(c, Uint32(0xCD9E8D57))
        a, b, c, d = upper_two ^ b ^ low, two, upper_one ^ d ^ high, one
        low, high = low + Uint32(0x9E3779B9), high + Uint32(0xBB67AE85)
    return a


@cute.jit
def _upper(a: Uint32, b: Uint32):
    """The upper half of a product."""
    return _asm("mul.hi.u32 {$w0}, {$r0}, {$r1};", write_only_types=[Uint32], read_only_args=[a, b])


@cute.jit
def unit(word: Uint32):
    """A number of (0, 1): (word + 1/2) / 2^32."""
    high, low = (word >> Uint32(16)).to(Float32), (word & Uint32(0xFFFF)).to(Float32)
    return (high.to(Float64) * Float64(65536.0) + low.to(Float64) + Float64(0.5)) * Float64(2.0**-32)


@cute.jit
def load_knobs(g_knobs: Int64):
    """A slot's knobs, by column."""
    return tuple(off_unless_finite(ptx.ldg_f32(g_knobs + n * 4)) for n in range(FREQUENCY + 1))


# A row's keys -----------------------------------------------------------------------------------------------


@cute.jit
def clear(t: Constexpr[Spread], sm: Int32, thread: Int32):
    """Zero counts, histograms and all."""
    pieces = t.shared // 16
    for n in range_constexpr(-(-pieces // t.threads)):
        i = thread + n * t.threads
        if i < pieces:
            ptx.sts128(sm + i * 16, Uint32(0), Uint32(0), Uint32(0), Uint32(0))


@cute.jit
def remember(
    g_said: Int64,
    capacity: Constexpr[int],
    g_tokens: Int64,
    g_positions: Int64,
    g_slots: Int64,
    slot: Int32,
    rows: Int32,
    lane: Int32,
):
    """The step's tokens of a slot to their places of its history. Every row of the slot stores all of them,
    for its own cluster; of two rows for one place the later one stays. A warp reads, its first lane stores.
    """
    for first in cutlass.range(0, rows, 32, unroll=1):
        row, place, token = first + lane, Int32(-1), Uint32(0)
        if row < rows:
            position = ptx.ldg32(g_positions + row * 4).bitcast(Int32)
            of_row = ptx.ldg32(g_slots + row * 4).bitcast(Int32)
            token = ptx.ldg32(g_tokens + row * 4)
            if position >= 0 and of_row == slot:
                place = position % capacity
        for i in cutlass.range(cutlass.min(rows - first, Int32(32)), unroll=1):
            at, given = cute.arch.shuffle_sync(place, i), cute.arch.shuffle_sync(token, i)
            if lane == 0 and at >= 0:
                ptx.stg32(g_said + Int64(at) * 4, given)


@cute.jit
def _end(t: Constexpr[Spread], rank: Int32):
    """The first column that is no more the CTA's."""
    return cutlass.min((rank + 1) * t.each, Int32(t.columns))


@cute.jit
def load(t: Constexpr[Spread], g_row: Int64, rank: Int32, thread: Int32):
    """The thread's logits [4 * quads], -inf where it has no column."""
    x = cute.make_rmem_tensor((4 * t.quads,), Float32)
    x.fill(-Float32.inf)
    for n in range_constexpr(t.quads):
        if t.column(rank, thread, n) < _end(t, rank):
            words = ptx.ldg128(g_row + t.column(rank, thread, n) * 4)
            for i in range_constexpr(4):
                x[4 * n + i] = words[i].bitcast(Float32)
    return x


@cute.jit
def count(
    t: Constexpr[Spread], sm: Int32, g_said: Int64, last: Int32, origin: Int32, rank: Int32, thread: Int32
):
    """Counts of the tokens of places 0 to `last`, in the CTA that has their column: 2 from the origin on,
    else the lowest bit.
    """
    for place in cutlass.range(rank * t.threads + thread, last + 1, t.ctas * t.threads):
        token = ptx.ldg32(g_said + Int64(place) * 4)
        if token < Uint32(t.columns):
            owner = token.bitcast(Int32) // t.each
            s = sm + t.o_counts + (token.bitcast(Int32) - owner * t.each) * 4
            if place >= origin:
                ptx.count_remote(s, owner, Uint32(2))
            else:
                ptx.mark_remote(s, owner, Uint32(1))


@cute.jit
def lower(
    t: Constexpr[Spread],
    sm: Int32,
    x: cute.Tensor,
    repetition: Float32,
    presence: Float32,
    frequency: Float32,
    thread: Int32,
):
    """Penalties of what was counted, in place."""
    for n in range_constexpr(t.quads):
        if t.column(0, thread, n) < t.each:
            counts = ptx.lds128(sm + t.o_counts + t.column(0, thread, n) * 4)
            for i in range_constexpr(4):
                said = counts[i].bitcast(Int32)
                x[4 * n + i] = lowered(x[4 * n + i], said, said >> 1, repetition, presence, frequency)


@cute.jit
def keys(t: Constexpr[Spread], x: cute.Tensor, rank: Int32, thread: Int32):
    """The thread's keys [4 * quads], unsigned and of the logits' order; 0 where it has no column."""
    key = cute.make_rmem_tensor((4 * t.quads,), Uint32)
    for n in range_constexpr(t.quads):
        there = t.column(rank, thread, n) < _end(t, rank)
        for i in range_constexpr(4):
            k = order(x[4 * n + i]).bitcast(Uint32) ^ Uint32(0x80000000)
            key[4 * n + i] = k if there else Uint32(0)
    return key


@cute.jit
def highest(t: Constexpr[Spread], sm: Int32, key: cute.Tensor, rank: Int32, thread: Int32):
    """The largest key of the cluster, in all threads. A barrier of the cluster."""
    best = key[0]
    for n in range_constexpr(1, 4 * t.quads):
        best = cutlass.max(best, key[n])
    best = cute.arch.warp_redux_sync(best, kind="max")
    warp, lane = thread // 32, thread % 32
    if lane == 0:
        ptx.sts32(sm + warp * 4, best)
    cute.arch.sync_threads()
    if warp == 0:
        best = ptx.lds32(sm + cutlass.min(lane, Int32(t.threads // 32 - 1)) * 4)
        best = cute.arch.warp_redux_sync(best, kind="max")
        if lane < t.ctas:
            ptx.store_remote_f32(sm + t.o_tops + rank * 4, lane, best.bitcast(Float32))
    meet()
    best = ptx.lds32(sm + t.o_tops)
    for n in range_constexpr(1, t.ctas):
        best = cutlass.max(best, ptx.lds32(sm + t.o_tops + n * 4))
    return best


@cute.jit
def meet():
    """Everybody in the cluster has come here, and what they wrote is visible."""
    cute.arch.cluster_arrive()
    cute.arch.cluster_wait()


# Weights ----------------------------------------------------------------------------------------------------


@cute.jit
def weights(t: Constexpr[Spread], key: cute.Tensor, top: Uint32, temperature: Float32):
    """exp((x - top) / temperature) of the thread's keys, f32 [4 * quads], within 3e-8; without a temperature
    1 for the largest, 0 for others.

    2^y for a y in two floats: what rounding the product by log2(e) / temperature leaves over is kept.
    """
    scale = Float64(LOG2_E) / temperature.to(Float64)
    coarse = scale.to(Float32)
    fine = (scale - coarse.to(Float64)).to(Float32)
    largest = unordered((top ^ Uint32(0x80000000)).bitcast(Int32))
    p = cute.make_rmem_tensor((4 * t.quads,), Float32)
    for n in range_constexpr(4 * t.quads):
        d = unordered((key[n] ^ Uint32(0x80000000)).bitcast(Int32)) - largest
        p[n] = _exp2(cute.arch.fmax(ptx.multiply(d, coarse), Float32(-64.0)), d, coarse, fine)
        if not (temperature > Float32(0.0)):
            p[n] = Float32(1.0) if key[n] == top else Float32(0.0)
        if key[n] == Uint32(0):
            p[n] = Float32(0.0)
    return p


@cute.jit
def keep_likely(p: cute.Tensor, least: Float32):
    """Only weights of `least` on: the largest is 1."""
    for n in range_constexpr(cute.size(p)):
        if p[n] < least:
            p[n] = Float32(0.0)


@cute.jit
def _exp2(y: Float32, d: Float32, coarse: Float32, fine: Float32):
    """2^(d (coarse + fine)) for y = d coarse rounded, -64 or more; 0 below 2^-63."""
    whole = ptx.nearest(y)
    rest = (y - whole) + ptx.fma(d, fine, ptx.fma(d, coarse, -y))
    value = Float32(EXP2[-1])
    for i in range_constexpr(1, len(EXP2)):
        value = ptx.fma(value, rest, Float32(EXP2[-1 - i]))
    bits = value.bitcast(Int32) + (whole.to(Int32) << Int32(23))
    return bits.bitcast(Float32) if y > Float32(-63.0) else Float32(0.0)


@cute.jit
def whole(p: Float32):
    """A weight of 0 to 1 in whole 2^-38, Int64."""
    bits = p.bitcast(Int32)
    shift = (bits >> Int32(23)) - Int32(127 + 23 - ONE)
    digits = Int64((bits & Int32(0x7FFFFF)) | Int32(0x800000))
    left, right = cutlass.max(shift, Int32(0)), cutlass.min(cutlass.max(-shift, Int32(0)), Int32(32))
    return (digits << Int64(left)) >> Int64(right)


# Bounds -----------------------------------------------------------------------------------------------------


@cute.jit
def keep_largest(
    t: Constexpr[Spread],
    sm: Int32,
    p: cute.Tensor,
    key: cute.Tensor,
    many: Int32,
    share: Float32,
    rank: Int32,
    thread: Int32,
):
    """Only the weights of the `many` largest keys, and of these only those that are a `share` of the sum,
    with the one that crosses it. Equal keys stay or go together. 0 is off, as are all columns and all of the
    sum.
    """
    for turn in cutlass.range(2, unroll=1):  # one text for both: what is fetched once is not waited for again
        counts = turn == 0 and many > 0 and many < t.columns
        if counts or (turn == 1 and share > Float32(0.0) and share < Float32(1.0)):
            bound = _bound(t, sm, p, key, counts, many, share, rank, thread)
            for n in range_constexpr(4 * t.quads):
                if key[n] < bound:
                    p[n] = Float32(0.0)


@cute.jit
def _bound(
    t: Constexpr[Spread],
    sm: Int32,
    p: cute.Tensor,
    key: cute.Tensor,
    counts: Boolean,
    many: Int32,
    share: Float32,
    rank: Int32,
    thread: Int32,
):
    """The largest key that `many` keys reach if it `counts`, else a `share` of all weights."""
    prefix, need = Int64(0), Int64(many)
    for step in cutlass.range(t.STEPS, unroll=1):
        shift = Int64(t.WIDTH * (t.STEPS - 1)) - Int64(t.WIDTH) * Int64(step)
        for n in range_constexpr(4 * t.quads):
            digits = key[n].to(Int64) << Int64(t.WIDTH * t.STEPS - 32)
            weight = whole(p[n])
            if counts:
                weight = Int64(1) if key[n] != Uint32(0) else Int64(0)
            if weight > Int64(0) and (digits >> (shift + Int64(t.WIDTH))) == prefix:
                digit = (digits >> shift).to(Int32) & Int32(t.BINS - 1)
                upper = (weight >> Int64(HALF)).to(Uint32)
                ptx.count_shared(sm + t.o_lower + digit * 4, weight.to(Uint32) & Uint32((1 << HALF) - 1))
                if upper != Uint32(0):
                    ptx.count_shared(sm + t.o_upper + digit * 4, upper)
        meet()
        _add_up(t, sm, rank, thread)
        meet()
        digit, need = _choose(t, sm, need, share, step == 0 and not counts, thread)
        prefix = (prefix << Int64(t.WIDTH)) | digit
    return (prefix >> Int64(t.WIDTH * t.STEPS - 32)).to(Uint32)


@cute.jit
def _add_up(t: Constexpr[Spread], sm: Int32, rank: Int32, thread: Int32):
    """The CTA's share of the digits: the cluster's sums, to all of it."""
    share = t.BINS // t.ctas
    for n in cutlass.range(-(-share // t.threads), unroll=1):
        i = thread + n * t.threads
        if i < share:
            digit = rank * share + i
            lower = [_remote(sm + t.o_lower + digit * 4, r) for r in range(t.ctas)]
            upper = [_remote(sm + t.o_upper + digit * 4, r) for r in range(t.ctas)]
            sum_ = Int64(0)
            for other in range_constexpr(t.ctas):
                sum_ = sum_ + lower[other] + (upper[other] << Int64(HALF))
            for other in range_constexpr(t.ctas):
                ptx.store_remote_i64(sm + t.o_sums + digit * 8, Int32(other), sum_)


@cute.jit
def _remote(s: Int32, rank: Constexpr[int]):
    """The word at shared address `s` of CTA `rank`."""
    return ptx.load_remote_f32(s, Int32(rank)).bitcast(Uint32).to(Int64)


@cute.jit
def _choose(t: Constexpr[Spread], sm: Int32, need: Int64, share: Float32, shares: Boolean, thread: Int32):
    """The digit where sums from the top reach `need`, or a `share` of all if it `shares`, and what is left to
    reach inside it. The histograms are empty again.
    """
    run = -(-t.BINS // t.threads)
    top = Int32(t.BINS - 1) - thread * run
    sums = cute.make_rmem_tensor((run,), Int64)
    own = Int64(0)
    for i in range_constexpr(run):
        sums[i] = Int64(0)
        if top - i >= 0:
            sums[i] = ptx.lds_i64(sm + t.o_sums + (top - i) * 8)
            ptx.sts32(sm + t.o_lower + (top - i) * 4, Uint32(0))
            ptx.sts32(sm + t.o_upper + (top - i) * 4, Uint32(0))
        own = own + sums[i]
    before, all_ = scan.sums_before(own, Int64, sm, thread, t.threads)
    if shares:
        wanted = share.to(Float64) * all_.to(Float64)
        need = wanted.to(Int64)
        if need.to(Float64) < wanted:
            need = need + Int64(1)
    for i in range_constexpr(run):
        if before < need and need <= before + sums[i]:
            ptx.sts_i64(sm + t.o_choice, Int64(top - i))
            ptx.sts_i64(sm + t.o_choice + 8, need - before)
        before = before + sums[i]
    cute.arch.sync_threads()
    return ptx.lds_i64(sm + t.o_choice), ptx.lds_i64(sm + t.o_choice + 8)


# The token --------------------------------------------------------------------------------------------------


@cute.jit
def draw(t: Constexpr[Spread], sm: Int32, p: cute.Tensor, number: Float64, rank: Int32, thread: Int32):
    """In one thread of the cluster the first column whose weights, summed from column 0 on, exceed `number`
    of all of them; in all others -1. Column 0 where nothing weighs. A barrier of the cluster, the last.
    """
    own = Int64(0)
    for n in range_constexpr(4 * t.quads):
        own = own + whole(p[n])
    before, of_cta = scan.sums_before(own, Int64, sm, thread, t.threads)
    if thread < t.ctas:
        ptx.store_remote_i64(sm + t.o_totals + rank * 8, thread, of_cta)
    meet()
    all_ = Int64(0)
    for n in range_constexpr(t.ctas):
        total = ptx.lds_i64(sm + t.o_totals + n * 8)
        before = before + (total if n < rank else Int64(0))
        all_ = all_ + total
    wanted = (number * all_.to(Float64)).to(Int64)
    found = Int32(-1)
    if before <= wanted and wanted < before + own:
        reached = before
        for n in range_constexpr(t.quads):
            for i in range_constexpr(4):
                reached = reached + whole(p[4 * n + i])
                if found < 0 and reached > wanted:
                    found = t.column(rank, thread, n) + i
    if all_ == Int64(0) and rank == 0 and thread == 0:
        found = Int32(0)  # the logits were no numbers
    return found


@cute.jit
def going(g_stops: Int64, stops: Constexpr[int], token: Int32, length: Int32):
    """The next length: 0 once the token is a stop."""
    for n in range_constexpr(stops):
        if ptx.ldg32(g_stops + n * 4).bitcast(Int32) == token:
            length = Int32(0)
    return length
