"""State: writes happen in place, and the positions and slots that say where."""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, Int64, range_constexpr

from dsv4c.codegen.meanings.values import Team, array, at, parts_of, put, size


@cute.jit
def cache_write(team: Team, cache, rows, index: cute.Tensor, slots: cute.Tensor):
    """A thread per element of the rows; a row for whose place there is a later one is not stored."""
    count = index.shape[0]
    for n in range_constexpr(len(parts_of(cache))):
        target, source = parts_of(cache)[n], parts_of(rows)[n]
        width = size(source.shape) // count
        capacity = target.shape[1]
        for i in cutlass.range(team.thread, count * width, team.threads):
            row = i // width
            place = at(index, row)
            kept = place >= 0
            later = row + 1
            while kept and later < count:
                other = at(index, later)
                same = other % capacity == place % capacity and at(slots, later) == at(slots, row)
                kept = not (other >= 0 and same)
                later = later + 1
            if kept:
                first = (Int64(at(slots, row)) * capacity + place % capacity) * width
                array(target.iterator + first, (width,))[i % width] = at(source, i)


@cute.jit
def cache_extend(
    team: Team,
    cache,
    rows,
    positions: cute.Tensor,
    slots: cute.Tensor,
    y,
    capacity: Constexpr[int],
    tokens: Constexpr[int],
):
    """A thread per element of the copies."""
    for n in range_constexpr(len(parts_of(y))):
        ring, new, joined = parts_of(cache)[n], parts_of(rows)[n], parts_of(y)[n]
        width = size(new.shape) // positions.shape[0]
        held = ring.shape[1]
        for i in cutlass.range(team.thread, size(joined.shape), team.threads):
            sequence, place = i // (capacity * width), i // width % capacity
            last, slot, count = Int32(-0x7FFFFFFF), Int32(0), Int32(0)
            for t in cutlass.range(tokens):
                position = at(positions, sequence * tokens + t)
                if position > last:
                    last, slot = position, at(slots, sequence * tokens + t)
                if position >= 0:
                    count = count + 1
            first = last + 1 - count
            position = last - _modulo(last - place, capacity)  # the latest of this residue
            value = joined.element_type(0)
            if position >= first and position >= 0:
                value = at(new, (sequence * tokens + position - first) * width + i % width)
            elif position >= 0 and position >= first - held:
                row = array(ring.iterator + (Int64(slot) * held + position % held) * width, (width,))
                value = row[i % width]
            put(joined, i, value)


@cute.jit
def _modulo(a: Int32, n: Constexpr[int]):
    """a mod n, from 0 on."""
    rest = a % n
    return rest + n if rest < 0 else rest


@cute.jit
def positions(
    team: Team,
    start: cute.Tensor,
    slots: cute.Tensor,
    lengths: cute.Tensor,
    y: cute.Tensor,
    row_slots: cute.Tensor,
    tokens: Constexpr[int],
):
    for i in cutlass.range(team.thread, y.shape[0], team.threads):
        sequence, step = i // tokens, i % tokens
        position, slot = Int32(-1), Int32(0)
        if step < at(lengths, sequence):
            slot = at(slots, sequence)
            position = at(start, slot) + step
        put(y, i, position)
        put(row_slots, i, slot)


@cute.jit
def owners(team: Team, lengths: cute.Tensor, y: cute.Tensor, tokens: Constexpr[int]):
    for i in cutlass.range(team.thread, y.shape[0], team.threads):
        put(y, i, Int32(i // tokens))


@cute.jit
def advance(team: Team, start: cute.Tensor, slots: cute.Tensor, lengths: cute.Tensor):
    """One thread for all: two sequences of one slot add up."""
    if team.thread == 0:
        for i in cutlass.range(lengths.shape[0]):
            length = at(lengths, i)
            if length > 0:
                put(start, at(slots, i), at(start, at(slots, i)) + length)
