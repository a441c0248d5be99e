"""The next token, and the rows it is read from."""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Float64, Int32, Int64, Uint32, range_constexpr

from dsv4c.codegen.lib import ptx
from dsv4c.codegen.meanings.values import (
    Lines,
    Team,
    at,
    held,
    largest,
    lines,
    multiply,
    part,
    plus,
    put,
    size,
    total,
    wide,
)

TEMPERATURE, TOP_K, TOP_P, MIN_P, REPETITION, PRESENCE, FREQUENCY = range(7)
KNOBS = 7
COLUMN = 256  # in the team's scratch, where one number is handed on


@cute.jit
def last_rows(team: Team, x: cute.Tensor, lengths: cute.Tensor, y: cute.Tensor):
    sequences = lengths.shape[0]
    tokens, width = x.shape[0] // sequences, size(y.shape) // sequences
    for i in cutlass.range(team.thread, size(y.shape), team.threads):
        length = at(lengths, i // width)
        row = i // width * tokens + cutlass.max(length - 1, Int32(0))
        value = at(x, row * width + i % width)
        put(y, i, value if length > 0 else value.dtype(0))


@cute.jit
def argmax(team: Team, logits: cute.Tensor, y: cute.Tensor):
    """The lowest column of the largest number, NaN above all."""
    rows, width = logits.shape
    over = lines(team, rows, width)
    for row in cutlass.range(over.first, rows, over.step):
        best, column = Int32(-0x80000000), Int32(0x7FFFFFFF)
        for j in cutlass.range(over.lane, width, over.width):
            key = order(at(logits, row * width + j).to(cutlass.Float32))
            if key > best or column == Int32(0x7FFFFFFF):
                best, column = key, j
        if cutlass.const_expr(over.width > 1):
            for i in range_constexpr(5):
                other = cute.arch.shuffle_sync_bfly(best, offset=1 << i)
                place = cute.arch.shuffle_sync_bfly(column, offset=1 << i)
                if other > best or (other == best and place < column):
                    best, column = other, place
        if cutlass.const_expr(over.width > 32):
            keys = held(Int32, team.scratch, (2 * (over.width // 32),))
            if over.lane % 32 == 0:
                keys[over.lane // 32 * 2] = best
                keys[over.lane // 32 * 2 + 1] = column
            cute.arch.sync_threads()
            for i in range_constexpr(over.width // 32):
                if keys[2 * i] > best or (keys[2 * i] == best and keys[2 * i + 1] < column):
                    best, column = keys[2 * i], keys[2 * i + 1]
            cute.arch.sync_threads()
        if over.lane == 0:
            put(y, row, column)


@cute.jit
def order(x: cutlass.Float32):
    """An integer that orders numbers as they are: zeros are equal, NaN is above all."""
    bits = x.bitcast(Int32)
    magnitude = bits & Int32(0x7FFFFFFF)
    key = -magnitude if bits < 0 else magnitude
    return Int32(0x7FFFFFFF) if x != x else key


@cute.jit
def number(key: Uint32):
    """The number with that place in the order, counted from that of -inf on: see `place`."""
    signed = key.bitcast(Int32) - Int32(0x7F800000)
    bits = -signed | Int32(-0x80000000) if signed < 0 else signed
    return bits.bitcast(Float32)


@cute.jit
def place(x: Float32):
    """A number's place in their order, 0 for -inf."""
    return (order(x) + Int32(0x7F800000)).bitcast(Uint32)


@cute.jit
def knob(knobs: cute.Tensor, slot: Int32, column: Constexpr[int]):
    """A knob of a slot, off where it is no finite number."""
    value = at(knobs, slot * KNOBS + column)
    finite = (value.bitcast(Int32) & Int32(0x7F800000)) != Int32(0x7F800000)
    return value if finite else Float32(0.0)


@cute.jit
def penalize(
    team: Team,
    logits: cute.Tensor,
    history: cute.Tensor,
    positions: cute.Tensor,
    slots: cute.Tensor,
    origin: cute.Tensor,
    knobs: cute.Tensor,
    y: cute.Tensor,
):
    """The result's own bytes count tokens first: bit 0 says that one was seen, the others how often it was
    since the origin. One CTA.
    """
    rows, width = logits.shape
    capacity = history.shape[1]
    for row in cutlass.range(rows):
        slot = at(slots, row)
        first = cutlass.max(at(origin, slot), Int32(0))
        g_row = y.iterator.toint() + Int64(row) * (4 * width)
        for j in cutlass.range(team.thread, width, team.threads):
            ptx.stg32(g_row + Int64(j) * 4, Uint32(0))
        cute.arch.sync_threads()
        for p in cutlass.range(team.thread, capacity, team.threads):
            if p <= at(positions, row):
                token = g_row + Int64(at(history, slot * capacity + p)) * 4
                cute.arch.inline_ptx("red.global.or.b32 [{$r0}], {$r1};", read_only_args=[token, Uint32(1)])
                if p >= first:
                    cute.arch.inline_ptx(
                        "red.global.add.u32 [{$r0}], {$r1};", read_only_args=[token, Uint32(2)]
                    )
        cute.arch.sync_threads()
        repetition = knob(knobs, slot, REPETITION)
        presence, frequency = knob(knobs, slot, PRESENCE), knob(knobs, slot, FREQUENCY)
        for j in cutlass.range(team.thread, width, team.threads):
            marks = ptx.ldg32(g_row + Int64(j) * 4)
            count = (marks >> Uint32(1)).to(Float32)
            x = at(logits, row * width + j)
            if marks != Uint32(0) and repetition > Float32(0.0):
                x = ptx.divide(x, repetition) if x > Float32(0.0) else multiply(x, repetition)
            once = presence if count > Float32(0.0) else Float32(0.0)
            put(y, row * width + j, plus(x, -plus(once, multiply(frequency, count))))
        cute.arch.sync_threads()


@cute.jit
def token_probabilities(
    team: Team, logits: cute.Tensor, slots: cute.Tensor, knobs: cute.Tensor, y: cute.Tensor
):
    """Bounds are found bit by bit in the order of the logits. One CTA."""
    rows, width = logits.shape
    column = held(Int32, team.scratch + COLUMN, (1,))
    for row in cutlass.range(rows):
        slot = at(slots, row)
        own, out = part(logits, row * width, (1, width)), part(y, row * width, (1, width))
        if knob(knobs, slot, TEMPERATURE) <= Float32(0.0):
            argmax(team, own, column)
            cute.arch.sync_threads()
            for j in cutlass.range(team.thread, width, team.threads):
                put(out, j, Float32(1.0) if j == at(column, 0) else Float32(0.0))
            cute.arch.sync_threads()
        else:
            _cut(team, own, out, slot, knobs)


@cute.jit
def _cut(team: Team, x: cute.Tensor, y: cute.Tensor, slot: Int32, knobs: cute.Tensor):
    """Probabilities of a row under a temperature."""
    width = x.shape[1]
    over = Lines(0, 1, team.thread, team.threads, team)
    temperature = wide(knob(knobs, slot, TEMPERATURE))
    k = knob(knobs, slot, TOP_K).to(Int32)
    lowest = Uint32(0)
    if k > 0 and k < width:
        for bit in cutlass.range(32):
            higher = lowest | (Uint32(1) << (Uint32(31) - bit.to(Uint32)))
            count = Float64(0.0)
            for j in cutlass.range(team.thread, width, team.threads):
                count = count + (Float64(1.0) if place(at(x, j)) >= higher else Float64(0.0))
            if total(count, over) >= k.to(Float64):
                lowest = higher
    top = Float32(-Float32.inf)
    for j in cutlass.range(team.thread, width, team.threads):
        top = cute.arch.fmax(top, at(x, j))
    most = wide(largest(top, over)) / temperature
    mass = Float64(0.0)
    for j in cutlass.range(team.thread, width, team.threads):
        mass = mass + _weight(at(x, j), lowest, most, temperature)
    mass = total(mass, over)
    least = Float64(1.0) / mass * wide(knob(knobs, slot, MIN_P))
    top_p = wide(knob(knobs, slot, TOP_P))
    if top_p > Float64(0.0) and top_p < Float64(1.0):
        bound = Uint32(0)
        for bit in cutlass.range(32):
            higher = bound | (Uint32(1) << (Uint32(31) - bit.to(Uint32)))
            above = Float64(0.0)
            for j in cutlass.range(team.thread, width, team.threads):
                p = _weight(at(x, j), lowest, most, temperature) / mass
                above = above + (p if place(at(x, j)) >= higher else Float64(0.0))
            if total(above, over) >= top_p:
                bound = higher
        crossing = _weight(number(bound), lowest, most, temperature) / mass
        least = crossing if crossing > least else least
    left = Float64(0.0)
    for j in cutlass.range(team.thread, width, team.threads):
        p = _weight(at(x, j), lowest, most, temperature) / mass
        left = left + (p if p >= least else Float64(0.0))
    left = total(left, over)
    for j in cutlass.range(team.thread, width, team.threads):
        p = _weight(at(x, j), lowest, most, temperature) / mass
        put(y, j, (p if p >= least else Float64(0.0)) / left)


@cute.jit
def _weight(x: Float32, lowest: Uint32, most: Float64, temperature: Float64):
    """exp(x / temperature - most), 0 below the lowest place."""
    weight = cute.math.exp(wide(x) / temperature - most)
    return weight if place(x) >= lowest else Float64(0.0)


@cute.jit
def draw(
    team: Team,
    probabilities: cute.Tensor,
    positions: cute.Tensor,
    slots: cute.Tensor,
    origin: cute.Tensor,
    seeds: cute.Tensor,
    y: cute.Tensor,
):
    """Each thread has a stretch of the ids; the one in whose stretch the sum passes the number looks where.
    One CTA.
    """
    rows, width = probabilities.shape
    stretch = -(-width // team.threads)
    begin = team.thread * stretch
    for row in cutlass.range(rows):
        slot = at(slots, row)
        index = at(positions, row) + 1 - at(origin, slot)
        word = philox(at(seeds, 2 * slot).bitcast(Uint32), at(seeds, 2 * slot + 1).bitcast(Uint32), index)
        own = Float64(0.0)
        for j in cutlass.range(stretch):
            if begin + j < width:
                own = own + wide(at(probabilities, row * width + begin + j))
        before, behind, all_ = _stretch(own, team)
        wanted = (word.to(Float64) + Float64(0.5)) * Float64(2.0**-32) * all_
        if team.thread == 0:
            put(y, row, Int32(width - 1))
        cute.arch.sync_threads()
        if before <= wanted and wanted < behind:
            found, running = Int32(-1), before
            for j in cutlass.range(stretch):
                if begin + j < width:
                    p = wide(at(probabilities, row * width + begin + j))
                    if p > Float64(0.0) and (found < 0 or running <= wanted):
                        found = begin + j
                    running = running + p
            put(y, row, cutlass.max(found, Int32(0)))
        cute.arch.sync_threads()


@cute.jit
def _stretch(own: Float64, team: Team):
    """Sums over the threads before this one, up to it, and over all."""
    lane, warp, warps = team.thread % 32, team.thread // 32, team.threads // 32
    through = own
    for i in range_constexpr(5):
        other = cute.arch.shuffle_sync_up(through, offset=1 << i, mask_and_clamp=0)
        through = through + (other if lane >= (1 << i) else Float64(0.0))
    numbers = held(Float64, team.scratch, (warps,))
    if lane == 31:
        numbers[warp] = through
    cute.arch.sync_threads()
    base, all_ = Float64(0.0), Float64(0.0)
    for i in range_constexpr(warps):
        base = base + (numbers[i] if i < warp else Float64(0.0))
        all_ = all_ + numbers[i]
    cute.arch.sync_threads()
    up = cute.arch.shuffle_sync_up(through, offset=1, mask_and_clamp=0)
    before = base + up if lane > 0 else base
    return before, base + through, all_


@cute.jit
def philox(low: Uint32, high: Uint32, index: Int32):
    """The first word of Philox 4x32-10 at (index, 0, 0, 0) under the key (low, high)."""
    a, b, c, d = index.bitcast(Uint32), Uint32(0), Uint32(0), Uint32(0)
    for i in range_constexpr(10):
        one, two = Uint32(0xD2511F53), Uint32(0xCD9E8D57)
        a, b, c, d = (
            _high(c, two) ^ b ^ (low + Uint32(i * 0x9E3779B9 & 0xFFFFFFFF)),
            c * two,
            _high(a, one) ^ d ^ (high + Uint32(i * 0xBB67AE85 & 0xFFFFFFFF)),
            a * one,
        )
    return a


@cute.jit
def _high(a: Uint32, b: Uint32):
    """The upper word of a product."""
    return cute.arch.inline_ptx(
        "mul.hi.u32 {$w0}, {$r0}, {$r1};", write_only_types=[Uint32], read_only_args=[a, b]
    )


@cute.jit
def emit(
    team: Team,
    chosen: cute.Tensor,
    lengths: cute.Tensor,
    slots: cute.Tensor,
    stops: cute.Tensor,
    y: cute.Tensor,
    following: cute.Tensor,
):
    count = stops.shape[1]
    for i in cutlass.range(team.thread, size(y.shape), team.threads):
        token, length = at(chosen, i), at(lengths, i)
        left = length
        for j in range_constexpr(count):
            if at(stops, at(slots, i) * count + j) == token:
                left = Int32(0)
        put(y, i, token if length > 0 else Int32(-1))
        put(following, i, left)
