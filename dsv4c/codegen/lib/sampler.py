"""A token by its row of logits, over a cluster: bounds by digits of keys, sums in whole numbers.

Every thread holds a run of neighboring columns in registers. A column weighs exp((x - top) / temperature),
which is at most 1, in whole 2^-38: sums are exact, whoever adds them up and in which order. A bound is the
largest key that enough of the row's keys reach: CTAs add up their weights by bins, of which the one where the
sum is reached is looked at again, until what is in it is few enough to be compared one by one.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Constexpr, Float32, Float64, Int32, Int64, Uint32, range_constexpr

from dsv4c.codegen.lib import cluster, ptx, scan
from dsv4c.codegen.lib.geometry import Spread

TOPS, SUMS, HEADS, CANDIDATES, TOTALS = range(0, 40, 8)  # barriers
TEMPERATURE, TOP_K, TOP_P, MIN_P, REPETITION, PRESENCE, FREQUENCY = range(7)  # columns of the knobs
HALF = 19  # bits of a weight's lower part: 2^13 of either part add up in 32 bits
ONE = 2 * HALF  # a weight of 1 is 2^38
LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
UPPER, LOWER = 16.0, 2.0**-15  # numbers whose last bits are 2^-19 and 2^-38

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
def prepare(sm: Int32, g_seed: Int64, index: Int32, g_length: Int64, g_stops: Int64, stops: Constexpr[int], lane: Int32):
    """The number that a token is drawn by, its row's length and its slot's stops, to where all threads find
    them after a barrier. A warp.
    """
    low, high = ptx.ldg32(g_seed), ptx.ldg32(g_seed + 4)
    word = ptx.ldg32(g_length)
    if lane < stops:
        word = ptx.ldg32(g_stops + lane * 4)
    ptx.sts32(sm + Spread.o_ends + cutlass.min(lane, Int32(stops)) * 4, word)
    if lane == 0:
        number = unit(philox(low, high, index))
        ptx.sts_i64(sm + Spread.o_number, number.bitcast(Int64))


@cute.jit
def load_knobs(g_knobs: Int64):
    """A slot's knobs, by column."""
    return tuple(off_unless_finite(ptx.ldg_f32(g_knobs + n * 4)) for n in range(FREQUENCY + 1))


# A row's keys -----------------------------------------------------------------------------------------------


@cute.jit
def open_inboxes(t: Constexpr[Spread], sm: Int32, thread: Int32):
    """Zero sums and the number of candidates, and open what others send to. `meet` before anything is sent."""
    _clear(t, sm + t.o_found, t.o_own - t.o_found, thread)
    s_bars = sm + t.o_bars
    cluster.open_inbox(s_bars + TOPS, 4 * t.ctas, thread)
    cluster.open_inbox(s_bars + SUMS, 8 * t.BINS * t.ctas, thread)
    cluster.open_inbox(s_bars + HEADS, 16 * t.ctas, thread)
    ptx.open_barrier(s_bars + CANDIDATES, thread)
    cluster.open_inbox(s_bars + TOTALS, 8 * t.ctas, thread)
    cute.arch.sync_threads()
    cluster.arrive()


