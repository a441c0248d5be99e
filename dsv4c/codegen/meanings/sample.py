"""The next token, and the rows it is read from."""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Float64, Int32, Int64, Uint32, const_expr, range_constexpr

from dsv4c.codegen.lib import ptx, sampler
from dsv4c.codegen.lib.sampler import FREQUENCY, MIN_P, PRESENCE, REPETITION, TEMPERATURE, TOP_K, TOP_P
from dsv4c.codegen.meanings.values import (
    Lines,
    Team,
    at,
    held,
    largest,
    lines,
    put,
    size,
    sums_before,
    total,
    wide,
)


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
        column = _likeliest(logits, row, over)
        if over.lane == 0:
            put(y, row, column)


@cute.jit
def _likeliest(logits: cute.Tensor, row: Int32, over: Constexpr):
    """The lowest column of a row's largest number, in all threads of its line."""
    width = logits.shape[-1]
    best, column = Int32(-0x80000000), Int32(0x7FFFFFFF)
    for j in cutlass.range(over.lane, width, over.width):
        key = sampler.order(at(logits, row * width + j).to(Float32))
        if key > best or column == Int32(0x7FFFFFFF):
            best, column = key, j
    if const_expr(over.width > 1):
        for i in range_constexpr(5):
            other = cute.arch.shuffle_sync_bfly(best, offset=1 << i)
            place = cute.arch.shuffle_sync_bfly(column, offset=1 << i)
            if other > best or (other == best and place < column):
                best, column = other, place
    if const_expr(over.width > 32):
        keys = held(Int32, over.team.scratch, (2 * (over.width // 32),))
        if over.lane % 32 == 0:
            keys[over.lane // 32 * 2] = best
            keys[over.lane // 32 * 2 + 1] = column
        cute.arch.sync_threads()
        for i in range_constexpr(over.width // 32):
            if keys[2 * i] > best or (keys[2 * i] == best and keys[2 * i + 1] < column):
                best, column = keys[2 * i], keys[2 * i + 1]
        cute.arch.sync_threads()
    return column


# Sampling: a CTA per row ------------------------------------------------------------------------------------


@cute.jit
def _knob(knobs: cute.Tensor, slot: Int32, column: Constexpr[int]):
    """A slot's knob; off where it is no finite number."""
    return sampler.off_unless_finite(at(knobs, slot * 7 + column))


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
    """The result's own bytes first count what was said: twice a token's times from the origin on, and one if
    it is there at all. They lie in global memory.
    """
    width, capacity = logits.shape[1], history.shape[1]
    g_counts = y.iterator.toint()
    slot, last = at(slots, 0), cutlass.min(at(positions, 0), Int32(capacity - 1))
    first = at(origin, slot)
    repetition = _knob(knobs, slot, REPETITION)
    presence, frequency = _knob(knobs, slot, PRESENCE), _knob(knobs, slot, FREQUENCY)
    for j in cutlass.range(team.thread, width, team.threads):
        ptx.stg32(g_counts + Int64(j) * 4, Uint32(0))
    cute.arch.sync_threads()
    if repetition != Float32(0.0) or presence != Float32(0.0) or frequency != Float32(0.0):
        for place in cutlass.range(team.thread, last + 1, team.threads):
            g = g_counts + Int64(at(history, slot * capacity + place)) * 4
            _global_or(g, Uint32(1))
            if place >= first:
                _global_add(g, Uint32(2))
    cute.arch.sync_threads()
    for j in cutlass.range(team.thread, width, team.threads):
        count = ptx.ldg32(g_counts + Int64(j) * 4)
        said, times = count.bitcast(Int32), (count >> Uint32(1)).bitcast(Int32)
        put(y, j, sampler.lowered(at(logits, j), said, times, repetition, presence, frequency))


@cute.jit
def _global_or(g: Int64, r: Uint32):
    cute.arch.inline_ptx("red.global.or.b32 [{$r0}], {$r1};", read_only_args=[g, r])


@cute.jit
def _global_add(g: Int64, r: Uint32):
    cute.arch.inline_ptx("red.global.add.u32 [{$r0}], {$r1};", read_only_args=[g, r])


@cute.jit
def token_probabilities(
    team: Team, logits: cute.Tensor, slots: cute.Tensor, knobs: cute.Tensor, y: cute.Tensor
):
    """Bounds are found bit by bit, over keys in the order of the logits: the largest that enough keys reach,
    or enough of the sum. Until the end the result holds probabilities that do not sum to 1.
    """
    width = logits.shape[1]
    over = Lines(0, 1, team.thread, team.threads, team)
    slot = at(slots, 0)
    temperature, least = _knob(knobs, slot, TEMPERATURE), _knob(knobs, slot, MIN_P)
    if temperature <= Float32(0.0):
        column = _likeliest(logits, 0, over)
        for j in cutlass.range(team.thread, width, team.threads):
            put(y, j, Float32(1.0) if j == column else Float32(0.0))
    else:
        many, share = _knob(knobs, slot, TOP_K).to(Int32), _knob(knobs, slot, TOP_P)
        bound = Uint32(0)
        if many > 0 and many < width:
            for bit in cutlass.range(32):
                higher = bound | (Uint32(1) << (Uint32(31) - bit.to(Uint32)))
                own = Float64(0.0)
                for j in cutlass.range(team.thread, width, team.threads):
                    if _key(logits, j) >= higher:
                        own = own + Float64(1.0)
                if total(own, over) >= wide(many.to(Float32)):
                    bound = higher
        top = Float32(-Float32.inf)
        for j in cutlass.range(team.thread, width, team.threads):
            top = cute.arch.fmax(top, at(logits, j))
        top = largest(top, over)
        own = Float64(0.0)
        for j in cutlass.range(team.thread, width, team.threads):
            p = Float32(0.0)
            if _key(logits, j) >= bound:
                p = cute.math.exp((wide(at(logits, j)) - wide(top)) / wide(temperature)).to(Float32)
            put(y, j, p)
            own = own + wide(p)
        sum_ = total(own, over)  # a barrier, too: all of the result is there
        if share > Float32(0.0) and share < Float32(1.0):
            bound = Uint32(0)
            for bit in cutlass.range(32):
                higher = bound | (Uint32(1) << (Uint32(31) - bit.to(Uint32)))
                own = Float64(0.0)
                for j in cutlass.range(team.thread, width, team.threads):
                    if _key(logits, j) >= higher:
                        own = own + wide(at(y, j))
                if total(own, over) >= wide(share) * sum_:
                    bound = higher
        own = Float64(0.0)
        for j in cutlass.range(team.thread, width, team.threads):
            if _key(logits, j) >= bound and at(y, j) >= least:
                own = own + wide(at(y, j))
        sum_ = total(own, over)
        for j in cutlass.range(team.thread, width, team.threads):
            kept = _key(logits, j) >= bound and at(y, j) >= least
            put(y, j, wide(at(y, j)) / sum_ if kept else Float64(0.0))


@cute.jit
def _key(logits: cute.Tensor, j: Int32):
    """A logit as an unsigned number of the same order."""
    return (sampler.order(at(logits, j)).bitcast(Uint32)) ^ Uint32(0x80000000)


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
    """Probabilities become whole numbers of 2^-40, whose sums are exact in float64, in any order: exactly one
    thread's run of columns has the wanted place of the sum.
    """
    width = probabilities.shape[1]
    slot = at(slots, 0)
    index = at(positions, 0) + 1 - at(origin, slot)
    word = sampler.philox(at(seeds, slot * 2).bitcast(Uint32), at(seeds, slot * 2 + 1).bitcast(Uint32), index)
    run = -(-width // team.threads)
    first = team.thread * run
    stop = cutlass.min(first + run, Int32(width))
    own = Float64(0.0)
    for j in cutlass.range(first, stop):
        own = own + _whole(at(probabilities, j))
    before, all_ = sums_before(own, Float64, team)
    wanted = sampler.unit(word) * all_
    if before <= wanted and wanted < before + own:
        reached, column = before, Int32(-1)
        for j in cutlass.range(first, stop):
            reached = reached + _whole(at(probabilities, j))
            if column < 0 and reached > wanted:
                column = j
        put(y, 0, column)
    if not (all_ > Float64(0.0)) and team.thread == 0:
        put(y, 0, Int32(0))  # nothing can be drawn: the logits were no numbers


@cute.jit
def _whole(p: Float32):
    share = cutlass.max(Float32(0.0), cutlass.min(p, Float32(1.0)))
    share = share if p == p else Float32(0.0)
    return (wide(share) * Float64(2.0**40)).to(Int64).to(Float64)


@cute.jit
def emit(
    team: Team,
    chosen: cute.Tensor,
    lengths: cute.Tensor,
    slots: cute.Tensor,
    stops: cute.Tensor,
    said: cute.Tensor,
    going: cute.Tensor,
):
    """A thread per row."""
    each = stops.shape[1]
    for i in cutlass.range(team.thread, chosen.shape[0], team.threads):
        token, length = at(chosen, i), at(lengths, i)
        stopped = Int32(0)
        for n in cutlass.range(each):
            if at(stops, at(slots, i) * each + n) == token:
                stopped = Int32(1)
        put(said, i, token if length > 0 else Int32(-1))
        put(going, i, Int32(0) if stopped == 1 else length)
