"""Several tokens per step: the rows that draft, the rows that judge drafts, and how many of those hold."""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float64, Int32, Int64

from dsv4c.codegen.meanings.math import sigmoid
from dsv4c.codegen.meanings.values import Team, array, at, put, size, wide


@cute.jit
def preceding(
    team: Team,
    cache: cute.Tensor,
    rows: cute.Tensor,
    positions: cute.Tensor,
    slots: cute.Tensor,
    earlier: cute.Tensor,
    before: cute.Tensor,
):
    """A thread per element."""
    width, capacity = rows.shape[1], cache.shape[1]
    for i in cutlass.range(team.thread, size(rows.shape), team.threads):
        row = i // width
        position, slot = at(positions, row), at(slots, row)
        above = cutlass.max(row - 1, Int32(0))
        value = earlier.element_type(0)
        if position > 0:
            if row > 0 and at(positions, above) == position - 1 and at(slots, above) == slot:
                value = at(rows, i - width)
            else:
                place = (Int64(slot) * capacity + (position - 1) % capacity) * width
                value = array(cache.iterator + place, (width,))[i % width]
        put(earlier, i, value)
        if i % width == 0:
            put(before, row, position - 1 if position > 0 else Int32(-1))


@cute.jit
def draft_rows(
    team: Team,
    tokens: cute.Tensor,
    lengths: cute.Tensor,
    slots: cute.Tensor,
    start: cute.Tensor,
    ids: cute.Tensor,
    positions: cute.Tensor,
    row_slots: cute.Tensor,
    last: cute.Tensor,
    block: Constexpr[int],
    offset: Constexpr[int],
    noise: Constexpr[int],
):
    for i in cutlass.range(team.thread, ids.shape[0], team.threads):
        sequence, step = i // block, i % block
        place, end, slot = Int32(-1), Int32(-1), Int32(0)
        if at(lengths, sequence) > 0:
            slot = at(slots, sequence)
            place = cutlass.max(at(start, slot) + offset + step, Int32(-1))
            end = cutlass.max(at(start, slot) + offset + block - 1, Int32(-1))
        put(ids, i, at(tokens, sequence) if step == 0 else Int32(noise))
        put(positions, i, place)
        put(row_slots, i, slot)
        put(last, i, end)


@cute.jit
def candidates(
    team: Team,
    tokens: cute.Tensor,
    drafts: cute.Tensor,
    lengths: cute.Tensor,
    rows: cute.Tensor,
    row_lengths: cute.Tensor,
):
    sequences = tokens.shape[0]
    each = rows.shape[0] // sequences
    for i in cutlass.range(team.thread, rows.shape[0], team.threads):
        sequence, step = i // each, i % each
        drafted = cutlass.max(sequence * (each - 1) + step - 1, Int32(0))
        put(rows, i, at(tokens, sequence) if step == 0 else at(drafts, drafted))
        if step == 0:
            put(row_lengths, sequence, Int32(each) if at(lengths, sequence) > 0 else Int32(0))


@cute.jit
def trusted(
    team: Team,
    lengths: cute.Tensor,
    confidence: cute.Tensor,
    slots: cute.Tensor,
    least: cute.Tensor,
    rows: cute.Tensor,
):
    """A thread per sequence."""
    drafts = confidence.shape[0] // lengths.shape[0]
    for sequence in cutlass.range(team.thread, lengths.shape[0], team.threads):
        length, count = at(lengths, sequence), Int32(0)
        if length > 0:
            wanted, survival = wide(at(least, at(slots, sequence))), Float64(1.0)
            for step in cutlass.range(drafts, unroll=1):
                survival = survival * sigmoid(wide(at(confidence, sequence * drafts + step)))
                if survival >= wanted and step == count:
                    count = count + 1
            count = cutlass.min(1 + count, length)
        put(rows, sequence, count)


@cute.jit
def accept(
    team: Team,
    chosen: cute.Tensor,
    tokens: cute.Tensor,
    lengths: cute.Tensor,
    said: cute.Tensor,
    counts: cute.Tensor,
    following: cute.Tensor,
):
    """A thread per sequence."""
    each = chosen.shape[0] // lengths.shape[0]
    for sequence in cutlass.range(team.thread, lengths.shape[0], team.threads):
        first, length = sequence * each, at(lengths, sequence)
        count, last = Int32(0), at(tokens, first)
        for step in cutlass.range(each):
            word = at(chosen, first + step)
            goes_on = step < length and step == count  # no row before it has ended the round
            if goes_on and step > 0:
                goes_on = at(tokens, first + step) == last
            if goes_on:
                count, last = count + 1, word
            put(said, first + step, word if goes_on else Int32(-1))
        put(counts, sequence, count)
        put(following, sequence, last)


@cute.jit
def stop(
    team: Team,
    said: cute.Tensor,
    slots: cute.Tensor,
    counts: cute.Tensor,
    following: cute.Tensor,
    stops: cute.Tensor,
    kept: cute.Tensor,
    shorter: cute.Tensor,
    last: cute.Tensor,
    going: cute.Tensor,
):
    """A thread per sequence."""
    each, words = said.shape[0] // counts.shape[0], stops.shape[1]
    for sequence in cutlass.range(team.thread, counts.shape[0], team.threads):
        first, count, ended = sequence * each, at(counts, sequence), Int32(0)
        end, word = count, at(following, sequence)
        for step in cutlass.range(each):
            token = at(said, first + step)
            put(kept, first + step, token if ended == 0 and step < count else Int32(-1))
            if ended == 0 and step < count:
                for n in cutlass.range(words):
                    if at(stops, at(slots, first + step) * words + n) == token:
                        ended, end, word = Int32(1), step + 1, token
        put(shorter, sequence, end)
        put(last, sequence, word)
        put(going, sequence, Int32(0) if ended == 1 else cutlass.min(count, Int32(1)))