@cute.jit
def _clear(t: Constexpr[Spread], s: Int32, nbytes: Constexpr[int], thread: Int32):
    """Zero shared memory. All threads; a barrier before others use it."""
    for n in range_constexpr(-(-nbytes // (16 * t.threads))):
        i = thread + n * t.threads
        if i < nbytes // 16:
            ptx.sts128(s + i * 16, Uint32(0), Uint32(0), Uint32(0), Uint32(0))


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
    """The step's tokens of a slot to their places of its history. Every CTA that reads it stores all of them,
    for itself; of two rows for one place the later one stays. A warp reads, its first lane stores.
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
    """Counts of the tokens of places 0 to `last` that are columns of this CTA: 2 from the origin on, else the
    lowest bit. Every CTA reads all places: to hand tokens over would take longer than most histories.
    """
    _clear(t, sm + t.o_counts, -(-t.each // 4) * 16, thread)
    cute.arch.sync_threads()  # and what was remembered is there
    first, end = rank * t.each, _end(t, rank)
    for place in cutlass.range(thread, last + 1, t.threads, unroll=8):
        token = ptx.ldg32(g_said + Int64(place) * 4).bitcast(Int32)
        if token >= first and token < end:
            s = sm + t.o_counts + (token - first) * 4
            if place >= origin:
                ptx.count_shared(s, Uint32(2))
            else:
                _asm("red.shared.or.b32 [{$r0}], 1;", read_only_args=[s])
    cute.arch.sync_threads()


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
    """Penalties of what was counted, in place. Few columns were said: others are passed by, four at once."""
    for n in range_constexpr(t.quads):
        if t.column(0, thread, n) < t.each:
            counts = ptx.lds128(sm + t.o_counts + t.column(0, thread, n) * 4)
            if (counts[0] | counts[1] | counts[2] | counts[3]) != Uint32(0):
                for i in range_constexpr(4):
                    said = counts[i].bitcast(Int32)
                    x[4 * n + i] = lowered(x[4 * n + i], said, said >> 1, repetition, presence, frequency)


@cute.jit
def key_of(x: Float32):
    """A number's key: unsigned and of the same order."""
    return order(x).bitcast(Uint32) ^ Uint32(0x80000000)


@cute.jit
def number_of(key: Uint32):
    """The number that has a key."""
    k = (key ^ Uint32(0x80000000)).bitcast(Int32)
    bits = (-k) | Int32(-0x80000000) if k < 0 else k
    return bits.bitcast(Float32)


@cute.jit
def highest(t: Constexpr[Spread], sm: Int32, x: cute.Tensor, rank: Int32, thread: Int32):
    """The largest number of the cluster, NaN above all, in all threads."""
    most = x[0]
    for n in range_constexpr(1, 4 * t.quads):
        most = _larger(most, x[n])
    best = cute.arch.warp_redux_sync(key_of(most), kind="max")
    warp, lane = thread // 32, thread % 32
    if lane == 0:
        ptx.sts32(sm + warp * 4, best)
    cute.arch.sync_threads()
    if warp == 0:
        best = ptx.lds32(sm + cutlass.min(lane, Int32(t.threads // 32 - 1)) * 4)
        best = cute.arch.warp_redux_sync(best, kind="max")
        if lane < t.ctas:
            cluster.send_f32(sm + t.o_tops + rank * 4, sm + t.o_bars + TOPS, lane, best.bitcast(Float32))
    ptx.mbarrier_wait(sm + t.o_bars + TOPS, Int32(0))
    best = ptx.lds32(sm + t.o_tops)
    for n in range_constexpr(1, t.ctas):
        best = cutlass.max(best, ptx.lds32(sm + t.o_tops + n * 4))
    return number_of(best)


@cute.jit
def _larger(a: Float32, b: Float32):
    """The larger number, NaN if either is."""
    return _asm("max.NaN.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b])


# Weights ----------------------------------------------------------------------------------------------------


@cute.jit
def weights(t: Constexpr[Spread], x: cute.Tensor, top: Float32, temperature: Float32):
    """exp((x - top) / temperature) of the thread's numbers, f32 [4 * quads], within 3e-7 of themselves;
    without a temperature 1 for those as large as the largest, 0 for others. -inf weighs nothing.

    2^y for a y in two floats: what rounding the product by log2(e) / temperature leaves over is kept.
    """
    p = cute.make_rmem_tensor((4 * t.quads,), Float32)
    if temperature > Float32(0.0):
        scale = Float64(LOG2_E) / temperature.to(Float64)
        coarse = scale.to(Float32)
        fine = (scale - coarse.to(Float64)).to(Float32)
        for n in range_constexpr(4 * t.quads):
            d = x[n] - top
            y = cute.arch.fmax(ptx.multiply(d, coarse), Float32(-64.0))
            rest = ptx.fma(d, fine, ptx.fma(d, coarse, -y))
            value = ptx.ex2(y)
            value = ptx.fma(value, ptx.multiply(rest, Float32(LN_2)), value)
            p[n] = value if y > Float32(-63.0) else Float32(0.0)
    else:
        for n in range_constexpr(4 * t.quads):
            p[n] = Float32(1.0) if order(x[n]) == order(top) else Float32(0.0)
    return p


@cute.jit
def keep_likely(p: cute.Tensor, least: Float32):
    """Only weights of `least` on: the largest is 1."""
    for n in range_constexpr(cute.size(p)):
        if p[n] < least:
            p[n] = Float32(0.0)


@cute.jit
def _parts(p: Float32):
    """A weight of 0 to 1 in whole 2^-38: the lower HALF bits, and the upper ones."""
    upper = _plus_cut(p, Float32(UPPER))
    rest = ptx.plus(p, -ptx.plus(upper, Float32(-UPPER)))
    return _digits(_plus_cut(rest, Float32(LOWER)), LOWER), _digits(upper, UPPER)


@cute.jit
def _digits(r: Float32, zero: Constexpr[float]):
    """In units of the last bit of `zero`, how much more r is."""
    return r.bitcast(Uint32) - Float32(zero).bitcast(Uint32)


@cute.jit
def _plus_cut(a: Float32, b: Float32):
    """A sum, without the bits that do not fit."""
    return _asm("add.rz.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b])


@cute.jit
def whole(p: Float32):
    """A weight of 0 to 1 in whole 2^-38, Int64."""
    return _joined(*_parts(p))


@cute.jit
def _joined(lower: Uint32, upper: Uint32):
    """The whole of two parts, or of sums of them."""
    return lower.to(Int64) + (upper.to(Int64) << Int64(HALF))


# Bounds -----------------------------------------------------------------------------------------------------


@cute.jit
def keep_largest(
    t: Constexpr[Spread],
    sm: Int32,
    p: cute.Tensor,
    x: cute.Tensor,
    top: Float32,
    temperature: Float32,
    many: Int32,
    share: Float32,
    rank: Int32,
    thread: Int32,
):
    """Only the weights of the `many` largest numbers, and of these only those that are a `share` of the sum,
    with the one that crosses it. Equal numbers stay or go together. 0 is off, as are all columns and all of
    the sum. Returns whether the `many` are few: then they are candidates, nothing is left out yet, and
    `draw_of_few` does all the rest.
    """
    scale = (Float64(LOG2_E * t.BINS / ONE) / temperature.to(Float64)).to(Float32)
    place = cute.make_rmem_tensor((t.quads,), Uint32)
    few, step_of_all = Boolean(False), Int32(0)
    for turn in cutlass.range(2, unroll=1):  # one text for both: what is fetched once is not waited for again
        counts = turn == 0 and many > 0 and many < t.columns
        if not few and (counts or (turn == 1 and share > Float32(0.0) and share < Float32(1.0))):
            low, high, shift = Uint32(0), Uint32(0xFFFFFFFF), Uint32(0)
            bound, need, searching = Uint32(0), Int64(many), Boolean(True)
            _place_weights(t, x, place, top, scale)
            for step in cutlass.range(t.STEPS, unroll=1):
                if searching:
                    _fill(t, sm, p, place, counts, thread)
                    _add_up(t, sm, step_of_all, rank, thread)
                    bin_, rest, through = _reach(t, sm, need, share, step == 0 and not counts, thread)
                    all_ = counts and step == 0 and through <= Int64(t.FEW)
                    _collect(t, sm, p, x, place, bin_, all_, step_of_all, rank, thread)
                    step_of_all = step_of_all + 1
                    searching = Boolean(False)
                    if bin_ >= 0 or all_:  # else everything stays
                        source, found, low, high = _candidates(t, sm, thread)
                        bound = high
                        if found >= 0:
                            few = all_
                            if not all_:
                                key, weight, _ = _candidate(t, sm, source)
                                if counts:
                                    weight = Float32(2.0**-ONE)
                                _rank(t, sm, source, found, key, weight, thread)
                                bound = _crossing(t, sm, rest, thread)
                        elif low != high:
                            searching = Boolean(True)
                            width = Int32(32) - _leading_zeros(high - low)
                            shift = cutlass.max(width - t.BIN_BITS, Int32(0)).bitcast(Uint32)
                            need = need if all_ else rest
                            _place_keys(t, x, place, low, high, shift)
            if not few and bound != Uint32(0):
                least = number_of(bound)
                for n in range_constexpr(4 * t.quads):
                    if x[n] < least:
                        x[n] = -Float32.inf
                        p[n] = Float32(0.0)
    return few


@cute.jit
def _place_weights(t: Constexpr[Spread], x: cute.Tensor, place: cute.Tensor, top: Float32, scale: Float32):
    """The bin of every column, a byte each, from the largest weight down: equal parts of its logarithm.
    Weights below 2^-38 have none.
    """
    for n in range_constexpr(t.quads):
        word = Uint32(0)
        for i in range_constexpr(4):
            part = cute.arch.fmin(ptx.multiply(top - x[4 * n + i], scale), Float32(t.NONE)).to(Int32)
            word = word | (part.bitcast(Uint32) << Uint32(8 * i))
        place[n] = word


@cute.jit
def _place_keys(
    t: Constexpr[Spread], x: cute.Tensor, place: cute.Tensor, low: Uint32, high: Uint32, shift: Uint32
):
    """The same, of the keys from `high` down to `low`: equal parts of these."""
    for n in range_constexpr(t.quads):
        word = Uint32(0)
        for i in range_constexpr(4):
            key = key_of(_here(x[4 * n + i]))
            part = (high - key) >> shift if key >= low and key <= high else Uint32(t.NONE)
            word = word | (cutlass.min(part, Uint32(t.NONE)) << Uint32(8 * i))
        place[n] = word


@cute.jit
def _bin_of(place: cute.Tensor, column: Constexpr[int]):
    return ((place[column // 4] >> Uint32(column % 4 * 8)) & Uint32(0xFF)).bitcast(Int32)


@cute.jit
def _fill(
    t: Constexpr[Spread], sm: Int32, p: cute.Tensor, place: cute.Tensor, counts: Boolean, thread: Int32
):
    """The CTA's sums by bin, of weights or of their number: a copy for every lane of COPIES, as neighbors
    often meet in a bin.
    """
    s = sm + t.o_lower + thread % t.COPIES * 4
    if counts:
        for n in range_constexpr(4 * t.quads):
            if _bin_of(place, n) != t.NONE:
                ptx.count_shared(s + _bin_of(place, n) * (4 * t.COPIES), Uint32(1))
    else:
        for n in range_constexpr(4 * t.quads):
            if _bin_of(place, n) != t.NONE:
                at = s + _bin_of(place, n) * (4 * t.COPIES)
                lower, upper = _parts(p[n])
                ptx.count_shared(at, lower)
                if upper != Uint32(0):
                    ptx.count_shared(at + (t.o_upper - t.o_lower), upper)


@cute.jit
def _add_up(t: Constexpr[Spread], sm: Int32, step: Int32, rank: Int32, thread: Int32):
    """The cluster's sums by bin, in every CTA: two threads to a bin. The CTA's own are zero again."""
    s_bar = sm + t.o_bars + SUMS
    half, others = thread % 2, t.ctas // 2
    cute.arch.sync_threads()
    for n in range_constexpr(-(-2 * t.BINS // t.threads)):
        i = thread + n * t.threads
        if i < 2 * t.BINS:
            lower, upper = Uint32(0), Uint32(0)
            for j in range_constexpr(t.COPIES // 8):
                s = sm + t.o_lower + i * (2 * t.COPIES) + 16 * j
                a, b = ptx.lds128(s), ptx.lds128(s + (t.o_upper - t.o_lower))
                ptx.sts128(s, Uint32(0), Uint32(0), Uint32(0), Uint32(0))
                ptx.sts128(s + (t.o_upper - t.o_lower), Uint32(0), Uint32(0), Uint32(0), Uint32(0))
                lower = lower + ((a[0] + a[1]) + (a[2] + a[3]))
                upper = upper + ((b[0] + b[1]) + (b[2] + b[3]))
            sum_ = _joined(lower, upper)
            sum_ = sum_ + cute.arch.shuffle_sync_bfly(sum_, offset=1)
            beside = cute.arch.shuffle_sync_bfly(sum_, offset=2)
            first = sum_ if i % 4 < 2 else beside
            second = beside if i % 4 < 2 else sum_
            s = sm + t.o_inbox + (rank * t.BINS + i // 4 * 2) * 8
            for other in range_constexpr(-(-t.ctas // 4)):
                if i % 4 + 4 * other < t.ctas:
                    cluster.send_128(s, s_bar, i % 4 + 4 * other, *_words(first), *_words(second))
    ptx.mbarrier_wait(s_bar, step % 2)
    if thread == 0:
        ptx.mbarrier_expect(s_bar, Int32(8 * t.BINS * t.ctas))
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
def _words(r: Int64):
    """The lower and the upper 32 bits."""
    return r.to(Uint32), (r >> Int64(32)).to(Uint32)


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
    x: cute.Tensor,
    place: cute.Tensor,
    bin_: Int32,
    all_: Boolean,
    step: Int32,
    rank: Int32,
    thread: Int32,
):
    """What is in a bin, or `all_` in it and in those above it, to all CTAs: key, weight and column.

    Of those that are too many only their number and their range arrive.
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
    at, all_of_cta = scan.sums_before(own, Int32, sm, thread, t.threads)
    least, most = Uint32(0), Uint32(0)
    if members != Uint32(0):
        for n in range_constexpr(t.quads):
            for i in range_constexpr(4):
                if (members & Uint32(1 << (4 * n + i))) != Uint32(0):
                    k, column = key_of(_here(x[4 * n + i])), t.column(rank, thread, n) + i
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
    s_heads, s_candidates = sm + t.o_bars + HEADS, sm + t.o_bars + CANDIDATES
    if thread < t.ctas:
        head = ptx.lds128(sm + t.o_found)
        number = all_of_cta.bitcast(Uint32)
        cluster.send_128(sm + t.o_heads + rank * 16, s_heads, thread, number, head[1], head[2], Uint32(0))
    for i in cutlass.range(
        thread // t.ctas, cutlass.min(all_of_cta, Int32(t.MOST)), t.threads // t.ctas, unroll=1
    ):
        words = ptx.lds128(sm + t.o_own + i * 16)
        s_place = sm + t.o_candidates + (rank * t.MOST + i) * 16
        cluster.send_128(s_place, s_candidates, thread % t.ctas, *words)
    ptx.mbarrier_wait(s_heads, step % 2)
    if thread == 0:
        ptx.sts128(sm + t.o_found, Uint32(0), Uint32(0), Uint32(0), Uint32(0))
        ptx.mbarrier_expect(s_heads, Int32(16 * t.ctas))
        sent = Int32(0)
        for n in range_constexpr(t.ctas):
            sent = sent + cutlass.min(ptx.lds32(sm + t.o_heads + n * 16).bitcast(Int32), Int32(t.MOST))
        ptx.mbarrier_expect(s_candidates, sent * 16)
    ptx.mbarrier_wait(s_candidates, step % 2)


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
def _rank(
    t: Constexpr[Spread], sm: Int32, source: Int32, number: Int32, key: Uint32, p: Float32, thread: Int32
):
    """Weights of the candidates in falling order of their keys, equal ones at one place, and what is said of
    a place: its key. Returns the thread's place. Two barriers.
    """
    ptx.sts32(sm + t.o_list + thread * 4, key)
    if thread < t.FEW:
        ptx.sts32(sm + t.o_ranked + thread * 4, Uint32(0))
        ptx.sts32(sm + t.o_ranked + (t.FEW + thread) * 4, Uint32(0))
    cute.arch.sync_threads()
    place = Int32(0)
    if thread // 32 * 32 < number:
        for i in cutlass.range((number + 3) // 4, unroll=4):
            keys = ptx.lds128(sm + t.o_list + i * 16)
            for j in range_constexpr(4):
                place = place + (Int32(1) if keys[j] > key else Int32(0))
    if source >= 0:
        lower, upper = _parts(p)
        s = sm + t.o_ranked + place * 4
        ptx.count_shared(s, lower)
        ptx.count_shared(s + t.FEW * 4, upper)
        ptx.sts32(s + t.FEW * 8, key)
    cute.arch.sync_threads()
    return place


@cute.jit
def _crossing(t: Constexpr[Spread], sm: Int32, need: Int64, thread: Int32):
    """The key of the place where the ranked weights, summed from the first on, reach `need`. Every warp by
    itself.
    """
    run = t.FEW // 32
    sums, so_far = _run(t, sm, Int32(t.FEW), thread)
    before = so_far
    for i in range_constexpr(5):
        other = cute.arch.shuffle_sync_up(before, offset=1 << i, mask_and_clamp=0)
        before = before + (other if thread % 32 >= (1 << i) else Int64(0))
    before = before - so_far
    key = Uint32(0)
    for i in range_constexpr(run):
        if before < need and need <= before + sums[i]:
            key = ptx.lds32(sm + t.o_ranked + (2 * t.FEW + thread % 32 * run + i) * 4)
        before = before + sums[i]
    return cute.arch.warp_redux_sync(key, kind="max")


@cute.jit
def _run(t: Constexpr[Spread], sm: Int32, many: Int32, thread: Int32):
    """A lane's ranked weights, of the first `many` places, and their sum."""
    run = t.FEW // 32
    sums, all_ = cute.make_rmem_tensor((run,), Int64), Int64(0)
    for i in range_constexpr(run):
        place = thread % 32 * run + i
        s = sm + t.o_ranked + place * 4
        sum_ = _joined(ptx.lds32(s), ptx.lds32(s + t.FEW * 4))
        sums[i] = sum_ if place < many else Int64(0)
        all_ = all_ + sums[i]
    return sums, all_


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
    place = _rank(t, sm, source, candidates, key, p, thread)
    if share > Float32(0.0) and share < Float32(1.0):
        _, all_ = _run(t, sm, many, thread)
        for i in range_constexpr(5):
            all_ = all_ + cute.arch.shuffle_sync_bfly(all_, offset=1 << i)
        if key < _crossing(t, sm, share_of(all_, share), thread):
            source = Int32(-1)
    weight = whole(p) if source >= 0 and place < many and p >= least else Int64(0)
    before, all_ = scan.sums_before(weight, Int64, sm, thread, t.threads)
    wanted = (number * all_.to(Float64)).to(Int64)
    found = column if before <= wanted and wanted < before + weight else Int32(-1)
    if all_ == Int64(0) and thread == 0:
        found = Int32(0)  # the logits were no numbers
    return found


@cute.jit
def _here(r: Float32):
    """A number whose uses are computed where they stand: kept from before they take too many registers."""
    return _asm("mov.b32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[r])


@cute.jit
def _leading_zeros(r: Uint32):
    return _asm("clz.b32 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[r])


@cute.jit
def _raise(s: Int32, r: Uint32):
    """A word of shared memory becomes the larger one."""
    _asm("red.shared.max.u32 [{$r0}], {$r1};", read_only_args=[s, r])


# The token --------------------------------------------------------------------------------------------------


@cute.jit
def draw(t: Constexpr[Spread], sm: Int32, p: cute.Tensor, number: Float64, rank: Int32, thread: Int32):
    """In one thread of the cluster the first column whose weights, summed from column 0 on, exceed `number`
    of all of them; in all others -1. Column 0 where nothing weighs.
    """
    lower, upper = Uint32(0), Uint32(0)
    for n in range_constexpr(4 * t.quads):
        parts = _parts(p[n])
        lower, upper = lower + parts[0], upper + parts[1]
    own = _joined(lower, upper)
    before, of_cta = scan.sums_before(own, Int64, sm, thread, t.threads)
    if thread < t.ctas:
        cluster.send_i64(sm + t.o_totals + rank * 8, sm + t.o_bars + TOTALS, thread, of_cta)
    ptx.mbarrier_wait(sm + t.o_bars + TOTALS, Int32(0))
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
def number_drawn(sm: Int32):
    """What `prepare` left: a number of (0, 1)."""
    return ptx.lds_i64(sm + Spread.o_number).bitcast(Float64)


@cute.jit
def ends(sm: Int32, stops: Constexpr[int], token: Int32):
    """Length of the row, and the next one: 0 once the token is a stop."""
    length = ptx.lds32(sm + Spread.o_ends + stops * 4).bitcast(Int32)
    going = length
    for n in range_constexpr(stops):
        if ptx.lds32(sm + Spread.o_ends + n * 4).bitcast(Int32) == token:
            going = Int32(0)
    return length, going
