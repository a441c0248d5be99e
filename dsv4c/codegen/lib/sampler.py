"""A token by its row of logits, over a cluster: bounds by digits of keys, sums in whole numbers.

Every thread holds a run of neighboring columns in registers. A column weighs exp((x - top) / temperature),
which is at most 1, in whole 2^-38: sums are exact, whoever adds them up and in which order. A bound is the
largest key that enough of the row's keys reach: CTAs add up their weights by bins, of which the one where the
sum is reached is looked at again, until what is in it is few enough to be compared one by one.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Constexpr, Float32, Float64, Int32, Int64, Uint32, range_constexpr

from dsv4c.codegen.lib import cluster, ptx
from dsv4c.codegen.lib.geometry import Sampling, Spread

TOPS, SUMS, HEADS, CANDIDATES, TOTALS = range(0, 40, 8)  # barriers
TEMPERATURE, TOP_K, TOP_P, MIN_P, REPETITION, PRESENCE, FREQUENCY = range(7)  # columns of the knobs
HALF = 19  # bits of a weight's lower part: 2^13 of either part add up in 32 bits
ONE = 2 * HALF  # a weight of 1 is 2^38
NUMBERS = ONE - 21  # significands of weights from 2^-17 on are whole 2^-38
LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
UPPER, LOWER = 16.0, 2.0**-15  # numbers whose last bits are 2^-19 and 2^-38

_asm = cute.arch.inline_ptx


class Operands(NamedTuple):
    """logits f32[N, columns]; tokens, lengths, positions, slots i32[N]; history i32[S, capacity],
    origin i32[S], knobs f32[S, knobs], seeds i32[S, 2], stops i32[S, stops] -> chosen, said, going i32[N].
    """

    logits: cute.Pointer
    tokens: cute.Pointer
    lengths: cute.Pointer
    positions: cute.Pointer
    slots: cute.Pointer
    history: cute.Pointer
    origin: cute.Pointer
    knobs: cute.Pointer
    seeds: cute.Pointer
    stops: cute.Pointer
    chosen: cute.Pointer
    said: cute.Pointer
    going: cute.Pointer


class Place(NamedTuple):
    """Which row a thread works on, in a launch of so many CTAs, and in which of its cluster."""

    row: Int32
    blocks: Int32
    rank: Int32
    thread: Int32


@cute.jit
def enter(k: Constexpr[Sampling], sm: Int32) -> Place:
    """Open the inboxes of a cluster per row. All threads."""
    t = k.spread
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    blocks, _, _ = cute.arch.grid_dim()
    row, rank = block // t.ctas, cute.arch.block_idx_in_cluster()
    open_inboxes(t, sm, thread)
    return Place(row, blocks, rank, thread)


@cute.jit
def choose(k: Constexpr[Sampling], m: Operands, sm: Int32, place: Place) -> None:
    """The row's token."""
    t = k.spread
    row, blocks, rank, thread = place
    x = load(t, m.logits.toint() + Int64(row) * (t.columns * 4), rank, thread)
    position = ptx.ldg32(m.positions.toint() + row * 4).bitcast(Int32)
    slot = ptx.ldg32(m.slots.toint() + row * 4).bitcast(Int32)
    knobs = load_knobs(m.knobs.toint() + slot * (k.knobs * 4))
    origin = ptx.ldg32(m.origin.toint() + slot * 4).bitcast(Int32)
    g_said = m.history.toint() + Int64(slot) * (k.capacity * 4)
    repetition, presence, frequency = knobs[REPETITION], knobs[PRESENCE], knobs[FREQUENCY]
    penalized = repetition != Float32(0.0) or presence != Float32(0.0) or frequency != Float32(0.0)
    if thread < 32 and (rank == 0 or penalized):
        rows = blocks // t.ctas
        g_tokens, g_positions, g_slots = m.tokens.toint(), m.positions.toint(), m.slots.toint()
        remember(g_said, k.capacity, g_tokens, g_positions, g_slots, slot, rows, thread)
    if thread // 32 == (1 if t.threads > 32 else 0):
        g_length, g_stops = m.lengths.toint() + row * 4, m.stops.toint() + slot * (k.stops * 4)
        g_seed = m.seeds.toint() + slot * 8
        prepare(sm, g_seed, position + 1 - origin, g_length, g_stops, k.stops, thread % 32)
    cluster.meet()

    if penalized:
        last = cutlass.min(position, Int32(k.capacity - 1))
        count(t, sm, g_said, last, origin, rank, thread)
        lower(t, sm, x, repetition, presence, frequency, thread)
    send_highest(t, sm, x, rank, thread)
    temperature, scale = knobs[TEMPERATURE], (Float32(0.0), Float32(0.0))
    if temperature > Float32(0.0):
        scale = scales(temperature)
    top = highest(t, sm, thread)

    p = weights(t, x, top, temperature, scale)
    column, few, known, number = Int32(-1), Int32(0), Boolean(False), Float64(0.0)
    if temperature > Float32(0.0):
        many, share, least = knobs[TOP_K].to(Int32), knobs[TOP_P], knobs[MIN_P]
        few, known = keep_largest(t, sm, p, x, many, share, rank, thread)
        number = number_drawn(sm)
        if few == 0:
            keep_likely(p, least)
            known = known and not least > Float32(0.0)
        elif rank == 0:
            column = draw_of_few(t, sm, few, many, share, least, number, thread)
    if few == 0:
        column = draw(t, sm, p, known, number, rank, thread)
    if column >= 0:
        length, going = ends(sm, k.stops, column)
        said = column if length > 0 else Int32(-1)
        ptx.stg32(m.chosen.toint() + row * 4, column.bitcast(Uint32))
        ptx.stg32(m.said.toint() + row * 4, said.bitcast(Uint32))
        ptx.stg32(m.going.toint() + row * 4, going.bitcast(Uint32))


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
def prepare(
    sm: Int32,
    g_seed: Int64,
    index: Int32,
    g_length: Int64,
    g_stops: Int64,
    stops: Constexpr[int],
    lane: Int32,
):
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
    """Zero sums and candidates, and open what others send to. `meet` before anything is sent."""
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
    """How often the tokens of places 0 to `last` that are columns of this CTA were said from the origin on, a
    word each, and whether before, a byte each. Every CTA reads all places, a thread 16 of them before it
    counts any: to hand tokens over would take longer than most histories. Whole groups of 16 bytes are read,
    as far as a history has them.
    """
    _clear(t, sm + t.o_counts, t.counts, thread)
    cute.arch.sync_threads()  # and what was remembered is there
    first, columns = rank * t.each, _end(t, rank) - rank * t.each
    lead = (g_said >> Int64(2)).to(Int32) & 3  # a slot of an odd capacity starts within a quad
    quads = (last + lead) // 4 + 1 if last >= 0 else Int32(0)
    for quad in cutlass.range(thread, quads, 4 * t.threads, unroll=1):
        tokens = cute.make_rmem_tensor((16,), Uint32)
        for n in range_constexpr(4):
            at = cutlass.min(quad + n * t.threads, quads - 1) * 4 - lead
            words = ptx.ldg128(g_said + Int64(at) * 4)
            for i in range_constexpr(4):
                tokens[4 * n + i] = words[i]
        for n in range_constexpr(16):
            place = (quad + n // 4 * t.threads) * 4 + n % 4 - lead
            _count(t, sm, tokens[n].bitcast(Int32) - first, columns, place, last, origin)
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
            before = ptx.lds32(sm + t.o_before + t.column(0, thread, n))
            if (counts[0] | counts[1] | counts[2] | counts[3] | before) != Uint32(0):
                for i in range_constexpr(4):
                    said = (counts[i] | (before & Uint32(0xFF << (8 * i)))).bitcast(Int32)
                    times = counts[i].bitcast(Int32)
                    x[4 * n + i] = lowered(x[4 * n + i], said, times, repetition, presence, frequency)


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
def send_highest(t: Constexpr[Spread], sm: Int32, x: cute.Tensor, rank: Int32, thread: Int32):
    """The largest number of the CTA, NaN above all, to all CTAs."""
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
        s_top, s_bar = sm + t.o_tops + rank * 4, sm + t.o_bars + TOPS
        cluster.send_f32(s_top, s_bar, lane, best.bitcast(Float32), lane < t.ctas)


@cute.jit
def highest(t: Constexpr[Spread], sm: Int32, thread: Int32):
    """The largest of what was sent, in all threads."""
    ptx.mbarrier_wait(sm + t.o_bars + TOPS, Int32(0))
    best = ptx.lds32(sm + t.o_tops + cutlass.min(thread % 32, Int32(t.ctas - 1)) * 4)
    return number_of(cute.arch.warp_redux_sync(best, kind="max"))


@cute.jit
def _larger(a: Float32, b: Float32):
    """The larger number, NaN if either is."""
    return _asm("max.NaN.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b])


# Weights ----------------------------------------------------------------------------------------------------


@cute.jit
def scales(temperature: Float32):
    """log2(e) / temperature in two floats, of which the second is what rounding the first left over."""
    scale = Float64(LOG2_E) / temperature.to(Float64)
    coarse = scale.to(Float32)
    return coarse, (scale - coarse.to(Float64)).to(Float32)


@cute.jit
def weights(t: Constexpr[Spread], x: cute.Tensor, top: Float32, temperature: Float32, scale: tuple):
    """exp((x - top) / temperature) of the thread's numbers, f32 [4 * quads], within 5e-7 of themselves: of 22
    bits, in whole 2^-38. Without a temperature 1 for those as large as the largest, 0 for others. -inf weighs
    nothing.

    2^y for a y in two floats: what rounding the product with the scale leaves over is kept.
    """
    p = cute.make_rmem_tensor((4 * t.quads,), Float32)
    if temperature > Float32(0.0):
        coarse, fine = scale
        for n in range_constexpr(4 * t.quads):
            d = x[n] - top
            y = cute.arch.fmax(ptx.multiply(d, coarse), Float32(-64.0))
            rest = ptx.fma(d, fine, ptx.fma(d, coarse, -y))
            value = ptx.ex2(y)
            value = ptx.fma(value, ptx.multiply(rest, Float32(LN_2)), value)
            value = value if y > Float32(-63.0) else Float32(0.0)
            value = ((value.bitcast(Uint32) + Uint32(2)) & Uint32(0xFFFFFFFC)).bitcast(Float32)
            p[n] = ptx.plus(_plus_cut(value, Float32(LOWER)), Float32(-LOWER))
    else:
        for n in range_constexpr(4 * t.quads):
            p[n] = Float32(1.0) if x[n] == top or x[n] != x[n] else Float32(0.0)
    return p


@cute.jit
def keep_likely(p: cute.Tensor, least: Float32):
    """Only weights of `least` on: the largest is 1."""
    if least > Float32(0.0):
        for n in range_constexpr(cute.size(p)):
            if p[n] < least:
                p[n] = Float32(0.0)


@cute.jit
def _split(p: Float32):
    """A weight as a multiple of 2^-19, and the rest: floats, of which 32 add up without rounding."""
    upper = ptx.plus(_plus_cut(p, Float32(UPPER)), Float32(-UPPER))
    return upper, ptx.plus(p, -upper)


@cute.jit
def _joined(upper: Float32, lower: Float32):
    """Sums of both parts in whole 2^-38, Int64."""
    return (ptx.multiply(upper, Float32(2.0**HALF)).to(Int32).to(Int64) << Int64(HALF)) + ptx.multiply(
        lower, Float32(2.0**ONE)
    ).to(Int32).to(Int64)


@cute.jit
def _plus_cut(a: Float32, b: Float32):
    """A sum, without the bits that do not fit."""
    return _asm("add.rz.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b])


@cute.jit
def _bin_of(p: Float32):
    """The bin of a weight above 0: two for every power of two, 1 in bin 1, those from 1/2 on in 2 and 3."""
    return ((Uint32(0x3FFFFFFF) - p.bitcast(Uint32)) >> Uint32(22)).bitcast(Int32)


@cute.jit
def _most_of(bin_: Int32):
    """The largest weight of a bin."""
    return (Uint32(0x3FFFFFFF) - (bin_.bitcast(Uint32) << Uint32(22))).bitcast(Float32)


@cute.jit
def _least_of(bin_: Int32):
    """The smallest weight of a bin."""
    return (Uint32(0x3FC00000) - (bin_.bitcast(Uint32) << Uint32(22))).bitcast(Float32)


@cute.jit
def _significand(p: Float32, drop: Uint32):
    """The 24 bits of a weight above 0 but for the last ones: 22, as all others are 0, or the first, a 1."""
    return ((p.bitcast(Uint32) & Uint32(0x7FFFFF)) | Uint32(0x800000)) >> drop


@cute.jit
def _whole(sum_: Int64, power: Int32):
    """A sum of significands of weights from 2^-power on, below twice as much, in whole 2^-38."""
    return (sum_ << Int64(NUMBERS)) >> power.to(Int64)


# Bounds -----------------------------------------------------------------------------------------------------


@cute.jit
def keep_largest(
    t: Constexpr[Spread],
    sm: Int32,
    p: cute.Tensor,
    x: cute.Tensor,
    many: Int32,
    share: Float32,
    rank: Int32,
    thread: Int32,
):
    """Only the weights of the `many` largest numbers, and of these only those that are a `share` of the sum,
    with the one that crosses it. Equal numbers stay or go together. 0 is off, as are all columns and all of
    the sum.

    Returns two things. The number of candidates if the `many` are few: nothing is left out yet then, and
    `draw_of_few` does all the rest; else 0. And whether every CTA has the sums of what every one keeps.
    """
    few, known, step_of_all = Int32(0), Boolean(False), Int32(0)
    for turn in cutlass.range(2, unroll=1):  # one text for both: what is fetched once is not waited for again
        counts = turn == 0 and many > 0 and many < t.columns
        if few == 0 and (counts or (turn == 1 and share > Float32(0.0) and share < Float32(1.0))):
            low, high, shift, bound = Uint32(0), Uint32(0), Uint32(0), Uint32(0)
            least, most, power = Float32(0.0), Float32(0.0), Int32(NUMBERS)
            need, searching = Int64(many), Boolean(True)
            for step in cutlass.range(t.STEPS, unroll=1):
                if searching:
                    shares = step == 0 and not counts
                    if step == 0:
                        _fill_by_weight(t, sm, p, counts, thread)
                    else:
                        members = _members(t, p, least, most)
                        _fill_by_key(t, sm, p, x, members, counts, low, high, shift, thread)
                    _add_up(t, sm, step_of_all, Int32(-1) if shares else power, rank, thread)
                    bin_, rest, through = _reach(t, sm, need, share, shares, thread)
                    all_ = counts and step == 0 and through <= Int64(t.FEW)
                    members = Uint32(0)
                    if step == 0:
                        least, most = Float32(2.0**-ONE), Float32(0.0)
                        if bin_ >= 0:
                            least, most = _least_of(bin_), _most_of(bin_)
                        if all_:
                            most = Float32(1.0)
                        members = _members(t, p, least, most)
                        if shares:
                            power = bin_ // 2
                    else:
                        upper = high - (bin_.bitcast(Uint32) << shift)
                        lower = cutlass.max(low, upper - ((Uint32(1) << shift) - Uint32(1)))
                        members = _members(t, x, number_of(lower), number_of(upper))
                        members = members & _members(t, p, least, most)
                    _send_members(t, sm, p, x, members, rank, thread)
                    if shares:
                        _add_up_above(t, sm, bin_, thread)
                    _await_members(t, sm, step_of_all, thread)
                    step_of_all = step_of_all + 1
                    searching = Boolean(False)
                    if bin_ >= 0 or all_:  # else everything stays
                        found, low, high = _candidates(t, sm, thread)
                        bound = high
                        if found >= 0:
                            if all_:
                                few = found
                            else:
                                known = shares
                                bound = _crossing(t, sm, found, rest, counts, thread)
                        elif low != high:
                            searching = Boolean(True)
                            width = Int32(32) - _leading_zeros(high - low)
                            shift = cutlass.max(width - t.BIN_BITS, Int32(0)).bitcast(Uint32)
                            need = need if all_ else rest
            if few == 0 and bound != Uint32(0):  # bins go by weights, of which neighbors may change places
                least_number = number_of(bound)
                for n in range_constexpr(4 * t.quads):
                    kept = p[n] > most or (p[n] >= least and x[n] >= least_number)
                    p[n] = p[n] if kept else Float32(0.0)
    return few, known


@cute.jit
def _fill_by_weight(t: Constexpr[Spread], sm: Int32, p: cute.Tensor, counts: Boolean, thread: Int32):
    """The CTA's sums by bin, of significands or of their number. A copy for every lane of COPIES, as
    neighbors often meet in a bin.
    """
    s = sm + t.o_bins + thread % t.COPIES * 4
    drop = Uint32(23) if counts else Uint32(2)
    for n in range_constexpr(4 * t.quads):  # 0 adds nothing to the last bin: shorter than a branch
        weight = _here(p[n])
        value = cutlass.min(_significand(weight, drop), weight.bitcast(Uint32))
        bin_ = cutlass.min(_bin_of(weight), Int32(t.BINS - 1))
        ptx.count_shared(s + bin_ * (4 * t.COPIES), value)


@cute.jit
def _fill_by_key(
    t: Constexpr[Spread],
    sm: Int32,
    p: cute.Tensor,
    x: cute.Tensor,
    members: Uint32,
    counts: Boolean,
    low: Uint32,
    high: Uint32,
    shift: Uint32,
    thread: Int32,
):
    """The same of the members, by equal parts of the keys from `high` down to `low`."""
    s = sm + t.o_bins + thread % t.COPIES * 4
    drop = Uint32(23) if counts else Uint32(2)
    for n in range_constexpr(4 * t.quads):
        key = key_of(_here(x[n]))
        if (members & Uint32(1 << n)) != Uint32(0) and key >= low and key <= high:
            value = _significand(_here(p[n]), drop)
            ptx.count_shared(s + ((high - key) >> shift).bitcast(Int32) * (4 * t.COPIES), value)


@cute.jit
def _add_up(t: Constexpr[Spread], sm: Int32, step: Int32, power: Int32, rank: Int32, thread: Int32):
    """The cluster's sums by bin, of numbers or in whole 2^-38, in every CTA: two threads to a bin. The CTA's
    own are zero again. `power` is that of all bins, or -1: of each its own.
    """
    s_bar = sm + t.o_bars + SUMS
    half, others = thread % 2, t.ctas // 2
    cute.arch.sync_threads()
    for n in range_constexpr(-(-2 * t.BINS // t.threads)):
        i = thread + n * t.threads
        if i < 2 * t.BINS:
            sum_ = Int64(0)
            for j in range_constexpr(t.COPIES // 8):
                s = sm + t.o_bins + i * (2 * t.COPIES) + 16 * j
                a = ptx.lds128(s)
                ptx.sts128(s, Uint32(0), Uint32(0), Uint32(0), Uint32(0))
                sum_ = sum_ + ((a[0].to(Int64) + a[1].to(Int64)) + (a[2].to(Int64) + a[3].to(Int64)))
            sum_ = sum_ + cute.arch.shuffle_sync_bfly(sum_, offset=1)
            beside = cute.arch.shuffle_sync_bfly(sum_, offset=2)
            first = sum_ if i % 4 < 2 else beside
            second = beside if i % 4 < 2 else sum_
            s = sm + t.o_inbox + (rank * t.BINS + i // 4 * 2) * 8
            for other in range_constexpr(-(-t.ctas // 4)):
                peer = i % 4 + 4 * other
                a, b = _words(first), _words(second)
                cluster.send_128(s, s_bar, peer, a[0], a[1], b[0], b[1], peer < t.ctas)
    ptx.mbarrier_wait(s_bar, step % 2)
    if thread == 0:
        ptx.mbarrier_expect(s_bar, Int32(8 * t.BINS * t.ctas))
        ptx.sts128(sm + t.o_found, Uint32(0), Uint32(0), Uint32(0), Uint32(0))
    for n in range_constexpr(-(-2 * t.BINS // t.threads)):
        i = thread + n * t.threads
        if i < 2 * t.BINS:
            sum_ = Int64(0)
            for other in range_constexpr(others):
                s = sm + t.o_inbox + ((half * others + other) * t.BINS + i // 2) * 8
                sum_ = sum_ + ptx.lds_i64(s)
            sum_ = sum_ + cute.arch.shuffle_sync_bfly(sum_, offset=1)
            if half == 0:
                ptx.sts_i64(sm + t.o_sums + i // 2 * 8, _whole(sum_, power if power >= 0 else i // 4))
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
    run = -(-t.BINS // 32)
    sums = cute.make_rmem_tensor((run,), Int64)
    so_far = Int64(0)
    for i in range_constexpr(run):
        sums[i] = ptx.lds_i64(sm + t.o_sums + (lane * run + i) * 8)
        so_far = so_far + sums[i]
    own = so_far
    so_far = _running(so_far, lane)
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
def _running(r: Int64, lane: Int32):
    """The sum over the lanes up to this one."""
    for i in range_constexpr(5):
        other = cute.arch.shuffle_sync_up(r, offset=1 << i, mask_and_clamp=0)
        r = r + (other if lane >= (1 << i) else Int64(0))
    return r


@cute.jit
def share_of(all_: Int64, share: Float32):
    """The least whole number that is a `share` of all."""
    wanted = share.to(Float64) * all_.to(Float64)
    need = wanted.to(Int64)
    return need + Int64(1) if need.to(Float64) < wanted else need


# Candidates -------------------------------------------------------------------------------------------------


@cute.jit
def _members(t: Constexpr[Spread], values: cute.Tensor, least: Float32, most: Float32):
    """The thread's columns whose values are from `least` to `most`, a bit each."""
    members = Uint32(0)
    for n in range_constexpr(4 * t.quads):
        if values[n] >= least and values[n] <= most:
            members = members | Uint32(1 << n)
    return members


@cute.jit
def _send_members(
    t: Constexpr[Spread],
    sm: Int32,
    p: cute.Tensor,
    x: cute.Tensor,
    members: Uint32,
    rank: Int32,
    thread: Int32,
):
    """The members to all CTAs, in any order: key, weight and column. Of those that are too many only their
    number and their range are sent.
    """
    least, most = Uint32(0), Uint32(0)
    if members != Uint32(0):
        at = _take(sm + t.o_found, cute.arch.popc(members).to(Uint32)).bitcast(Int32)
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
    if thread % 32 == 0 and most != Uint32(0):
        _raise(sm + t.o_found + 4, least)
        _raise(sm + t.o_found + 8, most)
    cute.arch.sync_threads()
    head = ptx.lds128(sm + t.o_found)
    s_head, s_bar = sm + t.o_heads + rank * 16, sm + t.o_bars + HEADS
    cluster.send_128(s_head, s_bar, thread, head[0], head[1], head[2], Uint32(0), thread < t.ctas)
    own = cutlass.min(head[0], Uint32(t.MOST)).bitcast(Int32)
    for i in cutlass.range(thread // t.ctas, own, t.threads // t.ctas, unroll=1):
        words = ptx.lds128(sm + t.o_own + i * 16)
        s_place = sm + t.o_candidates + (rank * t.MOST + i) * 16
        cluster.send_128(s_place, sm + t.o_bars + CANDIDATES, thread % t.ctas, *words)
    cute.arch.sync_threads()  # lanes that send fewer would wait before the others have sent


@cute.jit
def _await_members(t: Constexpr[Spread], sm: Int32, step: Int32, thread: Int32):
    """Wait until all that was sent is here."""
    s_heads, s_candidates = sm + t.o_bars + HEADS, sm + t.o_bars + CANDIDATES
    ptx.mbarrier_wait(s_heads, step % 2)
    if thread < 32:
        sent = Uint32(0)
        if thread < t.ctas:
            sent = cutlass.min(ptx.lds32(sm + t.o_heads + thread * 16), Uint32(t.MOST))
        sent = cute.arch.warp_redux_sync(sent, kind="add")
        if thread == 0:
            ptx.mbarrier_expect(s_heads, Int32(16 * t.ctas))
            ptx.mbarrier_expect(s_candidates, sent.bitcast(Int32) * 16)
    ptx.mbarrier_wait(s_candidates, step % 2)


@cute.jit
def _add_up_above(t: Constexpr[Spread], sm: Int32, bin_: Int32, thread: Int32):
    """Every CTA's sum of the bins above one, a warp for each in turns."""
    lane, warp = thread % 32, thread // 32
    run, warps = -(-t.BINS // 32), t.threads // 32
    for n in range_constexpr(-(-t.ctas // warps)):
        rank, sum_ = warp + n * warps, Int64(0)
        if rank < t.ctas:
            for i in range_constexpr(run):
                at = lane * run + i
                if at < bin_:
                    sum_ = sum_ + _whole(ptx.lds_i64(sm + t.o_inbox + (rank * t.BINS + at) * 8), at // 2)
            sum_ = _running(sum_, lane)
            if lane == 31:
                ptx.sts_i64(sm + t.o_totals + rank * 8, sum_)


@cute.jit
def _candidates(t: Constexpr[Spread], sm: Int32, thread: Int32):
    """How many candidates there are, -1 if too many, and the smallest and the largest key. They are in a row
    then, each a word in four lists: keys, inverse columns, and both parts of weights in whole 2^-38. A
    barrier.
    """
    lane = thread % 32
    number, least, most = Int32(0), Uint32(0), Uint32(0)
    if lane < t.ctas:
        head = ptx.lds128(sm + t.o_heads + lane * 16)
        number, least, most = head[0].bitcast(Int32), head[1], head[2]
    up_to = number
    for i in range_constexpr(4):
        other = cute.arch.shuffle_sync_up(up_to, offset=1 << i, mask_and_clamp=0)
        up_to = up_to + (other if lane >= (1 << i) else Int32(0))
    all_ = cute.arch.shuffle_sync(up_to, t.ctas - 1)
    widest = cute.arch.warp_redux_sync(number.bitcast(Uint32), kind="max").bitcast(Int32)
    least = cute.arch.warp_redux_sync(least, kind="max")
    most = cute.arch.warp_redux_sync(most, kind="max")
    if widest <= t.MOST and all_ <= t.FEW:
        for n in range_constexpr(-(-t.ctas * t.MOST // t.threads)):
            i = thread + n * t.threads
            of, place = i // t.MOST, i % t.MOST
            before = cute.arch.shuffle_sync(up_to - number, of % 32)
            if place < cute.arch.shuffle_sync(number, of % 32) and of < t.ctas:
                words = ptx.lds128(sm + t.o_candidates + i * 16)
                upper, lower = _split(words[1].bitcast(Float32))
                s = sm + t.o_lists + (before + place) * 4
                ptx.sts32(s, words[0])
                ptx.sts32(s + t.FEW * 4, ~words[2])
                ptx.sts32(s + t.FEW * 8, ptx.multiply(lower, Float32(2.0**ONE)).to(Uint32))
                ptx.sts32(s + t.FEW * 12, ptx.multiply(upper, Float32(2.0**HALF)).to(Uint32))
        if thread < ((Int32(0) - all_) & 3):  # lists are read four at a time
            ptx.sts32(sm + t.o_lists + (all_ + thread) * 4, Uint32(0))
            ptx.sts32(sm + t.o_lists + (t.FEW + all_ + thread) * 4, Uint32(0))
    else:
        all_ = Int32(-1)
    for n in range_constexpr(-(-t.RESULTS // t.threads)):
        i = thread + n * t.threads
        if i < t.RESULTS:
            ptx.sts32(sm + t.o_results + i * 4, Uint32(0))
    cute.arch.sync_threads()
    return all_, ~least, most


@cute.jit
def _larger_ones(t: Constexpr[Spread], s: Int32, s_weights: Int32, number: Int32, key: Uint32):
    """Of the first `number` keys at `s` those above `key`: how many, and what they weigh."""
    many, lower, upper = Int32(0), Uint32(0), Uint32(0)
    for i in cutlass.range((number + 3) // 4, unroll=2):
        keys = ptx.lds128(s + i * 16)
        lowers, uppers = ptx.lds128(s_weights + i * 16), ptx.lds128(s_weights + t.FEW * 4 + i * 16)
        for j in range_constexpr(4):
            many = many + (Int32(1) if keys[j] > key else Int32(0))
            lower = lower + (lowers[j] if keys[j] > key else Uint32(0))
            upper = upper + (uppers[j] if keys[j] > key else Uint32(0))
    return many, _sum_of(lower, upper)


@cute.jit
def _sum_of(lower: Uint32, upper: Uint32):
    """Sums of both parts of weights as one."""
    return (upper.to(Int64) << Int64(HALF)) + lower.to(Int64)


@cute.jit
def _crossing(t: Constexpr[Spread], sm: Int32, number: Int32, need: Int64, counts: Boolean, thread: Int32):
    """The smallest key of the candidates that are kept: of those above it are less than needed. What is kept
    of each CTA is added up in the results. A barrier.
    """
    s_lists = sm + t.o_lists
    s_weights = s_lists + t.FEW * 8
    if thread < number:
        key = ptx.lds32(s_lists + thread * 4)
        many, above = _larger_ones(t, s_lists, s_weights, number, key)
        if (Int64(many) if counts else above) < need:
            _raise(sm + t.o_results, ~key)
            of = (~ptx.lds32(s_lists + (t.FEW + thread) * 4)).bitcast(Int32) // t.each
            ptx.count_shared(sm + t.o_kept + of * 8, ptx.lds32(s_weights + thread * 4))
            ptx.count_shared(sm + t.o_kept + of * 8 + 4, ptx.lds32(s_weights + (t.FEW + thread) * 4))
    cute.arch.sync_threads()
    return ~ptx.lds32(sm + t.o_results)


@cute.jit
def draw_of_few(
    t: Constexpr[Spread],
    sm: Int32,
    candidates: Int32,
    many: Int32,
    share: Float32,
    least: Float32,
    number: Float64,
    thread: Int32,
):
    """`draw` from the candidates, of which only the `many` largest keys weigh, of these those that are a
    `share` of the sum, of these weights of `least` on. A CTA by itself.
    """
    s_lists = sm + t.o_lists
    s_weights = s_lists + t.FEW * 8
    key, column, lower, upper = Uint32(0), Uint32(0), Uint32(0), Uint32(0)
    before_it, above = Int32(0), Int64(0)
    if thread < candidates:
        key, column = ptx.lds32(s_lists + thread * 4), ptx.lds32(s_lists + (t.FEW + thread) * 4)
        before_it, above = _larger_ones(t, s_lists, s_weights, candidates, key)
        if before_it < many:
            lower = ptx.lds32(s_weights + thread * 4)
            upper = ptx.lds32(s_weights + (t.FEW + thread) * 4)
    all_ = _all(sm + t.o_results, lower, upper, thread)
    need = share_of(all_, share) if share > Float32(0.0) and share < Float32(1.0) else all_
    p = ptx.fma(upper.to(Float32), Float32(2.0**-HALF), ptx.multiply(lower.to(Float32), Float32(2.0**-ONE)))
    if above >= need or p < least:
        lower, upper = Uint32(0), Uint32(0)
    if thread < candidates:
        ptx.sts32(s_weights + thread * 4, lower)
        ptx.sts32(s_weights + (t.FEW + thread) * 4, upper)
    all_ = _all(sm + t.o_results + 8, lower, upper, thread)
    wanted, found = (number * all_.to(Float64)).to(Int64), Int32(-1)
    if thread < candidates:
        _, before = _larger_ones(t, s_lists + t.FEW * 4, s_weights, candidates, column)
        if before <= wanted and wanted < before + _sum_of(lower, upper):
            found = (~column).bitcast(Int32)
    if all_ == Int64(0) and thread == 0:
        found = Int32(0)  # the logits were no numbers
    return found


@cute.jit
def _all(s: Int32, lower: Uint32, upper: Uint32, thread: Int32):
    """The CTA's sum of both parts of weights, in two words of zeros. A barrier."""
    lower = cute.arch.warp_redux_sync(lower, kind="add")
    upper = cute.arch.warp_redux_sync(upper, kind="add")
    if thread % 32 == 0:
        ptx.count_shared(s, lower)
        ptx.count_shared(s + 4, upper)
    cute.arch.sync_threads()
    return _sum_of(*ptx.lds64(s))


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


@cute.jit
def _count(
    t: Constexpr[Spread], sm: Int32, column: Int32, columns: Int32, place: Int32, last: Int32, origin: Int32
):
    """Count a token of a place if the place is one of 0 to `last` and the column one of the CTA. Most are
    not, and lanes differ: few branches.
    """
    _asm(
        "{ .reg .pred n, p, q; setp.lt.u32 n, {$r2}, {$r3}; setp.le.and.u32 n, {$r4}, {$r5}, n; "
        "setp.ge.and.s32 p|q, {$r4}, {$r6}, n; "
        "@p red.shared.add.u32 [{$r0}], 1; @q st.shared.u8 [{$r1}], 1; }",
        read_only_args=[
            sm + t.o_counts + column * 4,
            sm + t.o_before + column,
            column,
            columns,
            place,
            last,
            origin,
        ],
    )


@cute.jit
def _take(s: Int32, r: Uint32):
    """A word of shared memory as it is before as much is added to it, whoever else does."""
    return _asm(
        "atom.shared.add.u32 {$w0}, [{$r0}], {$r1};", write_only_types=[Uint32], read_only_args=[s, r]
    )


# The token --------------------------------------------------------------------------------------------------


@cute.jit
def draw(
    t: Constexpr[Spread],
    sm: Int32,
    p: cute.Tensor,
    known: Boolean,
    number: Float64,
    rank: Int32,
    thread: Int32,
):
    """In one thread of the cluster the first column whose weights, summed from column 0 on, exceed `number`
    of all of them; in all others -1. Column 0 where nothing weighs. `known` sums of CTAs are not sent.
    """
    lane, warp = thread % 32, thread // 32
    upper, lower = Float32(0.0), Float32(0.0)
    for n in range_constexpr(4 * t.quads):
        parts = _split(p[n])
        upper, lower = ptx.plus(upper, parts[0]), ptx.plus(lower, parts[1])
    own = _joined(upper, lower)
    before = _running(own, lane)
    if lane == 31:
        ptx.sts_i64(sm + warp * 8, before)
    cute.arch.sync_threads()
    of_warp = ptx.lds_i64(sm + lane * 8) if lane < t.threads // 32 else Int64(0)
    of_warps = _running(of_warp, lane)
    before = before - own + cute.arch.shuffle_sync(of_warps - of_warp, warp)
    of_cta = cute.arch.shuffle_sync(of_warps, 31)
    if not known:
        s_total = sm + t.o_totals + rank * 8
        cluster.send_i64(s_total, sm + t.o_bars + TOTALS, thread, of_cta, thread < t.ctas)
        ptx.mbarrier_wait(sm + t.o_bars + TOTALS, Int32(0))
    total = Int64(0)
    if lane < t.ctas:
        total = ptx.lds_i64(sm + t.o_totals + lane * 8)
        if known:
            total = total + _sum_of(*ptx.lds64(sm + t.o_kept + lane * 8))
    totals = _running(total, lane)
    all_ = cute.arch.shuffle_sync(totals, 31)
    before = before + cute.arch.shuffle_sync(totals - total, rank)
    wanted, found = (number * all_.to(Float64)).to(Int64), Int32(-1)
    if before <= wanted and wanted < before + own:
        rest = wanted - before
        upper = ptx.multiply((rest >> Int64(HALF)).to(Int32).to(Float32), Float32(-(2.0**-HALF)))
        rest = rest & Int64((1 << HALF) - 1)
        lower = ptx.multiply(rest.to(Int32).to(Float32), Float32(-(2.0**-ONE)))
        found = t.column(rank, thread, 0)
        for n in range_constexpr(4 * t.quads):
            parts = _split(p[n])
            upper, lower = ptx.plus(upper, parts[0]), ptx.plus(lower, parts[1])
            if ptx.plus(upper, lower) <= Float32(0.0):
                found = found + 1
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
