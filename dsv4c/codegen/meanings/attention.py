"""Attention over gathered keys. What no index names may hold anything, NaN included."""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Float64, Int32, Int64, range_constexpr

from dsv4c.codegen.meanings.values import (
    Lines,
    Team,
    array,
    at,
    largest,
    lines,
    parts_of,
    plus,
    put,
    rounded,
    size,
    total,
    wide,
)


@cute.jit
def window_index(team: Team, positions: cute.Tensor, y: cute.Tensor, window: Constexpr[int]):
    for i in cutlass.range(team.thread, size(y.shape), team.threads):
        position, slot = at(positions, i // window), i % window
        behind = (position - slot) % window
        behind = behind + window if behind < 0 else behind
        last = position - behind  # the latest that lies in this slot
        put(y, i, last if last >= 0 and position >= 0 else Int32(-1))


@cute.jit
def visible_entries(
    team: Team, positions: cute.Tensor, y: cute.Tensor, ratio: Constexpr[int], capacity: Constexpr[int]
):
    for i in cutlass.range(team.thread, size(y.shape), team.threads):
        position, entry = at(positions, i // capacity), Int32(i % capacity)
        visible = position >= 0 and entry < (position + 1) // ratio
        put(y, i, entry if visible else Int32(-1))


@cute.jit
def gather(team: Team, cache, index: cute.Tensor, slots: cute.Tensor, y):
    """A thread per element of every part."""
    picks = index.shape[1]
    for n in range_constexpr(len(parts_of(y))):
        source, target = parts_of(cache)[n], parts_of(y)[n]
        capacity = source.shape[1]
        width = size(target.shape) // size(index.shape)
        for i in cutlass.range(team.thread, size(target.shape), team.threads):
            place = at(index, i // width)
            value = target.element_type(0)
            if place >= 0:
                slot = Int64(at(slots, i // (width * picks)))
                row = array(source.iterator + (slot * capacity + place % capacity) * width, (width,))
                value = row[i % width]
            put(target, i, value)


@cute.jit
def attention_scores(
    team: Team,
    q: cute.Tensor,
    keys: cute.Tensor,
    index: cute.Tensor,
    y: cute.Tensor,
    scale: Constexpr[float],
):
    """A warp per score."""
    _, heads, width = q.shape
    count = keys.shape[1]
    over = Lines(0, 1, team.thread % 32, 32, team)
    for i in cutlass.range(team.thread // 32, size(y.shape), team.threads // 32):
        row, head, key = i // (heads * count), i // count, i % count
        score = Float32(-Float32.inf)
        if at(index, row * count + key) >= 0:
            own = Float64(0.0)
            for j in cutlass.range(over.lane, width, 32):
                own = own + wide(at(q, head * width + j)) * wide(at(keys, (row * count + key) * width + j))
            score = rounded(total(own, over) * Float64(scale), Float32)
        if over.lane == 0:
            put(y, i, score)


@cute.jit
def sink_softmax(
    team: Team,
    scores: cute.Tensor,
    sink: cute.Tensor,
    p: cute.Tensor,
    denominator: cute.Tensor,
    out: Constexpr[str],
):
    """A row without keys has p = 0 and the denominator exp(sink)."""
    _, heads, count = scores.shape
    all_ = size(denominator.shape)
    over = lines(team, all_, count)
    for line in cutlass.range(over.first, all_, over.step):
        top = Float32(-Float32.inf)
        for j in cutlass.range(over.lane, count, over.width):
            top = cute.arch.fmax(top, at(scores, line * count + j))
        top = largest(top, over)
        top = Float32(0.0) if top == Float32(-Float32.inf) else top
        own = Float64(0.0)
        for j in cutlass.range(over.lane, count, over.width):
            value = rounded(cute.math.exp(wide(plus(at(scores, line * count + j), -top))), Float32)
            own = own + wide(value)
            put(p, line * count + j, value)
        of_sink = cute.math.exp(wide(plus(at(sink, line % heads), -top)))
        below = total(own, over) + of_sink
        if over.lane == 0:
            put(denominator, line, below)


@cute.jit
def attention_values(team: Team, p: cute.Tensor, denominator: cute.Tensor, keys: cute.Tensor, y: cute.Tensor):
    """A thread per element."""
    _, heads, width = y.shape
    count = keys.shape[1]
    for i in cutlass.range(team.thread, size(y.shape), team.threads):
        head, row, column = i // width, i // (heads * width), i % width
        own = Float64(0.0)
        for j in cutlass.range(count):
            own = own + wide(at(p, head * count + j)) * wide(at(keys, (row * count + j) * width + column))
        put(y, i, own / wide(at(denominator, head)))
