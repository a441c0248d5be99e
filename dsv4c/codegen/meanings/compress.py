"""The KV compressor's pooling."""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Float64, Int32, const_expr

from dsv4c.codegen.meanings.values import Team, at, plus, put, size, wide

_NONE = 0x7FFFFFFF  # above every position


@cute.jit
def completed_entries(
    team: Team,
    positions: cute.Tensor,
    slots: cute.Tensor,
    entries: cute.Tensor,
    places: cute.Tensor,
    ratio: Constexpr[int],
    tokens: Constexpr[int],
):
    """A thread per entry that a sequence's tokens can reach from their first one."""
    reach = -(-tokens // ratio)
    for i in cutlass.range(team.thread, entries.shape[0], team.threads):
        sequence = i // reach
        first = Int32(_NONE)
        for t in cutlass.range(tokens):
            position = at(positions, sequence * tokens + t)
            if position >= 0:
                first = cutlass.min(first, position)
        entry = first // ratio + i % reach
        finished, slot = Int32(-1), Int32(0)
        for t in cutlass.range(tokens):
            if at(positions, sequence * tokens + t) == entry * ratio + (ratio - 1) and first < _NONE:
                finished, slot = entry, at(slots, sequence * tokens + t)
        put(entries, i, finished)
        put(places, i, slot)


@cute.jit
def compress_pool(
    team: Team,
    kv: cute.Tensor,
    score: cute.Tensor,
    entries: cute.Tensor,
    slots: cute.Tensor,
    y: cute.Tensor,
    ratio: Constexpr[int],
    overlap: Constexpr[bool],
    tokens: Constexpr[int],
):
    """A thread per channel of an entry: the largest score of its window, then weights and their sum."""
    _, ring, channels = kv.shape
    width = y.shape[1]
    length = 2 * ratio if const_expr(overlap) else ratio
    for i in cutlass.range(team.thread, size(y.shape), team.threads):
        entry, column = at(entries, i // width), i % width
        base = at(slots, i // width) * ring
        begin = (entry + 1) * ratio - length
        top = Float32(-Float32.inf)
        for t in cutlass.range(length):
            token = begin + t
            if token >= 0:
                channel = column
                if const_expr(overlap):
                    channel = column + width if t >= ratio else column
                top = cute.arch.fmax(top, at(score, (base + token % ring) * channels + channel))
        weights, pooled = Float64(0.0), Float64(0.0)
        for t in cutlass.range(length):
            token = begin + t
            if token >= 0 and entry >= 0:
                channel = column
                if const_expr(overlap):
                    channel = column + width if t >= ratio else column
                place = (base + token % ring) * channels + channel
                weight = cute.math.exp(wide(at(score, place)) - wide(top))
                weights = weights + weight
                pooled = pooled + weight * wide(at(kv, place))
        if entry < 0:
            weights, pooled = Float64(1.0), Float64(0.0)
        put(y, i, pooled / weights)


@cute.jit
def add_position_bias(
    team: Team, score: cute.Tensor, bias: cute.Tensor, positions: cute.Tensor, y: cute.Tensor
):
    """Positions below zero, of no token, count from the end as in Python."""
    period, width = bias.shape
    for i in cutlass.range(team.thread, size(y.shape), team.threads):
        place = at(positions, i // width) % period
        place = place + period if place < 0 else place
        put(y, i, plus(at(score, i), at(bias, place * width + i % width)))
