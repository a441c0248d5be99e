"""A token by its row of logits, over a cluster: bounds by digits of keys, sums in whole numbers.

Every thread holds a run of neighboring columns in registers. A column weighs exp((x - top) / temperature),
which is at most 1, in whole 2^-38: sums are exact, whoever adds them up and in which order. A bound is the
largest key that enough of the row's keys reach: CTAs add up their weights by bins, of which the one where the
sum is reached is looked at again, until what is in it is few enough to be compared one by one.
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
    top: Uint32,
    temperature: Float32,
    many: Int32,
    share: Float32,
    rank: Int32,
    thread: Int32,
):
    """Only the weights of the `many` largest keys, and of these only those that are a `share` of the sum,
    with the one that crosses it. Equal keys stay or go together. 0 is off, as are all columns and all of the
    sum. Returns whether the `many` are few: then they are candidates, nothing is left out yet, and
    `draw_of_few` does all the rest.
    """
    scale = (Float64(LOG2_E * t.BINS / ONE) / temperature.to(Float64)).to(Float32)
    largest = unordered((top ^ Uint32(0x80000000)).bitcast(Int32))
    place = cute.make_rmem_tensor((t.quads,), Uint32)
    few = Boolean(False)
    for turn in cutlass.range(2, unroll=1):  # one text for both: what is fetched once is not waited for again
        counts = turn == 0 and many > 0 and many < t.columns
        if not few and (counts or (turn == 1 and share > Float32(0.0) and share < Float32(1.0))):
            low, high, shift = Uint32(0), Uint32(0xFFFFFFFF), Uint32(0)
            bound, need, searching = Uint32(0), Int64(many), Boolean(True)
            _place_weights(t, p, key, place, largest, scale)
            for step in cutlass.range(t.STEPS, unroll=1):
                if searching:
                    _fill(t, sm, p, place, counts, thread)
                    _add_up(t, sm, rank, thread)
                    bin_, rest, through = _reach(t, sm, need, share, step == 0 and not counts, thread)
                    all_ = counts and step == 0 and through <= Int64(t.FEW)
                    if bin_ < 0 and not all_:
                        searching = Boolean(False)  # everything stays
                    else:
                        _collect(t, sm, p, key, place, bin_, all_, rank, thread)
                        source, found, low, high = _candidates(t, sm, thread)
                        searching = Boolean(False)
                        bound = high
                        if found >= 0:
                            few = all_
                            if not all_:
                                bound = _crossing(t, sm, source, found, rest, counts, thread)
                        elif low != high:
                            searching = Boolean(True)
                            width = Int32(32) - _leading_zeros(high - low)
                            shift = cutlass.max(width - t.BIN_BITS, Int32(0)).bitcast(Uint32)
                            need = need if all_ else rest
                            _place_keys(t, p, key, place, low, high, shift)
            if not few:
                for n in range_constexpr(4 * t.quads):
                    if key[n] < bound:
                        p[n] = Float32(0.0)
    return few


@cute.jit
def _place_weights(
    t: Constexpr[Spread],
    p: cute.Tensor,
    key: cute.Tensor,
    place: cute.Tensor,
    largest: Float32,
    scale: Float32,
):
    """The bin of every column, a byte each, from the largest weight down: equal parts of its logarithm.
    Weights below 2^-38 have none.
    """
    for n in range_constexpr(t.quads):
        word = Uint32(0)
        for i in range_constexpr(4):
            x = unordered((_here(key[4 * n + i]) ^ Uint32(0x80000000)).bitcast(Int32))
            part = cute.arch.fmin(ptx.multiply(largest - x, scale), Float32(t.BINS)).to(Int32)
            word = word | (_bin(t, part.bitcast(Uint32), p[4 * n + i]) << Uint32(8 * i))
        place[n] = word


@cute.jit
def _place_keys(
    t: Constexpr[Spread],
    p: cute.Tensor,
    key: cute.Tensor,
    place: cute.Tensor,
    low: Uint32,
    high: Uint32,
    shift: Uint32,
):
    """The same, of the keys from `high` down to `low`: equal parts of these."""
    for n in range_constexpr(t.quads):
        word = Uint32(0)
        for i in range_constexpr(4):
            k = key[4 * n + i]
            part = (high - k) >> shift if k >= low and k <= high else Uint32(t.BINS)
            word = word | (_bin(t, part, p[4 * n + i]) << Uint32(8 * i))
        place[n] = word


@cute.jit
def _bin(t: Constexpr[Spread], part: Uint32, p: Float32):
    """A bin, or NONE."""
    return part if part < Uint32(t.BINS) and p > Float32(0.0) else Uint32(t.NONE)


@cute.jit
def _bin_of(place: cute.Tensor, column: Constexpr[int]):
    return ((place[column // 4] >> Uint32(column % 4 * 8)) & Uint32(0xFF)).bitcast(Int32)


@cute.jit
def _fill(
    t: Constexpr[Spread], sm: Int32, p: cute.Tensor, place: cute.Tensor, counts: Boolean, thread: Int32
):
    """The CTA's sums by bin, of weights or of their number: a copy for every eighth lane, as neighbors often
    meet in a bin.
    """
    s = sm + t.o_lower + thread % t.COPIES * 4
    for n in range_constexpr(4 * t.quads):
        bin_ = _bin_of(place, n)
        if bin_ != t.NONE:
            lower, upper = _parts(p[n])
            lower, upper = Uint32(1) if counts else lower, Uint32(0) if counts else upper
            at = s + bin_ * (4 * t.COPIES)
            ptx.count_shared(at, lower)
            if upper != Uint32(0):
                ptx.count_shared(at + (t.o_upper - t.o_lower), upper)


@cute.jit
def _parts(p: Float32):
    """The lower HALF bits of a weight, and the upper ones. Shifts by too much, or by less than 0, give 0."""
    return _asm(
        "{ .reg .b32 b, d, l, r, left, right; mov.b32 b, {$r0}; "
        "and.b32 d, b, 0x7FFFFF; or.b32 d, d, 0x800000; "
        f"shr.u32 b, b, 23; sub.s32 left, b, {127 + 23 - ONE}; sub.s32 right, {127 + 23 - ONE}, b; "
        "shl.b32 l, d, left; shr.u32 r, d, right; or.b32 l, l, r; "
        f"and.b32 {{$w0}}, l, {(1 << HALF) - 1}; "
        f"add.s32 right, right, {HALF}; shr.u32 {{$w1}}, d, right; }}",
        write_only_types=[Uint32] * 2,
        read_only_args=[p],
    )


@cute.jit
def _add_up(t: Constexpr[Spread], sm: Int32, rank: Int32, thread: Int32):
    """The cluster's sums by bin, in every CTA: two threads to a bin. The CTA's own are zero again."""
    half, others = thread % 2, t.ctas // 2
    cute.arch.sync_threads()
    for n in range_constexpr(-(-2 * t.BINS // t.threads)):
        i = thread + n * t.threads
        if i < 2 * t.BINS:
            s = sm + t.o_lower + i * (2 * t.COPIES)
            a, b = ptx.lds128(s), ptx.lds128(s + (t.o_upper - t.o_lower))
            ptx.sts128(s, Uint32(0), Uint32(0), Uint32(0), Uint32(0))
            ptx.sts128(s + (t.o_upper - t.o_lower), Uint32(0), Uint32(0), Uint32(0), Uint32(0))
            lower, upper = (a[0] + a[1]) + (a[2] + a[3]), (b[0] + b[1]) + (b[2] + b[3])
            sum_ = lower.to(Int64) + (upper.to(Int64) << Int64(HALF))
            sum_ = sum_ + cute.arch.shuffle_sync_bfly(sum_, offset=1)
            for other in range_constexpr(others):
                s = sm + t.o_inbox + (rank * t.BINS + i // 2) * 8
                ptx.store_remote_i64(s, half * others + other, sum_)
    meet()
    for n in range_constexpr(-(-2 * t.BINS // t.threads)):
        i = thread + n * t.threads
        if i < 2 * t.BINS:
            sum_ = Int64(0)
            for other in range_constexpr(others):
                s = sm + t.o_inbox + ((half * others + other) * t.BINS + i // 2) * 8
                sum_ = sum_ + ptx.lds_i64(s)
            sum_ = sum_ + cute.arch.shuffle_sync_bfly(sum_, offset=1)
            if half == 0:
                ptx.sts_i64(sm + t.o_sums + i // 2 * 8, sum_)
    cute.arch.sync_threads()


@cute.jit
def _reach(t: Constexpr[Spread], sm: Int32, need: Int64, share: Float32, shares: Boolean, thread: Int32):
    """The bin where sums from the first on reach `need`, or a `share` of all if it `shares`; what is left to
    reach inside it; and the sum with it. -1 where all do not reach it, and their sum. Every warp by itself.
    """
    lane = thread % 32
    run = t.BINS // 32
    sums = cute.make_rmem_tensor((run,), Int64)
    so_far = Int64(0)
    for i in range_constexpr(run):
        sums[i] = ptx.lds_i64(sm + t.o_sums + (lane * run + i) * 8)
        so_far = so_far + sums[i]
    own = so_far
    for i in range_constexpr(5):
        other = cute.arch.shuffle_sync_up(so_far, offset=1 << i, mask_and_clamp=0)
        so_far = so_far + (other if lane >= (1 << i) else Int64(0))
    all_ = cute.arch.shuffle_sync(so_far, 31)
    if shares:
        need = share_of(all_, share)
    before = so_far - own
    bin_, rest, through = Int32(-1), Int64(0), all_
    for i in range_constexpr(run):
        if before < need and need <= before + sums[i]:
            bin_, rest, through = lane * run + i, need - before, before + sums[i]
        before = before + sums[i]
    bin_ = cute.arch.warp_redux_sync((bin_ + 1).bitcast(Uint32), kind="max").bitcast(Int32) - 1
    owner = cutlass.max(bin_, Int32(0)) // run
    return bin_, cute.arch.shuffle_sync(rest, owner), cute.arch.shuffle_sync(through, owner)


@cute.jit
def share_of(all_: Int64, share: Float32):
    """The least whole number that is a `share` of all."""
    wanted = share.to(Float64) * all_.to(Float64)
    need = wanted.to(Int64)
    return need + Int64(1) if need.to(Float64) < wanted else need


# Candidates -------------------------------------------------------------------------------------------------


@cute.jit
def _collect(
    t: Constexpr[Spread],
    sm: Int32,
    p: cute.Tensor,
    key: cute.Tensor,
    place: cute.Tensor,
    bin_: Int32,
    all_: Boolean,
    rank: Int32,
    thread: Int32,
):
    """What is in a bin, or `all_` in it and in those above it, to all CTAs: key, weight and column. Of those
    that are too many only their number and their range arrive. A barrier of the cluster.
    """
    lane = thread % 32
    last = Int32(t.BINS - 1) if all_ and bin_ < 0 else bin_
    first = Int32(0) if all_ else bin_
    members = Uint32(0)  # columns, a bit each
    for n in range_constexpr(4 * t.quads):
        of_column = _bin_of(place, n)
        if of_column >= first and of_column <= last:
            members = members | Uint32(1 << n)
    own = cute.arch.popc(members).to(Int32)
    so_far = own
    for i in range_constexpr(5):
        other = cute.arch.shuffle_sync_up(so_far, offset=1 << i, mask_and_clamp=0)
        so_far = so_far + (other if lane >= (1 << i) else Int32(0))
    before = Int32(0)
    if lane == 31:
        before = _take_places(sm + t.o_found, so_far)
    at = cute.arch.shuffle_sync(before, 31) + so_far - own
    least, most = Uint32(0), Uint32(0)
    if members != Uint32(0):
        for n in range_constexpr(t.quads):
            for i in range_constexpr(4):
                if (members & Uint32(1 << (4 * n + i))) != Uint32(0):
                    k, column = key[4 * n + i], t.column(rank, thread, n) + i
                    if at < t.MOST:
                        s = sm + t.o_own + at * 16
                        ptx.sts128(s, k, p[4 * n + i].bitcast(Uint32), column.bitcast(Uint32), Uint32(0))
                    at = at + 1
                    least, most = cutlass.max(least, ~k), cutlass.max(most, k)
    least = cute.arch.warp_redux_sync(least, kind="max")
    most = cute.arch.warp_redux_sync(most, kind="max")
    if lane == 0:
        _raise(sm + t.o_found + 4, least)
        _raise(sm + t.o_found + 8, most)
    cute.arch.sync_threads()
    head = ptx.lds128(sm + t.o_found)
    number = cutlass.min(head[0].bitcast(Int32), Int32(t.MOST))
    for at in cutlass.range(thread // t.ctas, number, t.threads // t.ctas, unroll=1):
        words = ptx.lds128(sm + t.o_own + at * 16)
        _send(sm + t.o_candidates + (rank * t.MOST + at) * 16, thread % t.ctas, words)
    if thread < t.ctas:
        _send(sm + t.o_heads + rank * 16, thread, head)
    meet()
    if thread == 0:
        ptx.sts128(sm + t.o_found, Uint32(0), Uint32(0), Uint32(0), Uint32(0))


@cute.jit
def _candidates(t: Constexpr[Spread], sm: Int32, thread: Int32):
    """Which candidate is the thread's, -1 for none; how many there are, -1 if too many; and the smallest and
    the largest key.
    """
    source, number, least, most, fits = Int32(-1), Int32(0), Uint32(0), Uint32(0), Boolean(True)
    for rank in cutlass.range(t.ctas, unroll=2):
        head = ptx.lds128(sm + t.o_heads + rank * 16)
        own = head[0].bitcast(Int32)
        if thread >= number and thread < number + own:
            source = rank * t.MOST + thread - number
        number = number + own
        fits = fits and own <= t.MOST
        least, most = cutlass.max(least, head[1]), cutlass.max(most, head[2])
    number = number if fits and number <= t.FEW else Int32(-1)
    return source, number, ~least, most


@cute.jit
def _candidate(t: Constexpr[Spread], sm: Int32, source: Int32):
    """Its key, weight and column; nothing for none."""
    key, p, column = Uint32(0), Float32(0.0), Int32(0)
    if source >= 0:
        words = ptx.lds128(sm + t.o_candidates + source * 16)
        key, p, column = words[0], words[1].bitcast(Float32), words[2].bitcast(Int32)
    return key, p, column


@cute.jit
def _crossing(
    t: Constexpr[Spread],
    sm: Int32,
    source: Int32,
    number: Int32,
    need: Int64,
    counts: Boolean,
    thread: Int32,
):
    """The key of the candidate where sums from the largest key down reach `need`."""
    key, p, column = _candidate(t, sm, source)
    _list(t, sm, key, column, Int64(1) if counts else whole(p), thread)
    above, same = Int64(0), Int64(0)
    for i in cutlass.range(number if thread // 32 * 32 < number else Int32(0), unroll=4):
        words = ptx.lds128(sm + t.o_list + i * 16)
        weight = _joined(words)
        if words[0] > key:
            above = above + weight
        if words[0] == key:
            same = same + weight
    if source >= 0 and above < need and need <= above + same:
        ptx.sts32(sm + t.o_choice, key)
    cute.arch.sync_threads()
    return ptx.lds32(sm + t.o_choice)


@cute.jit
def _list(t: Constexpr[Spread], sm: Int32, key: Uint32, column: Int32, weight: Int64, thread: Int32):
    """A thread's candidate where all threads read it. A barrier."""
    lower, upper = weight.to(Uint32), (weight >> Int64(32)).to(Uint32)
    ptx.sts128(sm + t.o_list + thread * 16, key, column.bitcast(Uint32), lower, upper)
    cute.arch.sync_threads()


@cute.jit
def _joined(words):
    """The weight of a listed candidate."""
    return words[2].to(Int64) | (words[3].to(Int64) << Int64(32))


@cute.jit
def draw_of_few(
    t: Constexpr[Spread],
    sm: Int32,
    many: Int32,
    share: Float32,
    least: Float32,
    number: Float64,
    thread: Int32,
):
    """`draw` from the candidates, of which only the `many` largest keys weigh, of these those that are a
    `share` of the sum, of these weights of `least` on. A CTA by itself.
    """
    source, candidates, _, _ = _candidates(t, sm, thread)
    key, p, column = _candidate(t, sm, source)
    weight = whole(p) if source >= 0 else Int64(0)
    _list(t, sm, key, column, weight, thread)
    candidates = candidates if thread // 32 * 32 < candidates else Int32(0)  # of a warp that has one
    above, ahead = Int64(0), Int32(0)
    for i in cutlass.range(candidates, unroll=4):
        words = ptx.lds128(sm + t.o_list + i * 16)
        if words[0] > key:
            above, ahead = above + _joined(words), ahead + 1
    if ahead >= many:
        weight = Int64(0)
    _, all_ = scan.sums_before(weight, Int64, sm, thread, t.threads)
    crossed = share > Float32(0.0) and share < Float32(1.0) and above >= share_of(all_, share)
    if crossed or p < least:
        weight = Int64(0)
    _list(t, sm, key, column, weight, thread)
    before, all_ = Int64(0), Int64(0)
    for i in cutlass.range(candidates, unroll=4):
        words = ptx.lds128(sm + t.o_list + i * 16)
        other = _joined(words)
        all_ = all_ + other
        if words[1].bitcast(Int32) < column:
            before = before + other
    wanted = (number * all_.to(Float64)).to(Int64)
    found = column if before <= wanted and wanted < before + weight else Int32(-1)
    if all_ == Int64(0) and thread == 0:
        found = Int32(0)  # the logits were no numbers
    return found


@cute.jit
def _here(r: Uint32):
    """A number whose uses are computed where they stand: kept from before they take too many registers."""
    return _asm("mov.b32 {$w0}, {$r0};", write_only_types=[Uint32], read_only_args=[r])


@cute.jit
def _leading_zeros(r: Uint32):
    return _asm("clz.b32 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[r])


@cute.jit
def _take_places(s: Int32, r: Int32):
    """The word of shared memory before so many were added."""
    return _asm("atom.shared.add.u32 {$w0}, [{$r0}], {$r1};", write_only_types=[Int32], read_only_args=[s, r])


@cute.jit
def _raise(s: Int32, r: Uint32):
    """A word of shared memory becomes the larger one."""
    _asm("red.shared.max.u32 [{$r0}], {$r1};", read_only_args=[s, r])


@cute.jit
def _send(s: Int32, rank: Int32, words):
    """Four words to the same shared address of CTA `rank`."""
    ptx.store_remote_128(s, rank, words[0], words[1], words[2], words[3])


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
